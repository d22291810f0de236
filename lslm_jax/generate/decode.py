"""Continues texts: one pass over the prompts, then token by token with a cache, on the device.

Prompts are padded on the left, so that all rows of a batch write the cache at one index; positions count from each
row's own first token and the padding is never attended to. The host is asked only every few tokens, and only if there
is something to show or a stop string to look for.
"""

import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.batch import Array
from lslm_jax.config import GenerateConfig, ModelConfig
from lslm_jax.errors import ConfigError
from lslm_jax.generate import cache as caches
from lslm_jax.generate import sampling
from lslm_jax.generate.text import Result, Row
from lslm_jax.models.attention import KeyValues
from lslm_jax.sharding import constrain

Ids = Sequence[int] | np.ndarray

_STREAM_EVERY = 4  # tokens decoded between two looks at the text: for a reader who waits,
_STOP_EVERY = 16  # and where only stop strings are looked for


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Ids],
    settings: GenerateConfig,
    seed: int,
    first: int = 0,
) -> list[Result]:
    """Continues prompts, all at once.

    A row ends at the end of its text, at a stop string, after `settings.max_tokens` tokens, or where prompt and text
    together reach `model.max_length`. What a row draws depends on the seed and its number, not on the other rows.

    Args:
      model: a Decoder, on the mesh set by `jax.set_mesh` if it is sharded.
      tokenizer: of `data.tokenizer`; decodes, and knows bos and eos.
      prompts: token ids as `tokenizer.encode` gives them, without special ones; bos is put before each. They may
        differ in length, and an empty one is bos alone.
      settings: how to draw, and when to end.
      seed: of sampling.
      first: number of the first prompt, where a long list is worked through in parts.

    Returns:
      One result a prompt, in order.

    Raises:
      ConfigError: a prompt leaves no room for a token within `model.max_length`, or a stop string is empty.
    """
    rows = _rows(model.config, tokenizer, prompts, settings, first)
    for _ in _drive(model, tokenizer, rows, settings, seed, _STOP_EVERY if settings.stop else settings.max_tokens):
        pass
    return [row.result() for row in rows]


def stream(
    model: Any, tokenizer: Any, prompt: Ids, settings: GenerateConfig, seed: int, first: int = 0
) -> Generator[str, None, Result]:
    """Continues one prompt as `generate` does, yielding the text as it grows and returning the result.

    No part of a character or of a stop string is ever yielded; the parts together are the result's text.
    """
    rows = _rows(model.config, tokenizer, [prompt], settings, first)
    for _ in _drive(model, tokenizer, rows, settings, seed, _STREAM_EVERY):
        if part := rows[0].spell():
            yield part
    return rows[0].result()


def _rows(
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[Ids],
    settings: GenerateConfig,
    first: int,
) -> list[Row]:
    if "" in settings.stop:
        raise ConfigError("generate.stop holds an empty string, which would end every text at once")
    rows = []
    for number, ids in enumerate(prompts, first):
        prompt = [tokenizer.bos_id, *map(int, ids)]
        room = config.max_length - len(prompt)
        if room < 1:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens with bos, but model.max_length={config.max_length} "
                f"leaves room to continue at most {config.max_length - 1}"
            )
        rows.append(Row(tokenizer, number, prompt, min(settings.max_tokens, room), settings.stop))
    return rows


class _Rules(NamedTuple):
    """What the compiled functions are compiled for."""

    settings: GenerateConfig
    vocab_size: int
    eos_id: int


class _Prompts(NamedTuple):
    """A batch of prompts on the device.

    Attributes:
      tokens_BP: padded on the left.
      start_B: the slot of each row's first token; those before are padding.
      limit_B: how many tokens each row may draw.
      keys_B2: each row's key, as data.
    """

    tokens_BP: Array
    start_B: Array
    limit_B: Array
    keys_B2: Array


class _State(NamedTuple):
    """What the loop over tokens carries.

    Attributes:
      step: tokens drawn so far; the last of them is not in the cache yet.
      cache: P slots for the prompt, then N for the tokens drawn.
      ids_BN: tokens drawn.
      done_B: rows that have ended.
      seen_BV: which tokens are in each text, for the repetition penalty; or None.
    """

    step: jax.Array
    cache: list[KeyValues]
    ids_BN: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


def _drive(
    model: Any, tokenizer: Any, rows: list[Row], settings: GenerateConfig, seed: int, every: int
) -> Iterator[None]:
    """Draws tokens for the rows until all have ended, handing them over `every` so many."""
    if not rows:
        return
    # What does not change the program must not make it compile anew.
    drawing = replace(settings, prompts=(), stop=(), max_tokens=1)
    rules = _Rules(drawing, min(tokenizer.vocab_size, model.config.vocab_size), tokenizer.eos_id)
    prompts = _pad(rows, seed, model.config.max_length)
    room = min(settings.max_tokens, _bucket(max(row.limit for row in rows)))
    model = _unstacked(model)
    state, read = _prefill(model, prompts, rules, room), 0
    while True:
        step, ids_BN = jax.device_get((state.step, state.ids_BN))
        for row, ids_N in zip(rows, ids_BN[:, read:step].tolist(), strict=True):
            for id in ids_N:
                row.push(id)
        yield
        ended_B = np.array([bool(row.ended) for row in rows])
        if ended_B.all():
            return
        state, read = _decode(model, prompts, state, ended_B, np.int32(step + every), rules), int(step)


@jax.jit
def _unstacked(model: Any) -> Any:
    """The model with its layers apart, which makes the loop over tokens twice as fast."""
    return model.unstacked()


def _pad(rows: list[Row], seed: int, longest: int) -> _Prompts:
    width = min(_bucket(max(len(row.prompt) for row in rows)), longest)
    start_B = np.array([width - len(row.prompt) for row in rows], np.int32)
    tokens_BP = np.zeros((len(rows), width), np.int32)
    for tokens_P, start, row in zip(tokens_BP, start_B, rows, strict=True):
        tokens_P[start:] = row.prompt
    keys_B = sampling.row_keys(seed, [row.number for row in rows])
    limit_B = np.array([row.limit for row in rows], np.int32)
    return _Prompts(tokens_BP, start_B, limit_B, np.asarray(jax.random.key_data(keys_B)))


def _bucket(length: int) -> int:
    """The next power of two: few enough sizes that hardly any prompt compiles anything."""
    return max(16, 1 << (length - 1).bit_length())


@functools.partial(jax.jit, static_argnames=("rules", "room"))
def _prefill(model: Any, prompts: _Prompts, rules: _Rules, room: int) -> _State:
    """Reads the prompts in one pass and draws each row's first token."""
    B, P = prompts.tokens_BP.shape
    slots_P = jnp.arange(P)
    mask_BPP = _visible(slots_P, P, prompts.start_B, model.config.window)
    # Padding sees itself: a softmax over nothing would be NaN, and NaN times weight 0 still NaN.
    mask_BPP = mask_BPP | jnp.eye(P, dtype=bool)[None]
    positions_BP = jnp.maximum(slots_P[None, :] - prompts.start_B[:, None], 0)
    cache = caches.create(model.config, B, P)
    x_BPD, cache = model.with_cache(prompts.tokens_BP, positions_BP, cache, jnp.int32(0), mask_BPP)
    logits_BV = model.logits(x_BPD[:, -1:])[:, 0]
    seen_BV = None
    if rules.settings.repetition_penalty != 1.0:
        real_BP = slots_P[None, :] >= prompts.start_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], prompts.tokens_BP].max(real_BP)
    nothing = jnp.zeros((B, room), jnp.int32), jnp.zeros(B, bool)
    state = _State(jnp.int32(0), caches.extend(cache, room), *nothing, seen_BV)
    return _pinned(_draw(prompts, state, logits_BV, rules))


@functools.partial(jax.jit, static_argnames=("rules",), donate_argnames=("state",))
def _decode(
    model: Any, prompts: _Prompts, state: _State, ended_B: jax.Array, until: jax.Array, rules: _Rules
) -> _State:
    """Draws tokens until there are `until` a row or all rows have ended; `ended_B` are rows that the host ended."""
    state = state._replace(done_B=state.done_B | ended_B)
    next_state = functools.partial(_step, model, prompts, rules)
    return _pinned(jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done_B), next_state, state))


def _step(model: Any, prompts: _Prompts, rules: _Rules, state: _State) -> _State:
    """Reads the token drawn last and draws the next."""
    slot = prompts.tokens_BP.shape[1] + state.step - 1
    tokens_B1 = jax.lax.dynamic_slice_in_dim(state.ids_BN, state.step - 1, 1, axis=1)
    # Rows that ended at max_length keep step with the others, beyond the table of positions.
    positions_B1 = jnp.minimum(slot - prompts.start_B, model.config.max_length - 1)[:, None]
    mask_B1S = _visible(slot[None], state.cache[0].k_BSKC.shape[1], prompts.start_B, model.config.window)
    x_B1D, cache = model.with_cache(tokens_B1, positions_B1, state.cache, slot, mask_B1S)
    return _draw(prompts, state._replace(cache=cache), model.logits(x_B1D)[:, 0], rules)


def _visible(slots_T: jax.Array, length: int, start_B: jax.Array, window: int) -> jax.Array:
    """Which of `length` slots a token in each of these slots may see, [B, T, S]."""
    slots_S = jnp.arange(length)
    distance_TS = slots_T[:, None] - slots_S[None, :]
    near_TS = (distance_TS >= 0) & (distance_TS < window) if window else distance_TS >= 0
    return near_TS[None] & (slots_S[None, None, :] >= start_B[:, None, None])


def _draw(prompts: _Prompts, state: _State, logits_BV: jax.Array, rules: _Rules) -> _State:
    """Draws one token a row; what rows that have ended draw is never read."""
    is_token_V = jnp.arange(logits_BV.shape[-1]) < rules.vocab_size
    logits_BV = jnp.where(is_token_V[None], logits_BV, -jnp.inf)
    keys_B = sampling.step_keys(jax.random.wrap_key_data(prompts.keys_B2), state.step)
    ids_B = sampling.sample(logits_BV, keys_B, rules.settings, state.seen_BV)
    step = state.step + 1
    return _State(
        step=step,
        cache=state.cache,
        ids_BN=jax.lax.dynamic_update_slice_in_dim(state.ids_BN, ids_B[:, None], state.step, axis=1),
        done_B=state.done_B | (ids_B == rules.eos_id) | (step >= prompts.limit_B),
        seen_BV=state.seen_BV if state.seen_BV is None else state.seen_BV.at[jnp.arange(len(ids_B)), ids_B].set(True),
    )


def _pinned(state: _State) -> _State:
    """Fixes where the state lies on the mesh, so that all calls are one program and every host can read the tokens."""
    return _State(
        step=state.step,
        cache=jax.tree.map(lambda a: constrain(a, caches.AXES), state.cache),
        ids_BN=constrain(state.ids_BN, (None, None)),
        done_B=constrain(state.done_B, (None,)),
        seen_BV=state.seen_BV if state.seen_BV is None else constrain(state.seen_BV, ("batch", "vocab")),
    )
