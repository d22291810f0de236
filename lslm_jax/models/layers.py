"""The small parts of a Transformer. Modules own weights; what they compute is a function of arrays.

Legend of the shapes, for the whole package:
  B batch        T query or target length    S key or source length    D model width    F MLP width
  H query heads  K key and value heads       G query heads per key head, H / K          C head width
  V vocabulary   L layers                    P positions or predictions   N buckets, or distances

Parameters are float32 and carry the logical name of each axis in their metadata (`axes`); `sharding.py` maps names to
the mesh. They are cast to the type of the activations where they are used.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.kernels import quantized_matmul

INIT_STD = 0.02  # GPT-2 and Llama alike


def normal(key: jax.Array, shape: Sequence[int], axes: Sequence[str], std: float = INIT_STD) -> nnx.Param:
    """A parameter drawn from N(0, std^2), one logical axis name a dimension."""
    return nnx.Param(std * jax.random.normal(key, shape), axes=tuple(axes))


def constant(value: float, shape: Sequence[int], axes: Sequence[str]) -> nnx.Param:
    """A parameter that starts as one number everywhere."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=tuple(axes))


def weight_std(config: ModelConfig, inputs: int) -> float:
    """Initial size of a weight that so many inputs are summed with."""
    return inputs**-0.5 if config.init == "fan_in" else INIT_STD


def residual_std(config: ModelConfig, inputs: int, sublayers: int) -> float:
    """Initial size of a projection into the residual stream, `sublayers` of which each layer adds (GPT-2)."""
    std = weight_std(config, inputs)
    return std / math.sqrt(sublayers * config.num_layers) if config.init == "residual" else std


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
        self.lora: Any = nnx.data(None)  # an adapter, which `lora.adapt` may put here
        self.narrow = ""  # a type of `low_precision`, if products are to be of such numbers

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *inputs] to [..., *outputs] in the type of x."""
        y = self.product(x)
        if self.lora is not None:
            y = y + self.lora(x)
        if self.b is None:
            return y
        return y + along_last(self.b.get_value().astype(x.dtype), y)

    def product(self, x: jax.Array) -> jax.Array:
        """The product with the weights alone, without adapter and bias."""
        w = self.w.get_value().astype(x.dtype)
        if self.narrow:
            return quantized_matmul.product(self.narrow, self.contract, x, w)
        return jnp.tensordot(x, w, self.contract)


def projections(module: nnx.Module, prefix: str = "") -> Iterator[tuple[str, Linear]]:
    """Every projection inside a module, by dotted name."""
    for name, part in vars(module).items():
        if isinstance(part, Linear):
            yield prefix + name, part
        elif isinstance(part, nnx.Module):
            yield from projections(part, f"{prefix}{name}.")


class Norm(nnx.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm (Zhang and Sennrich 2019) over the last axes, computed in float32."""

    def __init__(self, config: ModelConfig, axes: dict[str, int], kind: str = ""):
        """Args: axes maps the logical name of each axis to its size; kind, where it is not the config's."""
        self.kind, self.eps, self.offset = kind or config.norm, config.norm_eps, config.norm_offset
        sizes, names = list(axes.values()), list(axes)
        self.scale = constant(0.0 if self.offset else 1.0, sizes, names)
        self.bias = constant(0.0, sizes, names) if config.bias and self.kind == "layernorm" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises [..., *axes], keeping its type."""
        scale = self.scale.get_value()
        bias = None if self.bias is None else self.bias.get_value()
        return _normalise(self.kind == "layernorm", self.eps, x, 1.0 + scale if self.offset else scale, bias)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _normalise(centre: bool, eps: float, x: jax.Array, scale: jax.Array, bias: jax.Array | None) -> jax.Array:
    """Norm over the last axes, as many as `scale` has.

    Its backward pass works from x and two numbers a token. Left to itself, autodiff keeps four float32 arrays as large
    as x, which nearly half of all activations' memory would go to.
    """
    return _normalise_forward(centre, eps, x, scale, bias)[0]


def _normalise_forward(centre, eps, x, scale, bias):
    average = functools.partial(jnp.mean, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
    y = x.astype(jnp.float32)
    mean = average(y) if centre else 0.0
    inverse = jax.lax.rsqrt(average(jnp.square(y - mean)) + eps)
    y = (y - mean) * inverse * along_last(scale, y)
    y = y if bias is None else y + along_last(bias, y)
    return y.astype(x.dtype), (x, scale, bias, mean, inverse)


def _normalise_backward(centre, eps, kept, g):
    x, scale, bias, mean, inverse = kept
    average = functools.partial(jnp.mean, axis=tuple(range(-scale.ndim, 0)), keepdims=True)
    total = lambda a, like: jnp.sum(a, axis=tuple(range(a.ndim - like.ndim))).astype(like.dtype)
    g, y = g.astype(jnp.float32), (x.astype(jnp.float32) - mean) * inverse
    slope = g * along_last(scale, y)
    dx = slope - y * average(slope * y)
    dx = (dx - average(slope) if centre else dx) * inverse
    return dx.astype(x.dtype), total(g * y, scale), None if bias is None else total(g, bias)


_normalise.defvjp(_normalise_forward, _normalise_backward)


def along_last(v: jax.Array, like: jax.Array) -> jax.Array:
    """An array that is the same along all axes but the last ones, as many as it has."""
    return jax.lax.broadcast_in_dim(v, like.shape, range(like.ndim - v.ndim, like.ndim))


def _from_input(
    value_and_slope: Callable[[jax.Array], tuple[jax.Array, jax.Array]],
) -> Callable[[jax.Array], jax.Array]:
    """An activation whose backward pass works its slope out from what went in.

    Left to itself, autodiff keeps all that the slope is made of, arrays of [B, T, F]: writing and reading them takes
    longer than computing them again. Values and slopes are float32 inside.
    """

    @jax.custom_vjp
    def activation(x: jax.Array) -> jax.Array:
        return value_and_slope(x.astype(jnp.float32))[0].astype(x.dtype)

    def backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
        return ((g * value_and_slope(x.astype(jnp.float32))[1]).astype(x.dtype),)

    activation.defvjp(lambda x: (activation(x), x), backward)
    return activation


def _gelu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Hendrycks and Gimpel 2016, by tanh; (1 + tanh z) / 2 is the logistic function of 2 z."""
    square = jnp.square(x)
    gate = _logistic(_GELU * x * (1.0 + 0.044715 * square))
    return x * gate, gate + x * gate * (1.0 - gate) * _GELU * (1.0 + 3 * 0.044715 * square)


