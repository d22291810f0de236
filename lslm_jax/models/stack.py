"""Many blocks as one: the only file that knows there are L layers.

The weights of all layers lie in one block whose arrays have a leading "layers" axis, whether the layers are scanned or
unrolled; so the checkpoint does not depend on the choice.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.kernels import grouped_matmul
from lslm_jax.kernels.fused_attention import is_kernel_output
from lslm_jax.parallel.sharding import platform

UNROLLED = 16  # layers at most that are compiled one by one where nobody says so
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(grouped_matmul.SAVED),
)
REMAT = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": _DOTS,
    "save_attention": jax.checkpoint_policies.save_from_both_policies(_DOTS, is_kernel_output),
}


def stacked(make: Callable[[jax.Array], Any], num_layers: int, key: jax.Array) -> Any:
    """Makes `num_layers` layers from as many keys, as one module whose parameters have a leading "layers" axis."""

    def born(key: jax.Array) -> Any:
        layer = make(key)
        for _, param in nnx.iter_graph(layer):
            if isinstance(param, nnx.Variable):
                param.set_metadata("axes", ("layers", *param.get_metadata("axes")))
        return layer

    return jax.vmap(born)(jax.random.split(key, num_layers))


def unstacked(layers: Any, dtype: Any) -> nnx.List:
    """The layers apart, matrices cast to `dtype`: where one token is read at a time, slicing a stack takes as long."""
    layers = _cast_matrices(layers, dtype)
    num_layers = jax.tree.leaves(layers)[0].shape[0]
    return nnx.List([jax.tree.map(lambda a, i=i: a[i], layers) for i in range(num_layers)])


def part(layers: Any, i: int) -> Any:
    """A stack of layer i alone."""
    return jax.tree.map(lambda a: a[i : i + 1], layers)


def each(layers: Any, function: Callable[[Any], Any], dtype: Any) -> Any:
    """What `function` makes of each layer, its matrices cast to `dtype`: stacked, or a list as the layers are."""
    if isinstance(layers, nnx.List):
        return [function(layer) for layer in layers]
    return jax.vmap(function)(_cast_matrices(layers, dtype))


def beside(layers: Any, *parts: Any) -> Any:
    """What each layer reads, for `run` to take as caches: tuples of parts, each stacked (or a list) or None."""
    if not isinstance(layers, nnx.List):
        return parts
    return list(zip(*([None] * len(layers) if part is None else part for part in parts), strict=True))


def spread(layers: Any, values: list[Any]) -> Any:
    """A number for each layer, for `run` to take as caches: stacked, or a list as the layers are."""
    return values if isinstance(layers, nnx.List) else jnp.asarray(values)


def scans(config: ModelConfig) -> bool:
    """Whether the layers of a stack are scanned: what the config says, or else as its docstring does.

    What the backward pass reads is copied into stacks and out of them: 10 % of a step of GPT-2's 124M on an H200 (jax
    0.11), 5 to 11 % of that of small GPTs on CPUs. Where weights are split, a loop keeps those of the other layers from
    being gathered too early.
    """
    if config.scan_layers != "auto":
        return config.scan_layers
    splits_weights = any(size > 1 for axis, size in jax.sharding.get_abstract_mesh().shape.items() if axis != "data")
    return platform() == "tpu" or config.num_layers > UNROLLED or splits_weights


def run(
    layers: Any,
    x_BTD: jax.Array,
    apply: Callable[..., tuple[jax.Array, Any]],
    *,
    caches: Any = None,
    keys: jax.Array | None = None,
    remat: str = "none",
    scan: bool = True,
) -> tuple[jax.Array, Any]:
    """Applies each layer in turn: `apply(layer, x, cache, key) -> (x, cache)`.

    Args:
      layers: from `stacked`, or from `unstacked`: then caches are a list too.
      x_BTD: what the first layer reads; every other reads what the one before it returned.
      apply: one layer's forward pass.
      caches: what layers keep or read besides, stacked; or None.
      keys: one dropout key a layer; or None.
      remat: name of what the backward pass recomputes.
      scan: one compiled layer in a loop, or all of them unrolled.

    Returns:
      The last layer's output and the caches, stacked or in a list as they came.
    """
    if isinstance(layers, nnx.List):
        outputs = []
        for layer, cache in zip(layers, caches, strict=True):
            x_BTD, cache = apply(layer, x_BTD, cache, None)
            outputs.append(cache)
        return x_BTD, outputs
    layers = _cast_matrices(layers, x_BTD.dtype)

    def body(x_BTD: jax.Array, layer: Any) -> tuple[jax.Array, Any]:
        weights, cache, key = layer
        return apply(weights, x_BTD, cache, key)

    if REMAT[remat] is not None:
        body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=not scan)
    if scan:
        return jax.lax.scan(body, x_BTD, (layers, caches, keys))
    stacks, structure = jax.tree.flatten(layers)
    weights, outputs = [_apart(stacked) for stacked in stacks], []
    for i in range(len(stacks[0])):
        layer = structure.unflatten([parts[i] for parts in weights])
        x_BTD, cache = body(x_BTD, (layer, *jax.tree.map(lambda a, i=i: a[i], (caches, keys))))
        outputs.append(cache)
    return x_BTD, jax.tree.map(lambda *layer: jnp.stack(layer), *outputs)


@jax.custom_vjp
def _apart(stacked: jax.Array) -> list[jax.Array]:
    """The layers of a stack, whose gradients are stacked once.

    Left to itself, autodiff adds up as many stacks as there are layers, each of zeros but for one, and XLA's GPU
    compiler does so again in every kernel that reads the sum: of 48 layers, in nearly half of the step's time.
    """
    return [stacked[i] for i in range(len(stacked))]


_apart.defvjp(lambda stacked: (_apart(stacked), None), lambda _, gs: (jax.lax.optimization_barrier(jnp.stack(gs)),))


def _cast_matrices(layers: Any, dtype: jnp.dtype) -> Any:
    """Casts matrices once, before the loop, which would otherwise read them in float32 on every pass."""
    is_matrix = lambda a: a.ndim > 2 and jnp.issubdtype(a.dtype, jnp.floating)
    return jax.tree.map(lambda a: a.astype(dtype) if is_matrix(a) else a, layers)
