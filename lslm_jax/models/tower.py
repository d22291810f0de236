"""A stack of blocks and what they share: the attention of the whole stack, its final norm, T5's table of distances."""

import copy
import functools
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models import attention, stack
from lslm_jax.models.attention import Backend, KeyValues
from lslm_jax.models.block import AttendSource, Block
from lslm_jax.models.experts import Routing
from lslm_jax.models.layers import INIT_STD, Norm, Rotation, normal, relative_bias, rotary_frequencies, rotation
from lslm_jax.models.presets import layer_types


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
          positions_BT: place of each token in its document.
          segments_BT: which document of its row a token belongs to, from 1, 0 for padding. None: one a row.
          backend: attention kernel, from `attention.choose`.
          key: dropout key, or None.
          memory_BSD: what the encoder says, for cross-attention.
          source_segments_BS: its tokens' documents.
        """
        config = self.config
        length = x_BTD.shape[1]
        bias_HTS = self._bias(length, length, 0)
        attend_any = functools.partial(
            attention.attend, scale=config.attention_scale, cap=config.attention_softcap, backend=backend
        )

        def attend(q_BTHC, k_BTKC, v_BTKC, cache, everywhere):
            out_BTHC = attend_any(
                q_BTHC,
                k_BTKC,
                v_BTKC,
                segments_BT=segments_BT,
                window=config.window,
                causal=self.causal,
                bias_HTS=bias_HTS,
                everywhere=everywhere,
            )
            return out_BTHC, cache

        attend_source = functools.partial(
            attend_any, segments_BT=segments_BT, source_segments_BS=source_segments_BS, window=0, causal=False
        )
        x_BTD, _, routing = self._run(
            x_BTD,
            positions_BT,
            attend,
            attend_source,
            memory_BSD=memory_BSD,
            real_BT=None if segments_BT is None else segments_BT > 0,
            capacity=config.expert_capacity,
            key=key,
        )
        return x_BTD, routing

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
            near_TS = attention.near(slots_T[:, None] - slots_S[None, :], config.window, everywhere)
            seen_BTS = mask_BTS & near_TS[None]
            return attend_any(q_BTHC, k_BSKC, v_BSKC, seen_BTS, bias_HTS=bias_HTS), KeyValues(k_BSKC, v_BSKC)

        attend_source = functools.partial(attend_any, mask_BTS=cross_mask_BTS)
        return self._run(x_BTD, positions_BT, attend, attend_source, caches=cache, cross=cross)[:2]

    def keys_values(self, memory_BSD: jax.Array) -> Any:
        """Every layer's cross-attention keys and values of what the encoder says, as `extend` takes them."""
        return stack.each(self.blocks, lambda block: block.cross.keys_values(memory_BSD), memory_BSD.dtype)

    def unstacked(self) -> Self:
        """The same with its layers apart, for reading token by token; its cache is a list, one entry a layer."""
        tower = copy.copy(self)
        tower.blocks = stack.unstacked(self.blocks, self.config.dtype)
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

    def _layers(self, positions_BT: jax.Array) -> tuple[Rotation | None, Any, Any, Any]:
        """Rotations of all kinds of layers, [N, B, T, C]; and, where layers differ, what tells them apart.

        Returns:
          The rotations, or None. Of each layer: whether it ignores the window, which rotation is its own, whether it
          is the first; each None where that is no question.
        """
        config = self.config
        kinds = layer_types(config, config.num_layers)
        mixed = config.window and set(kinds) - {"window"}
        everywhere = stack.spread(self.blocks, [kind != "window" for kind in kinds]) if mixed else None
        is_first = None if config.first_norm else stack.spread(self.blocks, [i == 0 for i in range(len(kinds))])
        if config.positions != "rotary":
            return None, everywhere, None, is_first
        frequencies = {kind: rotary_frequencies(config, kind) for kind in kinds}
        rotations = [rotation(positions_BT, frequency_C) for frequency_C in frequencies.values()]
        which = stack.spread(self.blocks, [list(frequencies).index(kind) for kind in kinds])
        return (
            jax.tree.map(lambda *each: jnp.stack(each), *rotations),
            everywhere,
            which if len(rotations) > 1 else None,
            is_first,
        )

    def _run(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        attend: Any,
        attend_source: AttendSource,
        *,
        caches: Any = None,
        cross: Any = None,
        memory_BSD: jax.Array | None = None,
        real_BT: jax.Array | None = None,
        capacity: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, Any, Routing | None]:
        config = self.config
        rotations, *differences = self._layers(positions_BT)

        def apply(block, x_BTD, given, key):
            cache, source, everywhere, rotary, is_first = given
            x_BTD, cache, routing = block(
                x_BTD,
                jax.tree.map(lambda each: each[0 if rotary is None else rotary], rotations),
                functools.partial(attend, everywhere=everywhere),
                cache=cache,
                is_first=is_first,
                source=memory_BSD if source is None else source,
                attend_source=attend_source,
                real_BT=real_BT,
                capacity=capacity,
                key=key,
            )
            return x_BTD, (cache, routing)

        with jax.named_scope("blocks"):
            x_BTD, kept = stack.run(
                self.blocks,
                x_BTD,
                apply,
                caches=stack.beside(self.blocks, caches, cross, *differences),
                keys=None if key is None or not config.dropout else jax.random.split(key, config.num_layers),
                remat=config.remat,
                scan=config.scan_layers,
            )
        both: Any = map(list, zip(*kept, strict=True)) if isinstance(kept, list) else kept
        caches, routing = both
        return x_BTD if self.norm is None else self.norm(x_BTD), caches, routing
