"""Products of eight-bit numbers, in training (`model.dtype`): twice the rate of bfloat16 where hardware has them.

Both sides of a product are rounded where it is computed, with one scale for all that is summed over: a token's
activations, an output's weights. What lies between products stays in bfloat16, weights in float32; so do norms,
attention and the output layer.

float8 (Micikevicius et al. 2022): four bits of exponent, but five for gradients, whose range is wider. int8: the
gradient of the weights, which is summed over all tokens, is of bfloat16.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lslm_jax.runtime import lazy_imports

_TYPES: dict[str, tuple[Any, Any, bool]] = {  # of activations and weights, of gradients; whether all products have them
    "float8": (jnp.float8_e4m3fn, jnp.float8_e5m2, True),
    "int8": (jnp.int8, jnp.int8, False),
}

KINDS = tuple(_TYPES)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def product(kind: str, contract: int, x: jax.Array, w: jax.Array) -> jax.Array:
    """The product x w, over the last `contract` axes of x and as many first ones of w, in the type of x.

    Args:
      kind: `float8` or `int8`.
      contract: number of axes.
      x: [..., *inputs], activations.
      w: [*inputs, *outputs], weights in the type of x.

    Returns:
      [..., *outputs].
    """
    return _forward(kind, contract, x, w)[0]


def _forward(kind: str, contract: int, x: jax.Array, w: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    narrow = _TYPES[kind][0]
    return _product(x, range(x.ndim - contract, x.ndim), narrow, w, range(contract), narrow), (x, w)


def _backward(kind: str, contract: int, kept: tuple[jax.Array, jax.Array], g: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, w = kept
    narrow, of_gradients, everywhere = _TYPES[kind]
    tokens, outputs = tuple(range(x.ndim - contract)), range(contract, w.ndim)
    dx = _product(g, range(len(tokens), g.ndim), of_gradients, w, outputs, narrow)
    if not everywhere:
        return dx, jnp.tensordot(x, g, (tokens, tokens))
    return dx, _product(x, tokens, narrow, g, tokens, of_gradients)


product.defvjp(_forward, _backward)


def _product(a: jax.Array, a_axes: Sequence[int], a_type: Any, b: jax.Array, b_axes: Sequence[int], b_type: Any) -> Any:
    """Sums over some axes of either side, after both are rounded; in the type that a had."""
    summed = tuple(a_axes), tuple(b_axes)
    rounded = [_rounded(array, axes, narrow) for array, axes, narrow in ((a, a_axes, a_type), (b, b_axes, b_type))]
    return lazy_imports.import_qwix().dot_general(*rounded, (summed, ((), ())), preferred_element_type=a.dtype)


def _rounded(array: jax.Array, summed: Sequence[int], narrow: Any) -> Any:
    others = [axis for axis in range(array.ndim) if axis not in summed]
    return lazy_imports.import_qwix().quantize(array.astype(jnp.float32), narrow, channelwise_axes=others)
