"""All that training changes, born where it will live."""

import fnmatch
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config
from lslm_jax.errors import ConfigError
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import shardings_of
from lslm_jax.runtime.pytree import flatten, split

_ADAPTERS_ALONE = ("*", "!*.lora.*", "!top.*")


class State(NamedTuple):
    """Everything a checkpoint must hold besides its identity. Randomness and data follow from `step`.

    Attributes:
      step: steps taken, skipped ones included; int32 scalar.
      model: the module with its parameters, float32.
      optimizer: optax's state, of the parameters that are trained; in the host's memory with `optimizer.offload`.
      ema: the module with averaged parameters, or None.
      skipped: steps in a row whose update was not finite and was left out; int32 scalar.
    """

    step: jax.Array
    model: Any
    optimizer: Any
    ema: Any
    skipped: jax.Array


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state, without allocating it.

    Raises:
      ConfigError: moments cannot wait where `optimizer.offload` wants them.
    """
    shapes = jax.jit(_create, static_argnums=(0, 1)).eval_shape(config, optimizer)
    rest = _placed(shapes._replace(optimizer=None), mesh)
    moments = _placed(shapes.optimizer, mesh, moments=not config.train.reproducible)
    return rest._replace(optimizer=jax.tree.map(_in_host, moments) if config.optimizer.offload else moments)


def abstract_model(config: Config, mesh: Mesh, dtype: str | None = None) -> Any:
    """Shapes, types and shardings of the model alone; its weights in another type than float32 if asked."""
    build = lambda: build_model(config.model, jax.random.key(config.seed), config.task.objective)
    cast = lambda leaf: leaf.astype(dtype or leaf.dtype)
    return _placed(jax.eval_shape(lambda: jax.tree.map(cast, build())), mesh)


def _placed(shapes: Any, mesh: Mesh, *, moments: bool = False) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings_of(shapes, mesh, moments=moments),
    )


def _in_host(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """An array in the memory of the host of the devices that it would lie on; a scalar stays there.

    Raises:
      ConfigError: jax knows of no such memory, as where GPUs are planned for that are not there.
    """
    if not leaf.ndim:
        return leaf
    sharding = leaf.sharding.with_memory_kind("pinned_host")
    if sharding.memory_kind is None:  # jax leaves out what it does not know, and says nothing
        raise ConfigError("optimizer.offload=true cannot be had here: jax knows of no host's memory at these devices")
    return leaf.update(sharding=sharding)


def on_device(tree: Any) -> Any:
    """Inside a program, arrays of a tree with those that lie in the host's memory brought to the devices."""
    return jax.device_put(tree, jax.memory.Space.Device)


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """A fresh state from the seed. Each device makes only its own part; the values do not depend on the mesh."""
    abstract = abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once: on CPUs optimizing it takes five times as long as it saves.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    create = jax.jit(_create, static_argnums=(0, 1), out_shardings=shardings, compiler_options=options)
    return create(config, optimizer)


def divide(config: Config, model: Any) -> tuple[Any, Any]:
    """The parameters of a model that are trained, and those that are not: two such models with None for the rest.

    Raises:
      ConfigError: a pattern of train.frozen names no parameter, or none is left to train.
    """
    names = list(flatten(model))
    trained = dict.fromkeys(names, True)
    for pattern in config.train.frozen or (_ADAPTERS_ALONE if config.model.lora_rank else ()):
        named = fnmatch.filter(names, pattern.removeprefix("!"))
        if config.train.frozen and not named:
            raise ConfigError(f"train.frozen={pattern} names no parameter: there are {', '.join(names)}")
        trained |= dict.fromkeys(named, pattern.startswith("!"))
    if not any(trained.values()):
        raise ConfigError(f"train.frozen={','.join(config.train.frozen)} leaves nothing to train")
    return split(model, trained)


# Names that optax gives second moments, behind their place in a chain; models have parts named `v` as well.
_SECOND_MOMENT = re.compile(r"(?:^optimizer|\.\d+)\.(?:nu|v|v_row|v_col)\.")
_HUGE = 1e20  # of a moment: gradients of 1e10 are no numbers of training, but those of a damaged bit


def not_finite(arrays: Mapping[str, jax.Array]) -> list[str]:
    """Names of the arrays that hold anything that is not a finite number."""
    return [name for name, (finite, _) in survey(arrays).items() if not finite]


def survey(arrays: Mapping[str, jax.Array]) -> dict[str, tuple[bool, int]]:
    """Range check of arrays by name.

    Returns:
      For each, whether all its values are finite, and how many are out of the range of moments: above 1e20, or negative
      where it holds second moments. Weights with such a moment hardly move, or not at all.
    """
    where = next(iter(arrays.values())).sharding
    whole = NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else where
    second = tuple(_SECOND_MOMENT.search(name) is not None for name in arrays)
    checked = jax.jit(_survey, static_argnums=1, out_shardings=whole)(list(arrays.values()), second)
    finite, odd = jax.device_get(checked)
    return {name: (bool(finite[i]), int(odd[i])) for i, name in enumerate(arrays)}


def num_parameters(model: Any) -> int:
    """Entries of all parameters together."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def evaluated_model(state: State) -> Any:
    """The weights that evaluation, generation and export use: the average where there is one."""
    return state.model if state.ema is None else state.ema


def _survey(arrays: list[jax.Array], second: tuple[bool, ...]) -> tuple[jax.Array, jax.Array]:
    arrays = on_device(arrays)
    finite = [jnp.isfinite(array).all() for array in arrays]
    odd = [jnp.sum((jnp.abs(a) > _HUGE) | (is_second & (a < 0))) for a, is_second in zip(arrays, second, strict=True)]
    return jnp.stack(finite), jnp.stack(odd)


def _create(config: Config, optimizer: optax.GradientTransformation) -> State:
    model = build_model(config.model, jax.random.key(config.seed), config.task.objective)
    return State(
        step=jnp.zeros((), jnp.int32),
        model=model,
        optimizer=optimizer.init(divide(config, model)[0]),
        ema=jax.tree.map(jnp.copy, model) if config.train.ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )
