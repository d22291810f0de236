"""Writes texts: prompts are read at once, the text is drawn or searched token by token with a cache, on the device.

A decoder continues its prompts. An encoder-decoder reads them as sources and writes their targets. The host is asked
only every few tokens, and only if there is something to show or a stop string to look for; a search knows its text at
the end only.
"""

import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lslm_jax.config import GenerateConfig, ModelConfig, validation
from lslm_jax.errors import ConfigError
from lslm_jax.generate import beam_search, constraints, prefill, prompt_lookup, sampling
from lslm_jax.generate.constraints import Text
from lslm_jax.generate.detokenize import Result, Row
from lslm_jax.generate.prefill import Memory, Prompts
from lslm_jax.parallel.sharding import constrain, platform
from lslm_jax.runtime.progress import say

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
    suffix_ids: Sequence[int] = (),
) -> list[Result]:
    """Writes a text for each prompt, all at once.

    A row ends at the end of its text, at a stop string, after `settings.max_tokens` tokens, or where what the decoder
    read and wrote reaches `model.max_length`. What a row says depends on the seed and its number, not on other rows.

    Args:
      model: a Decoder or Seq2Seq, on the mesh set by `jax.set_mesh` if it is sharded.
      tokenizer: of `data.tokenizer`; decodes, and knows bos and eos.
      prompts: token ids as `tokenizer.encode` gives them, without special ones. They may differ in length, and be
        empty. A decoder reads bos and the prompt; an encoder the prompt and eos, the prompt cut to
        `model.max_length`, and its decoder bos.
      settings: how to draw or search, and when to end.
      seed: of sampling.
      first: number of the first prompt, where a long list is worked through in parts.
      suffix_ids: what the decoder reads last, before the text, which then is one of its own and not the prompt's
        continuation: (bos,) after a source, in a decoder trained on pairs.

    Returns:
      One result a prompt, in order.

    Raises:
      ConfigError: a prompt leaves no room for a token within `model.max_length`, a stop string is empty, or there are
        several beams and settings of sampling.
    """
    rows = _rows(model.config, tokenizer, prompts, settings, first, suffix_ids)
    for _ in _drive(model, tokenizer, rows, settings, seed, _STOP_EVERY if settings.stop else settings.max_tokens):
        pass
    _report_limit(model.config, rows, settings)
    return [row.result() for row in rows]


def stream(
    model: Any,
    tokenizer: Any,
    prompt: Ids,
    settings: GenerateConfig,
    seed: int,
    first: int = 0,
    suffix_ids: Sequence[int] = (),
) -> Generator[str, None, Result]:
    """Writes one text as `generate` does, yielding it as it grows and returning the result.

    No part of a character or of a stop string is ever yielded; the parts together are the result's text. A text that
    is searched with beams comes in one part.
    """
    rows = _rows(model.config, tokenizer, [prompt], settings, first, suffix_ids)
    for _ in _drive(model, tokenizer, rows, settings, seed, _STREAM_EVERY):
        if part := rows[0].spell():
            yield part
    _report_limit(model.config, rows, settings)
    return rows[0].result()


def _report_limit(config: ModelConfig, rows: list[Row], settings: GenerateConfig) -> None:
    """Prints how many texts have fewer tokens than `generate.max_tokens` because the model takes no more."""
    short = sum(row.ended == "length" and row.limit < settings.max_tokens for row in rows)
    if short:
        which = "the text ends" if len(rows) == 1 else f"{short} of {len(rows)} texts end"
        say(
            f"{which} before generate.max_tokens={settings.max_tokens}, where "
            f"model.max_length={config.max_length} is reached"
        )


def _rows(
    config: ModelConfig,
    tokenizer: Any,
    prompts: Sequence[Ids],
    settings: GenerateConfig,
    first: int,
    suffix_ids: Sequence[int],
) -> list[Row]:
    _check(settings)
    has_source, suffix = config.family == "encoder_decoder", list(map(int, suffix_ids))
    rows = []
    for number, ids in enumerate(prompts, first):
        ids = list(map(int, ids))
        if has_source and len(ids) >= config.max_length:
            read = config.max_length - 1
            say(f"prompt {number} has {len(ids)} tokens: the first {read} are read (model.max_length)")
        source = [*ids[: config.max_length - 1], tokenizer.eos_id] if has_source else []
        begun = [] if has_source else ids
        prompt = [*([tokenizer.bos_id] if settings.bos or not begun else []), *begun, *suffix]
        room = config.max_length - len(prompt)
        if room < 1:
            raise ConfigError(
                f"prompt {number} has {len(prompt)} tokens with bos, but model.max_length={config.max_length} "
                f"leaves room to continue at most {config.max_length - 1}"
            )
        limit = min(settings.max_tokens, room)
        rows.append(
            Row(tokenizer, number, prompt, limit, settings, source=source, context=suffix if suffix else prompt)
        )
    return rows


