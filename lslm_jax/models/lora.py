"""Low-rank adapters (LoRA, Hu et al. 2021), beside projections that stay as they are."""

import fnmatch
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models.layers import Linear, constant, projections


class Lora(nnx.Module):
    """What is added to y = x w: (x a) b alpha / rank, `rank` numbers in between. It begins as nothing, since b is 0."""

    def __init__(self, linear: Linear, rank: int, alpha: float, key: jax.Array):
        shape, axes = linear.w.shape, linear.w.get_metadata("axes")
        self.contract, self.scale = linear.contract, alpha / rank
        inputs, outputs = shape[: self.contract], shape[self.contract :]
        bound = math.prod(inputs) ** -0.5
        a = jax.random.uniform(key, (*inputs, rank), minval=-bound, maxval=bound)
        self.a = nnx.Param(a, axes=(*axes[: self.contract], "rank"))
        self.b = constant(0.0, [rank, *outputs], ["rank", *axes[self.contract :]])

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., *inputs] to [..., *outputs] in the type of x."""
        few = jnp.tensordot(x, self.a.get_value().astype(x.dtype), self.contract)
        return jnp.tensordot(few, self.b.get_value().astype(x.dtype), 1) * self.scale


def adapt(block: nnx.Module, config: ModelConfig, key: jax.Array) -> None:
    """Gives those projections of a block that `lora_targets` names their adapters."""
    for i, (name, linear) in enumerate(projections(block)):
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in config.lora_targets):
            linear.lora = Lora(linear, config.lora_rank, config.lora_alpha, jax.random.fold_in(key, i))


def merge(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters by name with adapters, whose b holds the scale, put into the weights they stand beside.

    Args:
      arrays: by name, as `trees.flatten` has them, of stacked layers.
    """
    merged = {name: array for name, array in arrays.items() if ".lora." not in name}
    for name in arrays:
        owner, found, _ = name.partition(".lora.a")
        if found:
            merged[f"{owner}.w"] = _sum(arrays[f"{owner}.w"], arrays[name], arrays[f"{owner}.lora.b"])
    return merged


@jax.jit
def _sum(w: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return w + jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(a, b)
