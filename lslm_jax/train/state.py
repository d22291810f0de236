"""All that training changes, born where it will live."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lslm_jax.config import Config
from lslm_jax.models import presets
from lslm_jax.sharding import shardings_of


class State(NamedTuple):
    """Everything a checkpoint must hold besides its identity. Randomness and data follow from `step`.

    Attributes:
      step: steps taken, skipped ones included; int32 scalar.
      model: the module with its parameters, float32.
      optimizer: optax's state.
      ema: the module with averaged parameters, or None.
      skipped: steps in a row whose update was not finite and was left out; int32 scalar.
    """

    step: jax.Array
    model: Any
    optimizer: Any
    ema: Any
    skipped: jax.Array


def abstract_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """Shapes, types and shardings of the state, without allocating it."""
    return _placed(jax.eval_shape(lambda: _create(config, optimizer)), mesh)


def abstract_model(config: Config, mesh: Mesh) -> Any:
    """Shapes, types and shardings of the model alone."""
    return _placed(
        jax.eval_shape(lambda: presets.build(config.model, jax.random.key(config.seed), config.task.objective)), mesh
    )


def _placed(shapes: Any, mesh: Mesh) -> Any:
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings_of(shapes, mesh),
    )


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> State:
    """A fresh state from the seed. Each device makes only its own part; the values do not depend on the mesh."""
    abstract = abstract_state(config, optimizer, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    # It runs once: on CPUs optimizing it takes five times as long as it saves.
    options = {"xla_backend_optimization_level": 0} if mesh.devices.flat[0].platform == "cpu" else None
    return jax.jit(lambda: _create(config, optimizer), out_shardings=shardings, compiler_options=options)()


def num_parameters(model: Any) -> int:
    """Entries of all parameters together."""
    return sum(leaf.size for leaf in jax.tree.leaves(model))


def evaluated_model(state: State) -> Any:
    """The weights that evaluation, generation and export use: the average where there is one."""
    return state.model if state.ema is None else state.ema


def _create(config: Config, optimizer: optax.GradientTransformation) -> State:
    model = presets.build(config.model, jax.random.key(config.seed), config.task.objective)
    return State(
        step=jnp.zeros((), jnp.int32),
        model=model,
        optimizer=optimizer.init(model),  # type: ignore[arg-type]  # a module is a pytree
        ema=jax.tree.map(jnp.copy, model) if config.train.ema else None,
        skipped=jnp.zeros((), jnp.int32),
    )
