"""Prompts on the device, and how a model reads them: at once to begin with, then token by token with a cache.

Prompts are padded on the left, so that all rows of a batch write the cache at one index; positions count from each
row's own first token and the padding is never attended to. An encoder-decoder reads its sources once, and its decoder's
prompt is bos. Sizes are powers of two: few enough that hardly any batch compiles anything.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Array
from lslm_jax.generate import kv_cache as caches
from lslm_jax.generate import sampling
from lslm_jax.generate.detokenize import Row
from lslm_jax.models import attention
from lslm_jax.models.attention import KeyValues
from lslm_jax.parallel.sharding import constrain


class Prompts(NamedTuple):
    """A batch of prompts on the device.

    Attributes:
      tokens_BP: padded on the left.
      start_B: the slot of each row's first token; those before are padding.
      limit_B: how many tokens each row may draw.
      keys_B2: each row's key, as data.
      source_BS: what the encoder reads, padded on the right; or None.
      is_source_BS: which of it is not padding; or None.
    """

    tokens_BP: Array
    start_B: Array
    limit_B: Array
    keys_B2: Array
    source_BS: Array | None = None
    is_source_BS: Array | None = None


class Memory(NamedTuple):
    """What is kept of all that was read.

    Attributes:
      cache: for each layer P slots for the prompt, then N for the tokens drawn.
      cross: for each layer keys and values of the source; or None.
    """

    cache: list[KeyValues]
    cross: list[KeyValues] | None


def pad(rows: Sequence[Row], seed: int, config: ModelConfig) -> Prompts:
    """Makes a batch of rows. All of an encoder-decoder's begin with the same prompt, which needs no padding."""
    has_source = config.family == "encoder_decoder"
    longest = max(len(row.prompt) for row in rows)
    width = longest if has_source else min(bucket(longest), config.max_length)
    start_B = np.array([width - len(row.prompt) for row in rows], np.int32)
    tokens_BP = np.zeros((len(rows), width), np.int32)
    for tokens_P, start, row in zip(tokens_BP, start_B, rows, strict=True):
        tokens_P[start:] = row.prompt
    keys_B = sampling.row_keys(seed, [row.number for row in rows])
    limit_B = np.array([row.limit for row in rows], np.int32)
    sources = _pad_sources(rows, config.max_length) if has_source else (None, None)
    return Prompts(tokens_BP, start_B, limit_B, np.asarray(jax.random.key_data(keys_B)), *sources)


def _pad_sources(rows: Sequence[Row], longest: int) -> tuple[np.ndarray, np.ndarray]:
    length_B = np.array([len(row.source) for row in rows], np.int32)
    source_BS = np.zeros((len(rows), min(bucket(length_B.max()), longest)), np.int32)
    for source_S, row in zip(source_BS, rows, strict=True):
        source_S[: len(row.source)] = row.source
    return source_BS, np.arange(source_BS.shape[1])[None, :] < length_B[:, None]


def bucket(length: int) -> int:
    """The next power of two, from 16 on."""
    return max(16, 1 << (int(length) - 1).bit_length())


def begin(model: Any, prompts: Prompts, room: int) -> tuple[jax.Array, Memory]:
    """Reads the prompts, and the sources if there are any, in one pass each.

    Args:
      model: `unstacked`.
      prompts: from `pad`.
      room: for how many tokens more the cache is to have slots, N.

    Returns:
      Logits of each row's first token [B, V], and what `go_on` goes on from.
    """
    B, P = prompts.tokens_BP.shape
    slots_P = jnp.arange(P)
    # Padding sees itself: a softmax over nothing would be NaN, and NaN times weight 0 still NaN.
    mask_BPP = _visible(slots_P, P, prompts.start_B) | jnp.eye(P, dtype=bool)[None]
    positions_BP = jnp.maximum(slots_P[None, :] - prompts.start_B[:, None], 0)
    memory = Memory(caches.create(model.config, B, P), _read_sources(model, prompts))
    x_BPD, memory = _read(model, prompts, memory, prompts.tokens_BP, positions_BP, jnp.int32(0), mask_BPP)
    memory = memory._replace(cache=caches.extend(memory.cache, room))
    return model.logits(x_BPD[:, -1:])[:, 0], memory


def go_on(
    model: Any, prompts: Prompts, memory: Memory, tokens_BT: jax.Array, count: jax.Array
) -> tuple[jax.Array, Memory]:
    """Reads tokens behind the prompts, the first of them the `count`th from 1; returns logits of what follows each.

    What the cache held at their slots is overwritten, and what it holds behind them is not seen.
    """
    slots_T = prompts.tokens_BP.shape[1] + count - 1 + jnp.arange(tokens_BT.shape[1])
    # Rows that ended at max_length keep step with the others, beyond the table of positions.
    positions_BT = jnp.minimum(slots_T[None, :] - prompts.start_B[:, None], model.config.max_length - 1)
    mask_BTS = _visible(slots_T, memory.cache[0].k_BSKC.shape[1], prompts.start_B)
    x_BTD, memory = _read(model, prompts, memory, tokens_BT, positions_BT, slots_T[0], mask_BTS)
    return model.logits(x_BTD), memory


def pinned(memory: Memory) -> Memory:
    """Fixes where it lies on the mesh, so that all calls are one program."""
    return jax.tree.map(lambda a: constrain(a, caches.AXES), memory)


def _read_sources(model: Any, prompts: Prompts) -> list[KeyValues] | None:
    """The keys and values of what the encoder says, once for the whole text."""
    if prompts.source_BS is None or prompts.is_source_BS is None:
        return None
    positions_BS = jnp.broadcast_to(jnp.arange(prompts.source_BS.shape[1]), prompts.source_BS.shape)
    segments_BS = prompts.is_source_BS.astype(jnp.int32)
    return model.cross(model.encode(prompts.source_BS, positions_BS, segments_BS, backend=attention.XLA))


def _read(
    model: Any,
    prompts: Prompts,
    memory: Memory,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    index: jax.Array,
    mask_BTS: jax.Array,
) -> tuple[jax.Array, Memory]:
    source = ()
    if prompts.is_source_BS is not None:
        shape = (*tokens_BT.shape, prompts.is_source_BS.shape[1])
        source = memory.cross, jnp.broadcast_to(prompts.is_source_BS[:, None, :], shape)
    x_BTD, cache = model.with_cache(tokens_BT, positions_BT, memory.cache, index, mask_BTS, *source)
    return x_BTD, memory._replace(cache=cache)


def _visible(slots_T: jax.Array, length: int, start_B: jax.Array) -> jax.Array:
    """Which of `length` slots a token in each of these slots may see, [B, T, S]; the model knows of windows."""
    slots_S = jnp.arange(length)
    before_TS = slots_T[:, None] >= slots_S[None, :]
    return before_TS[None] & (slots_S[None, None, :] >= start_B[:, None, None])