def _check(settings: GenerateConfig) -> None:
    for problem in validation.generate_problems(settings):
        raise ConfigError(problem)


class _Rules(NamedTuple):
    """What the compiled functions are compiled for."""

    settings: GenerateConfig
    vocab_size: int
    eos_ids: tuple[int, ...]
    last_id: int | None = None  # of the last token that the limit leaves room for
    model_vocab_size: int = 0


class _State(NamedTuple):
    """What the loop over tokens carries.

    Attributes:
      step: tokens drawn so far; the last of them is not in the cache yet.
      memory: what was read.
      ids_BN: tokens drawn.
      done_B: rows that have ended.
      seen_BV: which tokens are in each text, for the repetition penalty; or None.
    """

    step: jax.Array
    memory: Memory
    ids_BN: jax.Array
    done_B: jax.Array
    seen_BV: jax.Array | None


def _drive(
    model: Any, tokenizer: Any, rows: list[Row], settings: GenerateConfig, seed: int, every: int
) -> Iterator[None]:
    """Writes the rows' texts until all have ended, handing tokens over `every` so many, or at the end of a search."""
    if not rows:
        return
    # What does not change the program must not make it compile anew.
    penalty = settings.length_penalty if settings.beams > 1 else 0.0
    drawing = replace(settings, prompts=(), stop=(), max_tokens=1, length_penalty=penalty)
    if settings.beams == 1:
        drawing = replace(drawing, early_stopping="exact", renormalize=True)
    eos_ids = (*([tokenizer.eos_id] if settings.eos else []), *settings.stop_ids)
    last = tokenizer.eos_id if settings.forced_eos else None
    rules = _Rules(drawing, min(tokenizer.vocab_size, model.config.vocab_size), eos_ids, last, model.config.vocab_size)
    # For one row, XLA's GPU compiler makes sums of the products with matrices and writes all products out: the same row
    # twice takes 30 % less time (Llama 1B on an H200).
    twice = len(rows) == 1 and settings.beams == 1 and not settings.lookup and platform() == "gpu"
    read_rows = rows * 2 if twice else rows
    prompts = prefill.pad(read_rows, seed, model.config)
    room = min(settings.max_tokens, prefill.bucket(max(row.limit for row in rows)))
    model = _unstacked(model)
    if settings.beams > 1:
        for row, ids_N, length, score in zip(rows, *jax.device_get(_search(model, prompts, rules, room)), strict=True):
            _push(row, ids_N[:length])
            row.score = float(score)
        yield
        return
    state, read = _prefill(model, prompts, rules, room), 0
    while True:
        step, ids_BN = jax.device_get((state.step, state.ids_BN))
        for row, ids_N in zip(rows, ids_BN[: len(rows)], strict=True):
            _push(row, ids_N[read:step])
        yield
        ended_B = np.array([bool(row.ended) for row in read_rows])
        if ended_B.all():
            return
        state, read = _decode(model, prompts, state, ended_B, np.int32(step + every), rules), int(step)


def _push(row: Row, ids_N: np.ndarray) -> None:
    for id in ids_N.tolist():
        row.push(id)


@jax.jit
def _unstacked(model: Any) -> Any:
    """The model with its layers apart, which makes the loop over tokens twice as fast."""
    return model.unstacked()


@functools.partial(jax.jit, static_argnames=("rules", "room"))
def _prefill(model: Any, prompts: Prompts, rules: _Rules, room: int) -> _State:
    """Reads the prompts in one pass and draws each row's first token."""
    B, P = prompts.tokens_BP.shape
    room += rules.settings.lookup  # guesses may go beyond the last token
    logits_BV, memory = prefill.begin(model, prompts, room)
    seen_BV = None
    if rules.settings.repetition_penalty != 1.0:
        real_BP = jnp.arange(P)[None, :] >= prompts.start_B[:, None]
        seen_BV = jnp.zeros(logits_BV.shape, bool).at[jnp.arange(B)[:, None], prompts.tokens_BP].max(real_BP)
    state = _State(jnp.int32(0), memory, jnp.zeros((B, room), jnp.int32), jnp.zeros(B, bool), seen_BV)
    return _pinned(_draw(prompts, state, logits_BV[:, None], jnp.zeros((B, 0), jnp.int32), rules))


