"""The real train step with the real shardings, compiled for hardware by name; no array is made, no data are read."""

import re
import time
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lslm_jax.config import Config
from lslm_jax.data import synthetic_data
from lslm_jax.data.batch import Batch
from lslm_jax.data.tokenizers import special_tokens
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.evaluate.types import choose_backend
from lslm_jax.models.attention import Backend
from lslm_jax.parallel.sharding import make_mesh, use
from lslm_jax.plan import topology as topologies
from lslm_jax.plan.topology import Topology
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import State, abstract_state
from lslm_jax.train.train_step import compile_for, lower, whole_batch


class Compiled(NamedTuple):
    """A step for one config on one topology.

    Attributes:
      config: resolved.
      mesh: of devices that may not be there.
      backend: attention kernel in the program.
      state: shapes and shardings of what is donated to the step.
      batch: shapes and shardings of a whole batch.
      program: what XLA made; None where its compiler refused for want of memory.
      needed: bytes that it would have wanted then.
      lower_seconds, compile_seconds: what it took.
    """

    config: Config
    mesh: Mesh
    backend: Backend
    state: State
    batch: Batch
    program: jax.stages.Compiled | None
    needed: int
    lower_seconds: float
    compile_seconds: float


def resolve(config: Config) -> Config:
    """The config with the vocabulary and labels that it names itself: planning needs no data, only their shapes."""
    config = replace(config, data=replace(config.data, source="synthetic", mixture=()))
    facts = synthetic_data.facts(config)
    if config.tokenizer.kind == "bytes":
        facts |= {"tokenizer": Bytes().facts()}
    elif config.tokenizer.path and not config.model.vocab_size:
        facts |= {"tokenizer": load_tokenizer(config.tokenizer.path).facts()}
    if config.data.labels:
        facts |= {"labels": config.data.labels}
    return special_tokens.resolve(config, facts)[0]


def compile_step(config: Config, topology: Topology | None) -> Compiled:
    """Compiles the train step of a resolved config for a topology; None: for the devices that are there.

    Raises:
      ConfigError: the config does not go with so many devices.
    """
    mesh = make_mesh(config, topologies.devices(topology))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    with use(mesh, config.mesh), topologies.as_if_there(topology):
        data = synthetic_data.SyntheticInput(config, config.model.vocab_size, np.arange(1))
        backend, batch = choose_backend(config, mesh, [data]), whole_batch(config, data.batch(0), mesh)
        begun = time.monotonic()
        state = abstract_state(config, optimizer, mesh)
        lowered = lower(config, optimizer, backend, state, batch, mesh)
        lowered_at = time.monotonic()
        program, needed = _compile(mesh, lowered)
        seconds = lowered_at - begun, time.monotonic() - lowered_at
        return Compiled(config, mesh, backend, state, batch, program, needed, *seconds)


def _compile(mesh: Mesh, lowered: jax.stages.Lowered) -> tuple[Any, int]:
    """The program, or None and the bytes that it lacks memory for."""
    try:
        return compile_for(mesh, lowered), 0
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            raise
        used = re.search(r"Used ([\d.]+)([KMGT])", message) or re.search(r"\(([\d.]+)([KMGT])\) exceeds", message)
        return None, int(float(used[1]) * 1024 ** " KMGT".index(used[2])) if used else 0
