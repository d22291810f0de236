"""One layer of a Transformer: self-attention, perhaps cross-attention, MLP; each is added to the residual stream."""

import math
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.layers import ACTIVATIONS, Linear, Norm, dropout, rotate, weight_std
from lslm_jax.sharding import constrain

# Attends from queries to keys and values; also returns the cache it wrote to, or None. The model that owns the layers
# makes one for all of them: it knows the mask, the back end and the place in the cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, KeyValues | None], tuple[jax.Array, KeyValues | None]]
# The same from queries to keys and values of another sequence, which stay what they are.
AttendSource = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def residual_std(config: ModelConfig, inputs: int, sublayers: int) -> float:
    """Initial size of a projection into the residual stream, `sublayers` of which each layer adds (GPT-2)."""
    std = weight_std(config, inputs)
    return std / math.sqrt(sublayers * config.num_layers) if config.init == "residual" else std


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
        small = config.init == "fan_in" and not config.attention_scale
        q_std = std / math.sqrt(C) if small else std
        self.config = config
        self.q = Linear(keys[0], width, heads, bias=config.bias, std=q_std)
        self.k = Linear(keys[1], width, kv_heads, bias=config.bias, std=std)
        self.v = Linear(keys[2], width, kv_heads, bias=config.bias, std=std)
        self.o = Linear(keys[3], heads, width, bias=config.bias, std=residual_std(config, H * C, sublayers))
        norm = Norm(C, "head_dim", kind="rmsnorm", eps=config.norm_eps, bias=False)
        self.q_norm, self.k_norm = (norm, nnx.clone(norm)) if config.qk_norm else (None, None)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        """Self-attention: returns [B, T, D] and the updated cache."""
        q_BTHC, (k_BTKC, v_BTKC) = self.queries(x_BTD), self.keys_values(x_BTD)
        if self.config.positions == "rotary":
            q_BTHC = rotate(q_BTHC, positions_BT, self.config.rope_theta)
            k_BTKC = rotate(k_BTKC, positions_BT, self.config.rope_theta)
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
    """Self-attention, with `cross` attention to another sequence, and MLP.

    Each is x + f(norm(x)) (Xiong et al. 2020) or, without `norm_first`, norm(x + f(x)) (Vaswani et al. 2017).
    """

    def __init__(self, config: ModelConfig, key: jax.Array, *, cross: bool = False):
        attention_key, mlp_key = jax.random.split(key)
        sublayers = 3 if cross else 2
        self.rate, self.norm_first = config.dropout, config.norm_first
        self.attention_norm = _norm(config)
        self.attention = Attention(config, attention_key, sublayers=sublayers)
        self.cross_norm = _norm(config) if cross else None
        cross_key = jax.random.fold_in(attention_key, 1)
        self.cross = Attention(config, cross_key, sublayers=sublayers) if cross else None
        self.mlp_norm = _norm(config)
        self.mlp = Mlp(config, mlp_key, sublayers=sublayers)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        attend: Attend,
        *,
        cache: KeyValues | None = None,
        source: Any = None,
        attend_source: Any = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """One layer: [B, T, D] to [B, T, D].

        Args:
          x_BTD: the residual stream.
          positions_BT: places of its tokens.
          attend: attention among them.
          cache: this layer's, or None.
          source: what the encoder says, [B, S, D], or the KeyValues that `cross.keys_values` makes of that.
          attend_source: AttendSource, attention to it.
          key: this layer's dropout key, or None.
        """
        keys = (None, None, None) if key is None else tuple(jax.random.split(key, 2 if self.cross is None else 3))
        out_BTD, cache = self.attention(self._read(x_BTD, self.attention_norm), positions_BT, attend, cache)
        x_BTD = self._add(x_BTD, out_BTD, self.attention_norm, keys[0])
        if self.cross is not None:
            seen = source if isinstance(source, KeyValues) else self.cross.keys_values(source)
            out_BTD = self.cross.cross(self._read(x_BTD, self.cross_norm), seen, attend_source)
            x_BTD = self._add(x_BTD, out_BTD, self.cross_norm, keys[2])
        x_BTD = self._add(x_BTD, self.mlp(self._read(x_BTD, self.mlp_norm)), self.mlp_norm, keys[1])
        return constrain(x_BTD, ("batch", "length", "width")), cache

    def _read(self, x_BTD: jax.Array, norm: Any) -> jax.Array:
        return norm(x_BTD) if self.norm_first else x_BTD

    def _add(self, x_BTD: jax.Array, out_BTD: jax.Array, norm: Any, key: jax.Array | None) -> jax.Array:
        x_BTD = x_BTD + dropout(out_BTD, self.rate, key)
        return x_BTD if self.norm_first else norm(x_BTD)


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.d_model, "width", kind=config.norm, eps=config.norm_eps, bias=config.bias)
