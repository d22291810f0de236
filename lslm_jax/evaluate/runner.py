"""Runs a step over a finite set of batches, without waiting between batches: adds up its sums, or gathers its rows."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lslm_jax.batch import Batch
from lslm_jax.sharding import to_global


def total(step: Callable[[Any, Batch], Any], model: Any, batches: Iterable[Batch], mesh: Mesh) -> Any:
    """Sums what `step(model, batch)` returns over all batches; float64, as one batch's float32 sums stay exact.

    Args:
      step: jitted; returns a pytree of scalars.
      model: its first argument.
      batches: this process's rows of each global batch.
      mesh: where the batches go.
    """
    parts = [step(model, to_global(batch, mesh)) for batch in batches]
    return jax.tree.map(lambda *values: float(np.sum(np.asarray(values, np.float64))), *jax.device_get(parts))


def gather(step: Callable[[Any, Batch], Any], model: Any, batches: Iterable[Batch], mesh: Mesh) -> np.ndarray:
    """What `step(model, batch)` returns for each row of all batches, in order, on every process.

    Args:
      step: jitted, its result copied to all devices (`out_shardings`); returns an array [B, ...].
      model: its first argument.
      batches: this process's rows of each global batch.
      mesh: where the batches go.
    """
    return np.concatenate(jax.device_get([step(model, to_global(batch, mesh)) for batch in batches]))