@functools.partial(jax.jit, static_argnames=("rules",), donate_argnames=("state",))
def _decode(model: Any, prompts: Prompts, state: _State, ended_B: jax.Array, until: jax.Array, rules: _Rules) -> _State:
    """Draws tokens until there are `until` a row or all rows have ended; `ended_B` are rows that the host ended."""
    state = state._replace(done_B=state.done_B | ended_B)
    next_state = functools.partial(_step, model, prompts, rules)
    return _pinned(jax.lax.while_loop(lambda s: (s.step < until) & ~jnp.all(s.done_B), next_state, state))


def _step(model: Any, prompts: Prompts, rules: _Rules, state: _State) -> _State:
    """Reads the token drawn last, and guesses at those to come, and draws what follows as far as they were right."""
    last_B1 = jax.lax.dynamic_slice_in_dim(state.ids_BN, state.step - 1, 1, axis=1)
    guesses_BK = jnp.zeros((len(last_B1), 0), jnp.int32)
    if rules.settings.lookup:
        parts = prompts.source_BS, prompts.tokens_BP, state.ids_BN
        text_BL = jnp.concatenate([part for part in parts if part is not None], axis=1)
        end = text_BL.shape[1] - state.ids_BN.shape[1] + state.step
        guesses_BK = prompt_lookup.guess(text_BL, end, rules.settings.lookup)
    tokens_BT = jnp.concatenate([last_B1, guesses_BK], axis=1)
    logits_BTV, memory = prefill.go_on(model, prompts, state.memory, tokens_BT, state.step)
    return _draw(prompts, state._replace(memory=memory), logits_BTV, guesses_BK, rules)


def _draw(prompts: Prompts, state: _State, logits_BTV: jax.Array, guesses_BK: jax.Array, rules: _Rules) -> _State:
    """Draws a token a row, and another for each guess that was right; what rows that have ended draw is never read.

    All rows go on by as many tokens as the one whose guesses were wrong first. Each token is drawn with the key of its
    own step, whether it was guessed or not: guesses change how long a text takes, not what it says, unless two tokens
    are as likely to within rounding, which differs between products of one row and of several.
    """
    rows_B, eos_ids = jnp.arange(len(state.done_B)), jnp.array(rules.eos_ids, jnp.int32)
    keys_B = jax.random.wrap_key_data(prompts.keys_B2)
    ids_BN, done_B, seen_BV = state.ids_BN, state.done_B, state.seen_BV
    step, right = state.step, jnp.bool(True)  # whether all before was guessed: if not, nothing here counts
    for t in range(logits_BTV.shape[1]):
        text_BL = jnp.concatenate([jnp.asarray(prompts.tokens_BP), ids_BN], axis=1)
        text = Text(text_BL, prompts.start_B, prompts.tokens_BP.shape[1] + state.step + t)
        count = state.step + t + 1
        ids_B = sampling.sample(
            _last_only(_tokens_only(logits_BTV[:, t], text, count, rules), count, prompts.limit_B, rules),
            sampling.step_keys(keys_B, state.step + t),
            rules.settings,
            seen_BV,
        )
        ids_BN = jax.lax.dynamic_update_slice_in_dim(ids_BN, ids_B[:, None], state.step + t, axis=1)
        ended_B = jnp.isin(ids_B, eos_ids) | (state.step + t + 1 >= prompts.limit_B)
        done_B |= right & ended_B
        if seen_BV is not None:
            seen_BV = seen_BV.at[rows_B, ids_B].max(right)
        step += right
        if t < guesses_BK.shape[1]:
            right &= jnp.all(done_B | (ids_B == guesses_BK[:, t]))
    return _State(step, state.memory, ids_BN, done_B, seen_BV)


def _tokens_only(logits_BV: jax.Array, text: Text, count: jax.Array, rules: _Rules) -> jax.Array:
    """The logits, -inf for ids that are no tokens, as the vocabulary's padding, and for those that may not follow."""
    is_token_V = jnp.arange(logits_BV.shape[-1]) < rules.vocab_size
    forbidden_BV = constraints.forbidden(text, count, rules.settings, rules.eos_ids, logits_BV.shape[-1])
    return jnp.where(is_token_V[None] & ~forbidden_BV, logits_BV, -jnp.inf)


