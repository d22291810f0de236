"""Runs a step over a finite set of batches, a few of them under way at a time, and puts together what it returns."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from lslm_jax.data.batch import Batch
from lslm_jax.parallel.sharding import to_global

# Enough that no device waits for the host. All at once would hold all batches on the devices, and may never end: XLA
# takes 32 programs a CPU device, and stops where processes have each filled up another one's queue.
_UNDER_WAY = 4


def run(
    step: Callable[[Any, Batch], Any],
    model: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    batch_size: int | None = None,
) -> list[Any]:
    """Results of `step(model, batch)` for all batches, on the host; see `stream`."""
    return list(stream(step, model, batches, mesh, batch_size))


def stream(
    step: Callable[[Any, Batch], Any],
    model: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    batch_size: int | None = None,
) -> Iterator[Any]:
    """Yields what `step(model, batch)` returns for each batch, in order, on the host.

    Args:
      step: jitted; what it returns lies whole on every device.
      model: its first argument.
      batches: this process's rows of each global batch, or all rows of each.
      mesh: where the batches go.
      batch_size: rows of a global batch. None: all of them are here.
    """
    under_way = collections.deque()
    for batch in batches:
        if len(under_way) == _UNDER_WAY:
            yield jax.device_get(under_way.popleft())
        under_way.append(step(model, to_global(batch, mesh, batch_size)))
    yield from jax.device_get(list(under_way))


def added(parts: Sequence[Any]) -> Any:
    """The sum of pytrees of scalars, as floats; in float64, as one batch's float32 sums stay exact."""
    return jax.tree.map(lambda *values: float(np.sum(np.asarray(values, np.float64))), *parts)


def joined(parts: Sequence[Any]) -> Any:
    """Pytrees of arrays [B, ...] as one of arrays of all rows."""
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)
