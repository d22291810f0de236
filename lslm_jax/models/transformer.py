"""A stack of blocks and what they share: the attention of the whole stack, its final norm, T5's table of distances."""

import copy
import functools
from dataclasses import replace
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models import attention, moe, stack
from lslm_jax.models.attention import Backend, Distances, KeyValues
from lslm_jax.models.block import Block
from lslm_jax.models.layers import INIT_STD, Norm, near, normal, relative_bias, rotary_frequencies, rotation
from lslm_jax.models.model_configs import layer_types
from lslm_jax.models.moe import Routing
from lslm_jax.parallel import context_parallel, pipeline_parallel


class Rows(NamedTuple):
    """What a stack is told of the rows that it reads, besides x; see `Tower.read`."""

    positions_BT: jax.Array
    segments_BT: jax.Array | None = None
    memory_BSD: jax.Array | None = None
    source_segments_BS: jax.Array | None = None


class Tower(nnx.Module):
    """Encoder or decoder without tables: hidden states in, hidden states out.

    A causal one sees what was before, another all; one with `cross` attention also sees what an encoder says.
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, causal: bool, cross: bool = False):
        make = functools.partial(Block, config, cross=cross)
        self.config, self.causal = config, causal
        self.blocks = stack.stacked(make, config.num_layers, key)
        self.norm = None if config.norm_place == "after" else Norm(config, {"width": config.d_model})
        std = config.d_model**-0.5 if config.init == "fan_in" else INIT_STD
        table = [config.relative_buckets, config.num_heads]
        table_key = jax.random.fold_in(key, config.num_layers)
        relative = config.positions == "relative"
        self.distances = normal(table_key, table, ["buckets", "heads"], std) if relative else None

    def read(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        segments_BT: jax.Array | None,
        *,
        backend: Backend,
        key: jax.Array | None,
        memory_BSD: jax.Array | None = None,
        source_segments_BS: jax.Array | None = None,
    ) -> tuple[jax.Array, Routing | None]:
        """Reads whole rows: [B, T, D] to [B, T, D]; and how each layer sent tokens to experts, where there are any.

        Args:
          x_BTD: from an embedding.
          positions_BT: place of each token in its document, [1, T] where all rows are alike.
          segments_BT: which document of its row a token belongs to, from 1, 0 for padding. None: one a row.
          backend: attention kernel, from `attention.choose`.
          key: dropout key, or None.
          memory_BSD: what the encoder says, for cross-attention.
          source_segments_BS: its tokens' documents.
        """
        config = self.config
        length = x_BTD.shape[1]
        is_split = context_parallel.is_split(length)
        bias_HTS = None if is_split else self._bias(length, length, 0)
        table_NH = None if self.distances is None or not is_split else self.distances.get_value()
        # Dropout draws for places as they lie, and experts that get full take tokens in their order: fold for neither.
        in_order = config.expert_capacity or (config.dropout and key is not None)
        folded = self.causal and context_parallel.can_fold(length) and not in_order
        if folded:
            x_BTD, positions_BT, segments_BT = jax.tree.map(context_parallel.fold, (x_BTD, positions_BT, segments_BT))
        attend_any = functools.partial(
            attention.attend, scale=config.attention_scale, cap=config.attention_softcap, backend=backend
        )

        def attending(rows, shared):
            bias_HTS, table_NH = shared
            distances = None if table_NH is None else Distances(table_NH, config.relative_distance)

            def attend(q_BTHC, k_BTKC, v_BTKC, cache, everywhere):
                out_BTHC = attend_any(
                    q_BTHC,
                    k_BTKC,
                    v_BTKC,
                    segments_BT=rows.segments_BT,
                    window=config.window,
                    causal=self.causal,
                    bias_HTS=bias_HTS,
                    everywhere=everywhere,
                    distances=distances,
                    folded=folded,
                )
                return out_BTHC, cache

            segments = {"segments_BT": rows.segments_BT, "source_segments_BS": rows.source_segments_BS}
            return attend, functools.partial(attend_any, **segments, window=0, causal=False)

        rows = Rows(positions_BT, segments_BT, memory_BSD, source_segments_BS)
        capacity = config.expert_capacity
        x_BTD, _, routing = self._run(x_BTD, rows, attending, (bias_HTS, table_NH), capacity=capacity, key=key)
        return context_parallel.unfold(x_BTD) if folded else x_BTD, routing

    def extend(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        cache: Any,
        index: jax.Array,
        mask_BTS: jax.Array,
        cross: Any = None,
        cross_mask_BTS: Any = None,
    ) -> tuple[jax.Array, Any]:
        """Reads T more tokens after those in the cache; returns their hidden states and the longer cache.

        Args: see `Decoder.with_cache` and `Seq2Seq.with_cache`.
        """
        config = self.config
        slots_T, slots_S = index + jnp.arange(x_BTD.shape[1]), jnp.arange(mask_BTS.shape[-1])
        bias_HTS = self._bias(len(slots_T), len(slots_S), index)
        attend_any = functools.partial(
            attention.attend_masked, scale=config.attention_scale, cap=config.attention_softcap
        )

        def attend(q_BTHC, k_BTKC, v_BTKC, cache, everywhere):
            k_BSKC = jax.lax.dynamic_update_slice_in_dim(cache.k_BSKC, k_BTKC, index, axis=1)
            v_BSKC = jax.lax.dynamic_update_slice_in_dim(cache.v_BSKC, v_BTKC, index, axis=1)
            near_TS = near(slots_T[:, None] - slots_S[None, :], config.window, everywhere)
            seen_BTS = mask_BTS & near_TS[None]
            return attend_any(q_BTHC, k_BSKC, v_BSKC, seen_BTS, bias_HTS=bias_HTS), KeyValues(k_BSKC, v_BSKC)

        attend_both = attend, functools.partial(attend_any, mask_BTS=cross_mask_BTS)
        return self._run(x_BTD, Rows(positions_BT), lambda *_: attend_both, None, caches=cache, cross=cross)[:2]

    def keys_values(self, memory_BSD: jax.Array) -> Any:
        """Every layer's cross-attention keys and values of what the encoder says, as `extend` takes them."""
        return stack.each(self.blocks, lambda block: block.cross.keys_values(memory_BSD), memory_BSD.dtype)

    def unstacked(self) -> Self:
        """The same with its layers apart, for reading token by token; its cache is a list, one entry a layer."""
        tower = copy.copy(self)
        tower.blocks = stack.unstacked(self.blocks, self.config.activations)
        return tower

    def layer(self, i: int) -> Self:
        """Layer i alone: what it reads, the layer before it says; the norm behind the last is left out."""
        config, tower = self.config, copy.copy(self)
        kind = layer_types(config, config.num_layers)[i]
        has_norm = config.first_norm or i > 0
        tower.config = replace(config, num_layers=1, layer_types=(kind,), first_norm=has_norm)
        tower.blocks, tower.norm = stack.part(self.blocks, i), None
        return tower

    def _bias(self, length: int, source_length: int, start: jax.Array | int) -> jax.Array | None:
        if self.distances is None:
            return None
        farthest = self.config.relative_distance
        return relative_bias(
            self.distances.get_value(), length, source_length, start, causal=self.causal, farthest=farthest
        )

    def _kinds(self) -> dict[str, Any]:
        """How far each kind of layer turns a token, in radians; empty without rotary positions."""
        config = self.config
        kinds = layer_types(config, config.num_layers) if config.positions == "rotary" else ()
        return {kind: rotary_frequencies(config, kind) for kind in kinds}

    def _differences(self) -> tuple[Any, Any, Any]:
        """Of each layer: whether it ignores the window, which of `_kinds` it is, whether it is the first.

        Each is None where that is no question.
        """
        config = self.config
        kinds = layer_types(config, config.num_layers)
        spread = functools.partial(stack.spread, self.blocks)
        mixed = config.window and set(kinds) - {"window"}
        everywhere = spread([kind != "window" for kind in kinds]) if mixed else None
        is_first = None if config.first_norm else spread([i == 0 for i in range(len(kinds))])
        turns = list(self._kinds())
        return everywhere, spread([turns.index(kind) for kind in kinds]) if len(turns) > 1 else None, is_first

    def _run(
        self,
        x_BTD: jax.Array,
        rows: Rows,
        attending: Any,
        shared: Any,
        *,
        caches: Any = None,
        cross: Any = None,
        capacity: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Routing | None]:
        """Runs the layers; `attending` makes Attend and AttendSource of rows and what all of them share."""
        config = self.config

        def reading(rows, shared):
            attend, attend_source = attending(rows, shared)
            rotations = [rotation(rows.positions_BT, frequency_C) for frequency_C in self._kinds().values()]
            rotations = jax.tree.map(lambda *each: jnp.stack(each), *rotations) if rotations else None

            def apply(block, x_BTD, given, key):
                cache, source, everywhere, rotary, is_first = given
                x_BTD, cache, routing = block(
                    x_BTD,
                    jax.tree.map(lambda each: each[0 if rotary is None else rotary], rotations),
                    functools.partial(attend, everywhere=everywhere),
                    cache=cache,
                    is_first=is_first,
                    source=rows.memory_BSD if source is None else source,
                    attend_source=attend_source,
                    real_BT=None if rows.segments_BT is None else rows.segments_BT > 0,
                    capacity=capacity,
                    key=key,
                )
                return x_BTD, (cache, routing)

            return apply

        beside = stack.beside(self.blocks, caches, cross, *self._differences())
        keys = None if key is None or not config.dropout else jax.random.split(key, config.num_layers)
        with jax.named_scope("blocks"):
            if caches is None and pipeline_parallel.splits(config.num_layers, config.pipeline_rounds):
                rows = rows._replace(positions_BT=jnp.broadcast_to(rows.positions_BT, x_BTD.shape[:2]))
                x_BTD, (caches, routing) = pipeline_parallel.run(
                    self.blocks,
                    x_BTD,
                    reading,
                    rows,
                    shared,
                    beside=beside,
                    keys=keys,
                    remat=config.remat,
                    parts=config.microbatches,
                    rounds=config.pipeline_rounds,
                )
                routing = routing and moe.of_parts(routing)
            else:
                apply = reading(rows, shared)
                x_BTD, kept = stack.run(
                    self.blocks, x_BTD, apply, caches=beside, keys=keys, remat=config.remat, scan=stack.scans(config)
                )
                both: Any = map(list, zip(*kept, strict=True)) if isinstance(kept, list) else kept
                caches, routing = both
        return x_BTD if self.norm is None else self.norm(x_BTD), caches, routing
