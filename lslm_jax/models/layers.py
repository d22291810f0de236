"""The small parts of a Transformer. Modules own weights; what they compute is a function of arrays.

Legend of the shapes, for the whole package:
  B batch        T query or target length    S key or source length    D model width    F MLP width
  H query heads  K key and value heads       G query heads per key head, H / K          C head width
  V vocabulary   L layers                    P positions

Parameters are float32 and carry the logical name of each axis in their metadata (`axes`); `sharding.py` maps names to
the mesh. They are cast to the type of the activations where they are used.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

INIT_STD = 0.02  # GPT-2 and Llama alike


def normal(key: jax.Array, shape: Sequence[int], axes: Sequence[str], std: float = INIT_STD) -> nnx.Param:
    """A parameter drawn from N(0, std^2), one logical axis name a dimension."""
    return nnx.Param(std * jax.random.normal(key, shape), axes=tuple(axes))


def constant(value: float, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A parameter that starts as one number everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=tuple(axes))


class Linear(nnx.Module):
    """y = x w + b, from the last axes of x to new ones: D -> (H, C) and (H, C) -> D as well as D -> F."""

    def __init__(
        self,
        key: jax.Array,
        inputs: dict[str, int],
        outputs: dict[str, int],
        *,
        bias: bool,
        std: float = INIT_STD,
    ):
        """Args: inputs and outputs map the logical name of each axis to its size, in order."""
        self.contract = len(inputs)
        both = [*inputs.items(), *outputs.items()]
        self.w = normal(key, [size for _, size in both], [name for name, _ in both], std)
        # A bias is too small to be worth gathering: where weights split "embed", it is copied.
        axes = ["width" if name == "embed" else name for name in outputs]
        self.b = constant(0.0, list(outputs.values()), axes) if bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *inputs] to [..., *outputs] in the type of x."""
        y = jnp.tensordot(x, self.w.get_value().astype(x.dtype), self.contract)
        if self.b is None:
            return y
        b = self.b.get_value().astype(x.dtype)
        return y + jax.lax.broadcast_in_dim(b, y.shape, range(y.ndim - b.ndim, y.ndim))


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axis, computed in float32."""

    def __init__(self, size: int, axis: str, *, kind: str, eps: float, bias: bool):
        self.kind, self.eps = kind, eps
        self.scale = constant(1.0, [size], [axis])
        self.bias = constant(0.0, [size], [axis]) if bias and kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., D], keeping its type."""
        y = x.astype(jnp.float32)
        if self.kind == "layernorm":
            y = y - jnp.mean(y, axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        y = y * _along_last(self.scale.get_value(), y)
        if self.bias is not None:
            y = y + _along_last(self.bias.get_value(), y)
        return y.astype(x.dtype)


def _along_last(v_D: jax.Array, like: jax.Array) -> jax.Array:
    return jax.lax.broadcast_in_dim(v_D, like.shape, (like.ndim - 1,))


ACTIVATIONS = {
    "gelu": jax.nn.gelu,
    "gelu_exact": lambda x: jax.nn.gelu(x, approximate=False),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": jax.nn.silu,
}


def rotate(x_BTHC: jax.Array, positions_BT: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (Su et al. 2021): feature pairs (c, c + C/2) turn with the token's position."""
    half = x_BTHC.shape[-1] // 2
    frequency_C = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-math.log(theta) / half))
    angle_BT1C = positions_BT[:, :, None, None].astype(jnp.float32) * frequency_C[None, None, None, :]
    sin, cos = jnp.sin(angle_BT1C), jnp.cos(angle_BT1C)
    first, second = jnp.split(x_BTHC.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BTHC.dtype)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries at random and scales up the rest; without a key (evaluation) or a rate, the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """Squashes smoothly into (-cap, cap) (Gemma 2); a cap of 0 leaves them alone."""
    return cap * jnp.tanh(logits / cap) if cap else logits