def _last_only(scores_BV: jax.Array, count: jax.Array, limit_B: jax.Array, rules: _Rules) -> jax.Array:
    """Scores of the token that is the `count`th of a text; at its limit, of the forced end alone."""
    if rules.last_id is None:
        return scores_BV
    ids_V = jnp.arange(scores_BV.shape[-1])
    forced_BV = jnp.where((ids_V == rules.last_id)[None], jnp.zeros_like(scores_BV), -jnp.inf)
    return jnp.where((count >= limit_B)[:, None], forced_BV, scores_BV)


def _search_scores(logits_BV: jax.Array, text: Text, count: jax.Array, limit_B: jax.Array, rules: _Rules) -> jax.Array:
    """Scores of what the `count`th token may be, as `beam.search` takes them."""
    settings, V = rules.settings, logits_BV.shape[-1]
    if settings.early_stopping == "exact":
        return _last_only(_tokens_only(logits_BV, text, count, rules), count, limit_B, rules)
    # transformers takes logarithms of probabilities first, over all rows of the output layer.
    logits_BV = jnp.where(jnp.arange(V)[None] < rules.model_vocab_size, logits_BV.astype(jnp.float32), -jnp.inf)
    scores_BV = jax.nn.log_softmax(logits_BV)
    if settings.repetition_penalty != 1.0:
        scores_BV = sampling.penalize(scores_BV, constraints.seen(text, V), settings.repetition_penalty)
    scores_BV = _tokens_only(scores_BV, text, count, rules)
    scores_BV = jax.nn.log_softmax(scores_BV) if settings.renormalize else scores_BV
    return _last_only(scores_BV, count, limit_B, rules)


def _pinned(state: _State) -> _State:
    """Fixes where the state lies on the mesh, so that all calls are one program and every host can read the tokens."""
    return _State(
        step=state.step,
        memory=prefill.pinned(state.memory),
        ids_BN=constrain(state.ids_BN, (None, None)),
        done_B=constrain(state.done_B, (None,)),
        seen_BV=state.seen_BV if state.seen_BV is None else constrain(state.seen_BV, ("batch", "vocab")),
    )


@functools.partial(jax.jit, static_argnames=("rules", "room"))
def _search(model: Any, prompts: Prompts, rules: _Rules, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads the prompts and searches with beams: each row's best tokens [B, N], their number [B] and score [B]."""
    B, W = len(prompts.limit_B), rules.settings.beams
    logits_BV, memory = prefill.begin(model, prompts, room)
    # To the model beams are rows.
    prompts_of_beams, cross = jax.tree.map(lambda a: jnp.repeat(a, W, axis=0), (prompts, memory.cross))
    P, limit_B = prompts.tokens_BP.shape[1], jnp.asarray(prompts.limit_B)
    text_BL = jnp.pad(jnp.asarray(prompts.tokens_BP), ((0, 0), (0, room)))

    def step(cache: Any, tokens_BW: jax.Array, count: jax.Array) -> tuple[jax.Array, Any]:
        caches, text_BL = jax.tree.map(lambda a: a.reshape(B * W, *a.shape[2:]), cache)
        tokens_B1, end = tokens_BW.reshape(-1, 1), P + count
        text_BL = jax.lax.dynamic_update_slice_in_dim(text_BL, tokens_B1, end - 1, axis=1)
        logits_BTV, memory = prefill.go_on(model, prompts_of_beams, Memory(caches, cross), tokens_B1, count)
        text = Text(text_BL, prompts_of_beams.start_B, end)
        scores_BV = _search_scores(logits_BTV[:, 0], text, count + 1, prompts_of_beams.limit_B, rules)
        return jax.tree.map(lambda a: a.reshape(B, W, *a.shape[1:]), (scores_BV, (memory.cache, text_BL)))

    found = beam_search.search(
        step,
        _search_scores(logits_BV, Text(text_BL, prompts.start_B, jnp.int32(P)), jnp.int32(1), limit_B, rules),
        (memory.cache, text_BL),
        limit_B,
        beams=W,
        room=room,
        eos_ids=rules.eos_ids,
        length_penalty=rules.settings.length_penalty,
        early_stopping=rules.settings.early_stopping,
    )
    ids_BN, length_B, score_B = (a[:, 0] for a in found)
    # Every host can read what lies whole on every device.
    return constrain(ids_BN, (None, None)), constrain(length_B, (None,)), constrain(score_B, (None,))