def _gelu_exact(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    below = 0.5 * (1.0 + jax.lax.erf(x * math.sqrt(0.5)))  # the normal distribution's, and next its density
    return x * below, below + x * jnp.exp(-0.5 * jnp.square(x)) * (1.0 / math.sqrt(2.0 * math.pi))


def _silu(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate = _logistic(x)
    return x * gate, gate * (1.0 + x * (1.0 - gate))


def _logistic(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


_GELU = 2.0 * math.sqrt(2.0 / math.pi)

ACTIVATIONS = {
    "gelu": _from_input(_gelu),
    "gelu_exact": _from_input(_gelu_exact),
    "relu": jax.nn.relu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
    "silu": _from_input(_silu),
    "tanh": jnp.tanh,
}


class Rotation(NamedTuple):
    """How far the feature pairs of each token are turned; C here counts pairs."""

    sin_BTC: jax.Array
    cos_BTC: jax.Array


def rotary_frequencies(config: ModelConfig, layer_type: str) -> np.ndarray:
    """By how much rotary positions (Su et al. 2021) turn each feature pair a token, in radians: float32 [C/2].

    `llama3` (Grattafiori et al. 2024) stretches the waves of which the old length holds fewer than rope_low_factor,
    leaves alone those of which it holds more than rope_high_factor, and goes from one to the other in between.
    """
    pairs = int(config.head_dim * config.rope_fraction) // 2
    is_local = layer_type == "window" and config.rope_local_theta > 0
    theta = config.rope_local_theta if is_local else config.rope_theta
    frequency_C = theta ** -(np.arange(pairs) / pairs)
    if layer_type == "no_rope":
        frequency_C = np.zeros(pairs)
    elif config.rope_scaling == "linear" and not is_local:
        frequency_C = frequency_C / config.rope_factor
    elif config.rope_scaling == "llama3" and not is_local:
        waves_C = config.rope_original_length * frequency_C / (2 * math.pi)
        low, high = config.rope_low_factor, config.rope_high_factor
        kept_C = np.clip((waves_C - low) / (high - low), 0.0, 1.0)
        frequency_C = frequency_C * (kept_C + (1.0 - kept_C) / config.rope_factor)
    return frequency_C.astype(np.float32)


def rotation(positions_BT: jax.Array, frequency_C: np.ndarray) -> Rotation:
    """Where tokens at these positions turn to."""
    angle_BTC = positions_BT[:, :, None].astype(jnp.float32) * jnp.asarray(frequency_C)[None, None]
    return Rotation(jnp.sin(angle_BTC), jnp.cos(angle_BTC))


def rotate(x_BTHC: jax.Array, to: Rotation) -> jax.Array:
    """Turns the feature pairs (c, c + n) of each head, where n = how many there are; features behind them stay."""
    sin, cos = to.sin_BTC[:, :, None], to.cos_BTC[:, :, None]
    pairs = sin.shape[-1]
    x = x_BTHC.astype(jnp.float32)
    first, second, rest = x[..., :pairs], x[..., pairs : 2 * pairs], x[..., 2 * pairs :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1).astype(x_BTHC.dtype)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """Positions as waves (Vaswani et al. 2017), [B, T, D]: the first half are sines and the second their cosines.

    The wavelengths are those of the paper, 2 pi to 2 pi 10000; there sines and cosines take turns instead.
    """
    half = (width + 1) // 2
    frequency_D = jnp.exp(jnp.arange(half, dtype=jnp.float32) * (-2.0 * math.log(10_000.0) / width))
    angle_BTD = positions_BT[:, :, None].astype(jnp.float32) * frequency_D[None, None]
    return jnp.concatenate([jnp.sin(angle_BTD), jnp.cos(angle_BTD)], axis=-1)[..., :width]


def distance_buckets(buckets: int, farthest: int) -> np.ndarray:
    """The bucket of each distance from 0 to the farthest (Raffel et al. 2020).

    Half of the buckets hold one distance each, the others ever more, in proportion to the distance; the last one also
    holds all that is farther.
    """
    single = buckets // 2
    distance_N = np.arange(farthest + 1, dtype=np.float32)
    share_N = np.log(np.maximum(distance_N, single) / single) / np.float32(math.log(farthest / single))
    far_N = single + (share_N * (buckets - single)).astype(np.int32)
    return np.where(distance_N < single, distance_N.astype(np.int32), np.minimum(far_N, buckets - 1))


def relative_bias(
    table_NH: jax.Array, length: int, source_length: int, start: jax.Array | int, *, causal: bool, farthest: int
) -> jax.Array:
    """What attention adds to the product of a query and a key for the distance between them: [H, T, S].

    Args:
      table_NH: a number for each bucket and head; if not causal, half of the buckets are for what follows.
      length: of queries, T.
      source_length: of keys, S; the first is at place 0.
      start: place of the first query.
      causal: whether queries only see what is before them.
      farthest: `relative_distance`.
    """
    buckets = table_NH.shape[0] if causal else table_NH.shape[0] // 2
    # From the first key as the last query sees it to the last key as the first one does.
    after_N = jnp.arange(length + source_length - 1) - (length - 1) - start
    distance_N = jnp.clip(-after_N, 0, farthest) if causal else jnp.minimum(jnp.abs(after_N), farthest)
    bucket_N = jnp.asarray(distance_buckets(buckets, farthest))[distance_N]
    if not causal:
        bucket_N += buckets * (after_N > 0)
    bias_HN = table_NH[bucket_N].T
    # Each query's row is the one above moved by one place: copies of the row, each one longer than it will be read.
    rows_HTN = jnp.broadcast_to(
        jnp.pad(bias_HN, ((0, 0), (0, 1)))[:, None], (bias_HN.shape[0], length, after_N.size + 1)
    )
    moved_HN = rows_HTN.reshape(bias_HN.shape[0], -1)[:, : length * after_N.size]
    return moved_HN.reshape(-1, length, after_N.size)[:, :, length - 1 :]


def near(distance_TS: jax.Array, window: int, everywhere: jax.Array | bool | None) -> jax.Array:
    """Which distances, of either sign, the window takes in; all where there is none or it is ignored."""
    if not window:
        return jnp.full(distance_TS.shape, True)
    near_TS = jnp.abs(distance_TS) < window
    return near_TS if everywhere is None else near_TS | everywhere


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Zeroes entries at random and scales up the rest; without a key (evaluation) or a rate, the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), 0).astype(x.dtype)


def softcap(logits: jax.Array, cap: float) -> jax.Array:
    """Squashes smoothly into (-cap, cap) (Gemma 2); a cap of 0 leaves them alone."""
    return cap * jnp.tanh(logits / cap) if cap else logits
