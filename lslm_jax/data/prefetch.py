"""Batches made ahead of time in the background, through tf.data or threads."""

import atexit
import collections
import concurrent.futures
import importlib.util
from collections.abc import Callable, Generator
from typing import Literal

import numpy as np

from lslm_jax.data.batch import Batch
from lslm_jax.runtime.lazy_imports import import_tensorflow

_WORKERS = 2  # threads that make batches


def batches(
    make_batch: Callable[[int], Batch],
    start: int,
    stop: int,
    prefetch: int = 2,
    through: Literal["auto", "tf.data", "threads"] = "auto",
) -> Generator[Batch, None, None]:
    """make_batch(step) for each step of range(start, stop), made ahead of time in the background.

    Args:
      make_batch: pure; called from several threads at once. What it raises is raised here, at its step.
      start: first step.
      stop: the step after the last.
      prefetch: batches kept ready.
      through: tf.data, a pool of threads, or `auto`: tf.data where tensorflow is installed. The batches are the same.
    """
    if through == "auto":
        through = "tf.data" if importlib.util.find_spec("tensorflow") else "threads"
    return (_through_tf_data if through == "tf.data" else _through_threads)(make_batch, start, stop, prefetch)


def _through_threads(
    make_batch: Callable[[int], Batch], start: int, stop: int, prefetch: int
) -> Generator[Batch, None, None]:
    pool = concurrent.futures.ThreadPoolExecutor(_WORKERS)
    ready: collections.deque[concurrent.futures.Future[Batch]] = collections.deque()
    try:
        for step in range(start, stop):
            ready.append(pool.submit(make_batch, step))
            if len(ready) > prefetch:
                yield ready.popleft().result()
        while ready:
            yield ready.popleft().result()
    finally:
        for future in ready:
            future.cancel()
        pool.shutdown(wait=False)


def _through_tf_data(
    make_batch: Callable[[int], Batch], start: int, stop: int, prefetch: int
) -> Generator[Batch, None, None]:
    if start >= stop:
        return
    tf = import_tensorflow()
    first = make_batch(start)  # tells which parts there are
    present = [name for name, part in first._asdict().items() if part is not None]
    types = [getattr(first, name).dtype for name in present]
    errors: dict[int, Exception] = {}

    def make(step: np.ndarray) -> list[np.ndarray]:
        # An exception that went through TensorFlow would arrive as one of its own; this one takes a way around.
        try:
            batch = make_batch(int(step))
            return [getattr(batch, name) for name in present]
        except Exception as error:
            errors[int(step)] = error
            return [np.empty(0, dtype) for dtype in types]

    dataset = tf.data.Dataset.range(start + 1, stop)
    dataset = dataset.map(lambda step: tf.numpy_function(make, [step], types), _WORKERS, deterministic=True)
    # The interpreter cannot end while the pipeline's threads call into it: let go of the pipeline before, in any case.
    iterator = [dataset.prefetch(prefetch).as_numpy_iterator()]
    atexit.register(iterator.clear)
    try:
        yield first
        for step in range(start + 1, stop):
            parts = next(iterator[0])
            if step in errors:
                raise errors[step]
            yield Batch(**dict(zip(present, parts, strict=True)))
    finally:
        iterator.clear()
        atexit.unregister(iterator.clear)
