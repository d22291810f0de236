"""Whether a model that was read says what it says elsewhere: in transformers, or in a file that somebody else made.

A reference is a safetensors file that holds `input_ids` [B, T] and `logits`: [B, T, V] of models that say tokens or
tags, [B, V] of those that say a class or a number, [B, T, 2] (start and end) of those that answer questions. It may
also hold

- `attention_mask` [B, T], 1 for tokens and 0 for padding after them; without it no row is padded;
- `token_type_ids` [B, T]; without it all tokens are of type 0;
- `hidden_states.0` to `hidden_states.L` [B, T, D], as transformers gives them: what the first block reads, and what
  each block says, the last one behind the final norm where there is one.

Of an encoder-decoder, `input_ids` and its mask are the source's; then there is also `decoder_input_ids` [B, T], and the
hidden states are called `encoder_hidden_states.0` and so on, and `decoder_hidden_states.0`.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from lslm_jax.config import ModelConfig
from lslm_jax.convert.pretrained import Pretrained
from lslm_jax.convert.safetensors_io import read_header
from lslm_jax.data.batch import Batch
from lslm_jax.errors import DataError, InputMissing
from lslm_jax.models import attention
from lslm_jax.models.embedding import places

FINAL = " + final norm"  # of the place behind the last layer's
_SHORT, _LONG = 128, 1024  # tokens of the longest row, unless windows are seen to end only in a longer one
_BEYOND = 32  # tokens by which it is longer than a window
_STACKS = {"decoder": ("",), "encoder": ("",), "encoder_decoder": ("encoder ", "decoder ")}


class Reference(NamedTuple):
    """What another program says of some rows.

    Attributes:
      name: of the program or the file.
      batch: the rows; targets are empty, weights tell tokens from padding.
      logits: float32, one of the shapes above.
      hidden: by place, as `layer 3` or `encoder embeddings`, hidden states [B, T, D]; {} where it does not tell.
    """

    name: str
    batch: Batch
    logits: np.ndarray
    hidden: Mapping[str, np.ndarray]


class Comparison(NamedTuple):
    """How far two programs differ; padding does not count.

    Attributes:
      name: of the other one.
      sequences, tokens: how much was compared.
      max_difference, mean_difference: of logits, absolute. None where the head is not theirs, and so the next two.
      kl: mean of KL(theirs || ours), nats.
      top1: share of predictions whose likeliest outcome is the same.
      layers: by place, ||ours - theirs|| / ||theirs|| of the hidden state of the token where that is largest.
      parts_at: the first place where that exceeds the tolerance; None: nowhere.
    """

    name: str
    sequences: int
    tokens: int
    max_difference: float | None
    mean_difference: float | None
    kl: float | None
    top1: float | None
    layers: dict[str, float]
    parts_at: str | None

    def holds(self, tolerance: float) -> bool:
        """Whether logits differ by the tolerance at most; where there are none to compare, hidden states."""
        if self.max_difference is None:
            return self.parts_at is None
        return self.max_difference <= tolerance  # which a NaN is not

    def table(self) -> str:
        """All of it, for people to read."""
        width = max(map(len, [*self.layers, "logits"]))
        lines = [f"compared with {self.name} on {self.sequences} rows of {self.tokens} tokens, relative differences:"]
        lines += [f"  {place:<{width}}  {difference:.1e}" for place, difference in self.layers.items()]
        if self.max_difference is not None:
            figures = f"{self.max_difference:.1e} at most, {self.mean_difference:.1e} on average (absolute)"
            lines.append(f"  {'logits':<{width}}  {figures}, KL {self.kl:.1e}, top-1 {self.top1:.2%}")
        return "\n".join(lines)


def compare(model: Any, objective: str, reference: Reference, tolerance: float, *, heads: bool = True) -> Comparison:
    """Compares a model's outputs and hidden states with a reference, in float32.

    Args:
      model: whose config says float32.
      objective: of its head.
      reference: to compare with.
      tolerance: of hidden states, relative.
      heads: whether the head is the reference's own.

    Raises:
      DataError: the reference is of another model.
    """
    batch = reference.batch
    with jax.default_matmul_precision("highest"), np.errstate(invalid="ignore", over="ignore"):  # NaN is an answer too
        layers = dict(_layers(model, reference))
        # Rows of padding behind the vocabulary are nobody's.
        logits = np.asarray(jax.jit(_logits)(model, batch))[..., : model.config.vocab_size] if heads else None
        largest, mean, kl, top1 = (None,) * 4 if logits is None else _figures(logits, reference, objective)
    parts_at = next((place for place, difference in layers.items() if not difference <= tolerance), None)
    tokens = int((batch.weights_BT > 0).sum())
    return Comparison(reference.name, len(batch.tokens_BT), tokens, largest, mean, kl, top1, layers, parts_at)


def _logits(model: Any, batch: Batch) -> jax.Array:
    return model.logits(model.features(batch, backend=attention.XLA))


def _figures(logits: np.ndarray, reference: Reference, objective: str) -> tuple[float, float, float, float]:
    theirs = reference.logits if reference.logits.ndim == 3 else reference.logits[:, None]
    if logits.shape != theirs.shape:
        raise DataError(f"{reference.name}: logits are {list(theirs.shape)} where the model's are {list(logits.shape)}")
    counted_BT = reference.batch.weights_BT > 0 if theirs.shape[1] > 1 else np.ones(theirs.shape[:2], bool)
    sums, entries, rows = np.zeros(3), 0, 0
    largest = 0.0
    for ours_TV, theirs_TV, counted_T in zip(logits, theirs, counted_BT, strict=True):
        a_NV, b_NV = ours_TV[counted_T].astype(np.float64), theirs_TV[counted_T].astype(np.float64)
        if objective == "qa":  # which tells one position from all others, not one label
            a_NV, b_NV = a_NV.T, b_NV.T
        difference_NV = np.abs(a_NV - b_NV)
        largest = np.maximum(largest, difference_NV.max())  # which keeps a NaN
        p_NV, log_p_NV, log_q_NV = np.exp(_log_softmax(b_NV)), _log_softmax(b_NV), _log_softmax(a_NV)
        kl = np.sum(p_NV * (log_p_NV - log_q_NV))
        sums += [difference_NV.sum(), kl, np.sum(a_NV.argmax(-1) == b_NV.argmax(-1))]
        entries, rows = entries + difference_NV.size, rows + len(a_NV)
    return float(largest), sums[0] / entries, max(sums[1] / rows, 0.0), sums[2] / rows


def _log_softmax(logits_NV: np.ndarray) -> np.ndarray:
    shifted_NV = logits_NV - logits_NV.max(-1, keepdims=True)
    return shifted_NV - np.log(np.exp(shifted_NV).sum(-1, keepdims=True))


# Hidden states.


def _layers(model: Any, reference: Reference) -> Iterator[tuple[str, float]]:
    """The largest relative difference at each place that the reference tells of."""
    batch = reference.batch
    for place, x_BTD in hidden_states(model, batch) if reference.hidden else ():
        if place not in reference.hidden:
            continue
        theirs_BTD = reference.hidden[place]
        real_BT = batch.source_segments_BS if place.startswith("encoder ") else batch.segments_BT
        counted_BT = np.asarray(real_BT) > 0
        if x_BTD.shape != theirs_BTD.shape:
            shapes = f"{list(theirs_BTD.shape)} where the model's is {list(x_BTD.shape)}"
            raise DataError(f"{reference.name}: the hidden state of {place} is {shapes}")
        ours_ND, theirs_ND = np.asarray(x_BTD, np.float64)[counted_BT], theirs_BTD[counted_BT].astype(np.float64)
        lengths_N = np.maximum(np.linalg.norm(theirs_ND, axis=-1), np.finfo(np.float32).tiny)
        yield place, float(np.max(np.linalg.norm(ours_ND - theirs_ND, axis=-1) / lengths_N))


def hidden_states(model: Any, batch: Batch) -> Iterator[tuple[str, jax.Array]]:
    """What the first block of each stack reads, what each block says, what the final norm makes of it: [B, T, D].

    Layers are read one by one: those alike are compiled once, and all but two of their outputs are gone again.
    """
    if model.config.family != "encoder_decoder":
        rows = batch.tokens_BT, batch.segments_BT, batch.types_BT
        yield from _states("", model, model, rows, None)
        return
    memory_BSD = None
    for place, memory_BSD in _states(
        "encoder ", model, model.encoder, (batch.source_BS, batch.source_segments_BS, None), None
    ):
        yield place, memory_BSD
    rows = batch.tokens_BT, batch.segments_BT, None
    yield from _states("decoder ", model, model.decoder, rows, (memory_BSD, batch.source_segments_BS))


def _states(stack: str, model: Any, tower: Any, rows: tuple[Any, Any, Any], source: Any) -> Iterator[Any]:
    tokens_BT, segments_BT, types_BT = rows
    positions_BT = places(tokens_BT, None)
    x_BTD = jax.jit(type(model).look_up)(model, tokens_BT, positions_BT, types_BT)
    yield f"{stack}embeddings", x_BTD
    for i in range(tower.config.num_layers):
        x_BTD = _read(tower.layer(i), x_BTD, positions_BT, segments_BT, source)
        yield f"{stack}layer {i}", x_BTD
    if tower.norm is not None:
        yield f"{stack}layer {tower.config.num_layers - 1}{FINAL}", tower.norm(x_BTD)


@jax.jit
def _read(layer: Any, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array, source: Any) -> jax.Array:
    memory_BSD, segments_BS = source or (None, None)
    given = {"memory_BSD": memory_BSD, "source_segments_BS": segments_BS}
    return layer.read(x_BTD, positions_BT, segments_BT, backend=attention.XLA, key=None, **given)[0]


# Rows to compare on.


def sample_rows(source: Pretrained, seed: int) -> Batch:
    """Random rows of several lengths, the same for the same seed, padded with what the directory pads with.

    The longest reaches beyond a window, if that takes no more than 1024 tokens.
    """
    model, pad_id = source.model, source.settings.get("pad_token_id")
    pad_id = pad_id if isinstance(pad_id, int) and 0 <= pad_id < model.vocab_size else 0
    wanted = model.window + _BEYOND if 0 < model.window <= _LONG - _BEYOND else 0
    longest = min(max(wanted, _SHORT), model.max_length)
    rng = np.random.default_rng(seed)
    tokens_BT, segments_BT = _draw(rng, longest, model.vocab_size, pad_id)
    if model.family == "encoder_decoder":
        # Other lengths than those of the source.
        written_BT, written_segments_BT = _draw(rng, max(longest * 3 // 4, 1), model.vocab_size, pad_id)
        source_rows = {"source_BS": tokens_BT, "source_segments_BS": segments_BT}
        return _batch(written_BT, written_segments_BT, **source_rows)
    half_BT = np.arange(longest)[None] >= segments_BT.sum(-1, keepdims=True) // 2
    types_BT = np.where(half_BT & (segments_BT > 0), 1, 0).astype(np.int32) if model.token_types > 1 else None
    return _batch(tokens_BT, segments_BT, types_BT=types_BT)


def _draw(rng: np.random.Generator, longest: int, size: int, pad_id: int) -> tuple[np.ndarray, np.ndarray]:
    lengths_B = np.array([longest, max(longest * 2 // 3, 1), max(longest // 4, 1), min(5, longest)])
    tokens_BT = rng.integers(0, size - 1, (len(lengths_B), longest), dtype=np.int32)
    tokens_BT += tokens_BT >= pad_id  # any token but that one: RoBERTa counts positions by it
    segments_BT = (np.arange(longest)[None] < lengths_B[:, None]).astype(np.int32)
    return np.where(segments_BT > 0, tokens_BT, pad_id).astype(np.int32), segments_BT


def _batch(tokens_BT: np.ndarray, segments_BT: np.ndarray, **given: Any) -> Batch:
    weights_BT = segments_BT.astype(np.float32)
    return Batch(tokens_BT, np.zeros_like(tokens_BT), weights_BT, segments_BT=segments_BT, **given)


# A file.


def read_reference(path: epath.Path, model: ModelConfig) -> Reference:
    """Reads a file of the form above.

    Raises:
      InputMissing: there is none.
      DataError: it is damaged, lacks an array, or an array has another shape or holds what this model does not know.
    """
    if not path.is_file():
        raise InputMissing(f"reference {path} does not exist")
    tensors = read_header(path)
    is_pair = model.family == "encoder_decoder"
    for name in ("input_ids", "logits", *(("decoder_input_ids",) if is_pair else ())):
        if name not in tensors:
            raise DataError(f"{path} has no {name}")
    whole = lambda name, size: _whole_numbers(path, name, tensors[name].read(), size)
    tokens_BT = whole("input_ids", model.vocab_size)
    given = {"attention_mask": 2, "token_type_ids": max(model.token_types, 1)}
    given = {name: whole(name, size) for name, size in given.items() if name in tensors}
    for name, array in given.items():
        if array.shape != tokens_BT.shape:
            raise DataError(f"{path}: {name} is {list(array.shape)} where input_ids is {list(tokens_BT.shape)}")
    segments_BT = given["attention_mask"] if "attention_mask" in given else np.ones_like(tokens_BT)
    if np.any(np.diff(segments_BT, axis=1) > 0) or not segments_BT.any(axis=1).all():
        raise DataError(f"{path}: attention_mask has padding before tokens; put it behind them")
    if is_pair:
        written_BT = whole("decoder_input_ids", model.vocab_size)
        source_rows = {"source_BS": tokens_BT, "source_segments_BS": segments_BT}
        batch = _batch(written_BT, np.ones_like(written_BT), **source_rows)
    else:
        types_BT = given["token_type_ids"] if "token_type_ids" in given and model.token_types else None
        batch = _batch(tokens_BT, segments_BT, types_BT=types_BT)
    for array in (batch.tokens_BT, tokens_BT):
        if array.shape[1] > model.max_length:
            raise DataError(f"{path} has rows of {array.shape[1]} tokens, the model reads {model.max_length} at most")
    numbers = lambda name: _numbers(path, name, tensors[name].read())
    hidden = {place: numbers(name) for place, name in _hidden_names(model) if name in tensors}
    return Reference(str(path), batch, numbers("logits"), hidden)


def _numbers(path: epath.Path, name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype.kind in "iub" or array.ndim not in (2, 3):
        raise DataError(f"{path}: {name} is {array.dtype}{list(array.shape)}, not numbers by row")
    if not np.isfinite(array := array.astype(np.float32)).all():
        raise DataError(f"{path}: {name} holds numbers that are not finite")
    return array


def _whole_numbers(path: epath.Path, name: str, array: np.ndarray, size: int) -> np.ndarray:
    if array.dtype.kind not in "iub" or array.ndim != 2 or not array.size:
        raise DataError(f"{path}: {name} is {array.dtype}{list(array.shape)}, not rows of whole numbers [B, T]")
    if array.min() < 0 or array.max() >= size:
        raise DataError(f"{path}: {name} holds {int(array.max())}, this model knows 0 to {size - 1}")
    return array.astype(np.int32)


def _hidden_names(model: ModelConfig) -> Iterator[tuple[str, str]]:
    """Places and what their hidden states are called in a file."""
    for stack in _STACKS[model.family]:
        layers = model.num_decoder_layers if stack == "decoder " else model.num_layers
        prefix = f"{stack.strip()}_hidden_states" if stack else "hidden_states"
        yield f"{stack}embeddings", f"{prefix}.0"
        for i in range(layers):
            is_final = i == layers - 1 and model.norm_place != "after"
            yield f"{stack}layer {i}{FINAL * is_final}", f"{prefix}.{i + 1}"
