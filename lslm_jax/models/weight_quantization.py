"""Weights of a few bits, for models that are only read: whoever writes one token reads all of them.

The matrices of projections become qwix's arrays: int8 with a scale for each output, or int4 with one for each output
and as many as `_TILE` inputs. Embeddings, heads, norms, biases, experts and adapters stay as they are.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.models.layers import Linear, along_last
from lslm_jax.runtime import lazy_imports

KINDS = ("int8", "int4")
_TILE = 128  # inputs that share a scale, as in most models that are given away in four bits


class Quantized(Linear):
    """y = x w + b, with w as a qwix array."""

    def __init__(self, linear: Linear, kind: str):
        """Args: a projection, or a stack of them; and one of `KINDS`."""
        self.contract, self.b, self.lora = linear.contract, linear.b, linear.lora
        axes = linear.w.get_metadata("axes")
        self.w = nnx.Param(_rounded(linear.w.get_value(), axes[0] == "layers", linear.contract, kind), axes=axes)

    def product(self, x: jax.Array) -> jax.Array:
        w = self.w.get_value()
        if w.qtype == jnp.int8:
            # Scaled afterwards, a GPU's product reads the int8 themselves; before, XLA writes them out in x's type.
            y = jnp.tensordot(x, w.qvalue.astype(x.dtype), self.contract, preferred_element_type=jnp.float32)
            scale = jnp.squeeze(w.scale, range(self.contract)).astype(jnp.float32)
            return (y * along_last(scale, y)).astype(x.dtype)
        inputs = tuple(range(x.ndim - self.contract, x.ndim)), tuple(range(self.contract))
        return lazy_imports.import_qwix().dot_general(x, w, (inputs, ((), ()))).astype(x.dtype)


def quantize(model: Any, kind: str) -> Any:
    """The model with the weights of its projections rounded to one of `KINDS`; what it was is given up.

    Raises:
      ConfigError: qwix is not installed.
    """
    lazy_imports.import_qwix()
    is_linear = lambda part: isinstance(part, Linear)
    rounded = lambda part: Quantized(part, kind) if is_linear(part) else part
    return jax.jit(lambda model: jax.tree.map(rounded, model, is_leaf=is_linear), donate_argnums=0)(model)


def _rounded(w: jax.Array, stacked: bool, contract: int, kind: str) -> Any:
    """As few scales as can be: those of one output's inputs are one, or one for each tile of them."""
    qwix, inputs = lazy_imports.import_qwix(), range(stacked, stacked + contract)
    outputs = [axis for axis in range(w.ndim) if axis not in inputs]
    if kind == "int8":
        return qwix.quantize(w, jnp.int8, channelwise_axes=outputs)
    tiles = {inputs[-1]: math.gcd(w.shape[inputs[-1]], _TILE)}
    return qwix.quantize(w, jnp.int4, channelwise_axes=[*outputs, *inputs[:-1]], tiled_axes=tiles)
