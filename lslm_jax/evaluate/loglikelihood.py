"""How likely a decoder finds given texts: rows of like length, so that little is padding and few shapes compile."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.evaluate import batched_eval
from lslm_jax.evaluate.types import Setting
from lslm_jax.generate import prefill
from lslm_jax.models.attention import Backend
from lslm_jax.parallel.sharding import num_shards
from lslm_jax.runtime.progress import Progress
from lslm_jax.train.train_step import make_rate_step

BackendOf = Callable[[int], Backend]
"""The attention kernel for rows of a length, each one text."""

_HALVES_FROM = 512  # lengths between powers of two are worth a program of their own, and are still multiples of 128
_AT_ONCE = 16  # batches that the device is given before the host looks at what the first has found


class Text(NamedTuple):
    """Tokens of which the last `count` are predicted, each from all before it; at most model.max_length + 1 of them."""

    ids: Sequence[int]
    count: int


def rate(setting: Setting, model: Any, texts: Sequence[Text], backend_of: BackendOf) -> list[tuple[float, bool]]:
    """Of each text, in order, the log-probability of what is predicted (nats), and whether each token is the likeliest.

    Args:
      setting: its mesh is the one set by `jax.set_mesh`; a batch has train.batch_size rows, or as many tokens as one
        of training has where they are longer.
      model: a Decoder.
      texts: of any lengths.
      backend_of: kernels.
    """
    config, found = setting.config, [(0.0, True)] * len(texts)
    plan = list(_plan(config, texts))
    step = lambda model, batch: _rater(config, backend_of(batch.tokens_BT.shape[1]), setting.mesh)(model, batch)
    with Progress(len(plan)) as progress:
        for first in range(0, len(plan), _AT_ONCE):
            parts = plan[first : first + _AT_ONCE]
            batches = (_batch(config, [texts[i] for i in part]) for part in parts)
            for part, (nats_B, likeliest_B) in zip(
                parts, batched_eval.run(step, model, batches, setting.mesh), strict=True
            ):
                for i, nats, likeliest in zip(part, nats_B.tolist(), likeliest_B.tolist(), strict=False):
                    found[i] = nats, likeliest
            progress.update(first + len(parts))
    return found


def rows(config: Config, width: int) -> int:
    """Rows of that many tokens in a batch, a multiple of those that the mesh set by `jax.set_mesh` asks for."""
    size = config.train.batch_size * min(1.0, config.data.seq_len / width)
    return -(-max(1, int(size)) // num_shards("batch")) * num_shards("batch")


def _plan(config: Config, texts: Sequence[Text]) -> Iterator[list[int]]:
    """Which texts go together, the longest first: what does not fit into memory fails at once."""
    width_of = lambda i: _width(config, len(texts[i].ids) - 1)
    order = sorted(range(len(texts)), key=lambda i: (-width_of(i), -texts[i].count))
    while order:
        size = rows(config, width_of(order[0]))
        yield order[:size]
        order = order[size:]


def _width(config: Config, length: int) -> int:
    """The slots of a row that so many tokens are read from."""
    whole = prefill.bucket(length)
    half = 3 * whole // 4
    return min(half if whole >= _HALVES_FROM and length <= half else whole, config.model.max_length)


def _batch(config: Config, texts: Sequence[Text]) -> Batch:
    width = max(_width(config, len(text.ids) - 1) for text in texts)
    most = min(prefill.bucket(max(text.count for text in texts)), width)
    size = rows(config, width)
    tokens_BT = np.zeros((size, width), np.int32)
    targets_BP, places_BP = np.zeros((2, size, most), np.int32)
    weights_BP = np.zeros((size, most), np.float32)
    for i, (ids, count) in enumerate(texts):
        read = len(ids) - 1
        tokens_BT[i, :read] = ids[:-1]
        targets_BP[i, :count] = ids[len(ids) - count :]
        places_BP[i, :count] = np.arange(read - count, read)
        weights_BP[i, :count] = 1.0
    return Batch(tokens_BT, targets_BP, weights_BP, places_BP=places_BP)


@functools.cache
def _rater(config: Config, backend: Backend, mesh: Mesh) -> Any:
    """The jitted step of `make_rate_step`; what it returns lies whole on every device."""
    return jax.jit(make_rate_step(config, backend), out_shardings=NamedSharding(mesh, PartitionSpec()))
