"""One layer of a Transformer: attention and MLP, each normalised first and added to the residual stream."""

import math
from collections.abc import Callable

import jax
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models.attention import KeyValues
from lslm_jax.models.layers import ACTIVATIONS, INIT_STD, Linear, Norm, dropout, rotate
from lslm_jax.sharding import constrain

# Attends from queries to keys and values; also returns the cache it wrote to, or None. The model that owns the layers
# makes one for all of them: it knows the mask, the back end and the place in the cache.
Attend = Callable[[jax.Array, jax.Array, jax.Array, KeyValues | None], tuple[jax.Array, KeyValues | None]]


def residual_std(config: ModelConfig) -> float:
    """Initial size of a projection into the residual stream, two of which each layer adds (Radford et al. 2019)."""
    return INIT_STD / math.sqrt(2 * config.num_layers) if config.init == "residual" else INIT_STD


class SelfAttention(nnx.Module):
    """Multi-head attention with grouped key and value heads."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 4)
        width = {"embed": config.d_model}
        heads = {"heads": config.num_heads, "head_dim": config.head_dim}
        kv_heads = {"kv_heads": config.num_kv_heads, "head_dim": config.head_dim}
        self.config = config
        self.q = Linear(keys[0], width, heads, bias=config.bias)
        self.k = Linear(keys[1], width, kv_heads, bias=config.bias)
        self.v = Linear(keys[2], width, kv_heads, bias=config.bias)
        self.o = Linear(keys[3], heads, width, bias=config.bias, std=residual_std(config))
        norm = Norm(config.head_dim, "head_dim", kind="rmsnorm", eps=config.norm_eps, bias=False)
        self.q_norm, self.k_norm = (norm, nnx.clone(norm)) if config.qk_norm else (None, None)

    def __call__(
        self, x_BTD: jax.Array, positions_BT: jax.Array, attend: Attend, cache: KeyValues | None
    ) -> tuple[jax.Array, KeyValues | None]:
        """Returns [B, T, D] and the updated cache."""
        q_BTHC = constrain(self.q(x_BTD), ("batch", "length", "heads", "head_dim"))
        k_BTKC = constrain(self.k(x_BTD), ("batch", "length", "kv_heads", "head_dim"))
        v_BTKC = constrain(self.v(x_BTD), ("batch", "length", "kv_heads", "head_dim"))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHC, k_BTKC = self.q_norm(q_BTHC), self.k_norm(k_BTKC)
        if self.config.positions == "rotary":
            q_BTHC = rotate(q_BTHC, positions_BT, self.config.rope_theta)
            k_BTKC = rotate(k_BTKC, positions_BT, self.config.rope_theta)
        out_BTHC, cache = attend(q_BTHC, k_BTKC, v_BTKC, cache)
        return self.o(out_BTHC), cache


class Mlp(nnx.Module):
    """D -> F -> D, with an activation between or, gated, the activation of one projection times another."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        keys = jax.random.split(key, 3)
        width, hidden = {"embed": config.d_model}, {"mlp": config.d_ff}
        self.activation = config.activation
        self.up = Linear(keys[0], width, hidden, bias=config.bias)
        self.gate = Linear(keys[1], width, hidden, bias=config.bias) if config.gated else None
        self.down = Linear(keys[2], hidden, width, bias=config.bias, std=residual_std(config))

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        act = ACTIVATIONS[self.activation]
        up_BTF = self.up(x_BTD)
        hidden_BTF = act(up_BTF) if self.gate is None else act(self.gate(x_BTD)) * up_BTF
        return self.down(constrain(hidden_BTF, ("batch", "length", "mlp")))


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)) (pre-norm, Xiong et al. 2020)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        attention_key, mlp_key = jax.random.split(key)
        self.rate = config.dropout
        self.attention_norm = _norm(config)
        self.attention = SelfAttention(config, attention_key)
        self.mlp_norm = _norm(config)
        self.mlp = Mlp(config, mlp_key)

    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        attend: Attend,
        *,
        cache: KeyValues | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues | None]:
        """One layer: [B, T, D] to [B, T, D]. `cache` is this layer's, `key` its dropout key; both may be None."""
        keys = (None, None) if key is None else tuple(jax.random.split(key))
        out_BTD, cache = self.attention(self.attention_norm(x_BTD), positions_BT, attend, cache)
        x_BTD = x_BTD + dropout(out_BTD, self.rate, keys[0])
        out_BTD = self.mlp(self.mlp_norm(x_BTD))
        x_BTD = x_BTD + dropout(out_BTD, self.rate, keys[1])
        return constrain(x_BTD, ("batch", "length", "width")), cache


def _norm(config: ModelConfig) -> Norm:
    return Norm(config.d_model, "width", kind=config.norm, eps=config.norm_eps, bias=config.bias)
