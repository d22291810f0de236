"""One layer of a Transformer: self-attention, perhaps cross-attention, MLP; each is added to the residual stream."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.kernels import quantized_matmul
from lslm_jax.models import lora
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.layers import (
    ACTIVATIONS,
    Linear,
    Norm,
    Rotation,
    dropout,
    projections,
    residual_std,
    rotate,
    weight_std,
)
from lslm_jax.models.moe import Experts, Routing
from lslm_jax.parallel.sharding import constrain
from lslm_jax.runtime import lazy_imports

# Attends from queries to keys and values; also returns the cache it wrote to, or None. The model that owns the layers
# makes one for all of them: it knows the mask, the back end and the place in the cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, KeyValues | None], tuple[jax.Array, KeyValues | None]]
# The same from queries to keys and values of another sequence, which stay what they are.
AttendSource = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


class Attention(nnx.Module):
    """Multi-head attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, sublayers: int):
        keys = jax.random.split(key, 4)
        D, H, C = config.d_model, config.num_heads, config.head_dim
        width = {"embed": D}
        heads = {"heads": H, "head_dim": C}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": C}
        std = weight_std(config, D)
        # Where products are not divided by sqrt(C), queries start smaller by as much (Raffel et al. 2020).
        small = config.init == "fan_in" and config.attention_scale == 1.0
        q_std = std / math.sqrt(C) if small else std
        bias = config.bias or config.qkv_bias
        self.q = Linear(keys[0], width, heads, bias=bias, std=q_std)
        self.k = Linear(keys[1], width, kv_heads, bias=bias, std=std)
        self.v = Linear(keys[2], width, kv_heads, bias=bias, std=std)
        self.o = Linear(keys[3], heads, width, bias=config.bias, std=residual_std(config, H * C, sublayers))
        self.q_norm = _qk_norm(config, heads)
        self.k_norm = _qk_norm(config, kv_heads)

    def __call__(
        self, x_BTD: jax.Array, to: Rotation | None, attend: Attend, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        """Self-attention: returns [B, T, D] and the updated cache."""
        q_BTHC, (k_BTKC, v_BTKC) = self.queries(x_BTD), self.keys_values(x_BTD)
        if to is not None:
            q_BTHC, k_BTKC = rotate(q_BTHC, to), rotate(k_BTKC, to)
        out_BTHC, cache = attend(q_BTHC, k_BTKC, v_BTKC, cache)
        return self.o(out_BTHC), cache

    def cross(self, x_BTD: jax.Array, source: KeyValues, attend: AttendSource) -> jax.Array:
        """Cross-attention to another sequence's keys and values; nothing tells how far apart tokens are."""
        return self.o(attend(self.queries(x_BTD), *source))

    def queries(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, H, C]."""
        q_BTHC = constrain(self.q(x_BTD), ("batch", "length", "heads", "head_dim"))
        return q_BTHC if self.q_norm is None else self.q_norm(q_BTHC)

    def keys_values(self, x_BSD: jax.Array) -> KeyValues:
        """Maps [B, S, D] to [B, S, K, C] twice."""
        k_BSKC = constrain(self.k(x_BSD), ("batch", "length", "kv_heads", "head_dim"))
        v_BSKC = constrain(self.v(x_BSD), ("batch", "length", "kv_heads", "head_dim"))
        return KeyValues(k_BSKC if self.k_norm is None else self.k_norm(k_BSKC), v_BSKC)


def _qk_norm(config: ModelConfig, axes: dict[str, int]) -> Norm | None:
    if config.qk_norm == "none":
        return None
    return Norm(config, axes if config.qk_norm == "all" else {"head_dim": config.head_dim}, "rmsnorm")


class Mlp(nnx.Module):
    """D -> F -> D, with an activation between or, gated, the activation of one projection times another."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, sublayers: int):
        keys = jax.random.split(key, 3)
        width, hidden = {"embed": config.d_model}, {"mlp": config.d_ff}
        std = weight_std(config, config.d_model)
        self.activation = config.activation
        self.up = Linear(keys[0], width, hidden, bias=config.bias, std=std)
        self.gate = Linear(keys[1], width, hidden, bias=config.bias, std=std) if config.gated else None
        self.down = Linear(keys[2], hidden, width, bias=config.bias, std=residual_std(config, config.d_ff, sublayers))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        act = ACTIVATIONS[self.activation]
        up_BTF = self.up(x_BTD)
        hidden_BTF = act(up_BTF) if self.gate is None else act(self.gate(x_BTD)) * up_BTF
        return self.down(constrain(hidden_BTF, ("batch", "length", "mlp")))


class Block(nnx.Module):
    """Self-attention, with `cross` attention to another sequence, and MLP; each is added to the residual stream x.

    Where the norms are (`norm_place`): x + f(norm(x)) (Xiong et al. 2020), norm(x + f(x)) (Vaswani et al. 2017),
    x + norm(f(x)) (OLMo 2) or x + norm(f(norm(x))) (Gemma 2).
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, cross: bool = False):
        attention_key, mlp_key = jax.random.split(key)
        sublayers = 3 if cross else 2
        self.config = config
        self.attention_norm, self.attention_output_norm = self._norms()
        self.attention = Attention(config, attention_key, sublayers=sublayers)
        self.cross_norm, self.cross_output_norm = self._norms() if cross else (None, None)
        cross_key = jax.random.fold_in(attention_key, 1)
        self.cross = Attention(config, cross_key, sublayers=sublayers) if cross else None
        self.mlp_norm, self.mlp_output_norm = self._norms()
        self.mlp = (Experts if config.num_experts else Mlp)(config, mlp_key, sublayers=sublayers)
        always = replace(config, d_ff=config.shared_experts * config.d_ff)
        shared_key = jax.random.fold_in(mlp_key, 1)
        self.shared = Mlp(always, shared_key, sublayers=sublayers) if config.shared_experts else None
        if config.lora_rank:
            lora.adapt(self, config, jax.random.fold_in(key, 1))
        if config.dtype in quantized_matmul.KINDS:
            lazy_imports.import_qwix()  # before anything slow: it may be missing
            for _, linear in projections(self):
                linear.narrow = config.dtype

    def __call__(
        self,
        x_BTD: jax.Array,
        to: Rotation | None,
        attend: Attend,
        *,
        cache: KeyValues | None = None,
        is_first: jax.Array | bool | None = None,
        source: Any = None,
        attend_source: Any = None,
        real_BT: jax.Array | None = None,
        capacity: float = 0.0,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | None, Routing | None]:
        """One layer: [B, T, D] to [B, T, D], the cache, and how tokens were sent to experts, where there are any.

        Args:
          x_BTD: the residual stream.
          to: where rotary positions turn its tokens, or None.
          attend: attention among them.
          cache: this layer's, or None.
          is_first: whether attention reads x as it is. None: no.
          source: what the encoder says, [B, S, D], or the KeyValues that `cross.keys_values` makes of that.
          attend_source: AttendSource, attention to it.
          real_BT: which tokens are not padding, for experts. None: all.
          capacity: of an expert.
          key: this layer's dropout key, or None.
        """
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 2 if self.cross is None else 3))
        read_BTD = self._read(x_BTD, self.attention_norm)
        if is_first is not None:
            read_BTD = jnp.where(is_first, x_BTD, read_BTD)
        out_BTD, cache = self.attention(read_BTD, to, attend, cache)
        before_BTD = x_BTD
        x_BTD = self._add(x_BTD, out_BTD, self.attention_norm, self.attention_output_norm, keys[0])
        if self.cross is not None:
            seen = source if isinstance(source, KeyValues) else self.cross.keys_values(source)
            out_BTD = self.cross.cross(self._read(x_BTD, self.cross_norm), seen, attend_source)
            x_BTD = self._add(x_BTD, out_BTD, self.cross_norm, self.cross_output_norm, keys[2])
        read_BTD = self._read(before_BTD if self.config.parallel else x_BTD, self.mlp_norm)
        out_BTD, routing = self._mlp(read_BTD, real_BT, capacity)
        x_BTD = self._add(x_BTD, out_BTD, self.mlp_norm, self.mlp_output_norm, keys[1])
        return constrain(x_BTD, ("batch", "length", "width")), cache, routing

    def _mlp(self, x_BTD: jax.Array, real_BT: jax.Array | None, capacity: float) -> tuple[jax.Array, Routing | None]:
        if isinstance(self.mlp, Mlp):
            return self.mlp(x_BTD), None
        out_BTD, routing = self.mlp(x_BTD, real_BT, capacity)
        return out_BTD if self.shared is None else out_BTD + self.shared(x_BTD), routing

    def _norms(self) -> tuple[Norm, Norm | None]:
        """A sub-layer's norm, and a second one where both what it reads and what it says are normalised."""
        make = lambda: Norm(self.config, {"width": self.config.d_model})
        return make(), make() if self.config.norm_place == "both" else None

    def _read(self, x_BTD: jax.Array, norm: Any) -> jax.Array:
        return norm(x_BTD) if self.config.norm_place in ("before", "both") else x_BTD

    def _add(
        self, x_BTD: jax.Array, out_BTD: jax.Array, norm: Any, output_norm: Any, key: jax.Array | None
    ) -> jax.Array:
        match self.config.norm_place:
            case "output":
                out_BTD = norm(out_BTD)
            case "both":
                out_BTD = output_norm(out_BTD)
        x_BTD = x_BTD + dropout(out_BTD, self.config.dropout, key)
        return norm(x_BTD) if self.config.norm_place == "after" else x_BTD
