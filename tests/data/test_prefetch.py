"""Prefetch: batches arrive in order, errors as themselves, and the interpreter always ends."""

import subprocess
import sys
import threading

import numpy as np
import pytest

from lslm_jax.data.batch import Batch
from lslm_jax.data.prefetch import batches
from lslm_jax.errors import DataError

WAYS = ("tf.data", "threads")

CONSUMER = """
import sys
import time
import numpy as np
from lslm_jax.data.batch import Batch
from lslm_jax.data.prefetch import batches

def make(step):
    time.sleep(0.02)
    ids = np.full((4, 64), step, np.int32)
    return Batch(ids, ids, ids.astype(np.float32))

stream = batches(make, 0, 1_000_000, through=sys.argv[1])
for step, batch in enumerate(stream):
    if step == 9 and sys.argv[2] == "raise":
        raise ValueError("of the consumer")
    if step == 9:
        break
"""


def make(step):
    ids = np.arange(12, dtype=np.int32).reshape(3, 4) + step
    return Batch(ids, ids + 1, ids.astype(np.float32), segments_BT=ids)


@pytest.mark.parametrize("through", WAYS)
def test_every_step_arrives_once_and_in_order(through):
    for start, stop in ((0, 50), (7, 8), (3, 3)):
        got = list(batches(make, start, stop, through=through))
        assert len(got) == stop - start
        for step, batch in zip(range(start, stop), got, strict=True):
            assert batch.positions_BT is None
            for part, want in zip(batch, make(step), strict=True):
                np.testing.assert_array_equal(part, want)
                assert part is want or part.dtype == want.dtype


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize("bad", [0, 1, 5])
def test_an_error_arrives_as_itself_at_its_step(through, bad):
    def fails(step):
        if step == bad:
            raise DataError(f"token 999 at step {step}")
        return make(step)

    stream = batches(fails, 0, 10, through=through)
    for _ in range(bad):
        next(stream)
    with pytest.raises(DataError, match=f"^token 999 at step {bad}$"):
        next(stream)


@pytest.mark.parametrize("through", WAYS)
def test_batches_are_made_ahead_but_not_without_end(through):
    made, enough = set(), threading.Event()

    def counts(step):
        made.add(step)
        if len(made) >= 4:
            enough.set()
        return make(step)

    stream = batches(counts, 0, 1000, prefetch=2, through=through)
    next(stream), next(stream)
    assert enough.wait(10)
    stream.close()
    assert len(made) < 12


@pytest.mark.parametrize("through", WAYS)
@pytest.mark.parametrize("end", ["abandon", "raise"])
def test_the_interpreter_ends_with_a_stream_half_read(through, end):
    command = [sys.executable, "-c", CONSUMER, through, end]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == (1 if end == "raise" else 0)
    assert result.stderr.strip().split("\n")[-1] == ("ValueError: of the consumer" if end == "raise" else "")
