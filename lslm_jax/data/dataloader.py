"""(seed, step) -> batch. The state of the input is the step: no shuffle buffer, no iterator to save.

Position p of a run is row p of all the batches laid end to end. It names a source, through a fixed pattern of the
mixture; a place in that source's endless sequence of epochs; and so, through the epoch's permutation, a row. What a row
draws at random depends on seed, source, epoch and row alone. A process takes its rows of the global batch and gathers
nothing else, hence order and content do not depend on the processes.
"""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from etils import epath

from lslm_jax.config import Config
from lslm_jax.data import index_shuffle
from lslm_jax.data.batch import Batch
from lslm_jax.data.objectives import classification_rows, seq2seq
from lslm_jax.data.objectives.chat import ChatRows
from lslm_jax.data.row_dataset import CausalRows, DocumentRows, MaskedRows, Rows, SpanRows
from lslm_jax.data.shards import Shards
from lslm_jax.data.synthetic_data import SyntheticInput
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.data.tokenizers.special_tokens import Special, special_ids
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.progress import say

_ROWS = {
    "causal": CausalRows,
    "span_corruption": SpanRows,
    "classification": classification_rows.LabelRows,
    "regression": classification_rows.LabelRows,
    "tagging": classification_rows.TagRows,
    "qa": classification_rows.AnswerRows,
}
# Texts that an example may have, and its numbers; one text and no number where nothing is said.
_SHAPES = {
    "chat": ((2,), 2),
    "seq2seq": ((2,), 0),
    "classification": ((1, 2), 1),
    "regression": ((1, 2), 1),
    "tagging": ((2,), 0),
    "qa": ((2,), 2),
}


class TrainInput:
    """Endless shuffled rows of one source or a mixture.

    Attributes:
      num_rows: rows of all sources together.
      slots: which rows of a batch this process takes.
      batch_size: rows of a batch, of all processes.
      offset: position of the first row of batch 0; not 0 after the batch size has changed.
    """

    def __init__(self, sources: list[Rows], weights: list[float], config: Config, rows: np.ndarray | None = None):
        self._sources = sources
        self._seed = config.seed
        self.batch_size, self.offset = config.train.batch_size, 0
        self.slots = np.arange(self.batch_size) if rows is None else rows
        self._pattern, self._before = index_shuffle.mixture_pattern(weights)
        self.num_rows = sum(source.num_rows for source in sources)

    def batch(self, step: int) -> Batch:
        """This process's rows of the batch of a step."""
        source, epoch, row = self.rows(step).T
        return _gather(self._sources, source, row, index_shuffle.combine(self._seed, source, epoch, row))

    def rows(self, step: int, slots: np.ndarray | None = None, steps: int = 1) -> np.ndarray:
        """Source, epoch and number, int64 [rows, 3], of this process's rows of batches, or of other slots of them."""
        source, local = self._locate(
            index_shuffle.positions(step, steps, self.batch_size, self.slots if slots is None else slots, self.offset)
        )
        sizes = self.sizes()
        epoch, place = np.divmod(local, np.array(sizes)[source])
        row = np.empty_like(place)
        for i, size in enumerate(sizes):
            mine = source == i
            row[mine] = index_shuffle.permute(place[mine], size, index_shuffle.combine(self._seed, i, epoch[mine]))
        return np.stack([source, epoch, row], axis=1)

    def sizes(self) -> list[int]:
        """Rows of each source."""
        return [source.num_rows for source in self._sources]

    def epoch(self, step: int) -> float:
        """Passes over the data before a step: rows drawn to rows there are."""
        return (self.offset + step * self.batch_size) / self.num_rows

    def max_segments(self) -> int:
        """Greatest number of segments in any row, of the target and, where there is one, of the source."""
        return max(source.max_segments() for source in self._sources)

    def remarks(self) -> list[str]:
        """What a user should know of the examples, a line a source that there is something to say of."""
        return [remark for source in self._sources if (remark := source.remark())]

    @property
    def fill(self) -> float:
        """Share of the cells of all rows that are not padding."""
        slots = sum(source.num_slots for source in self._sources)
        return slots / sum(source.num_rows * source.cells for source in self._sources)

    def _locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and how many earlier positions had the same one."""
        repeat, at = np.divmod(position, index_shuffle.PATTERN)
        source = self._pattern[at]
        return source, repeat * self._before[-1, source] + self._before[at, source]


class EvalInput:
    """Every row of one source once, in order. What is drawn at random is the same in every evaluation of every run.

    Prints how many examples are cut, where there are any.

    Attributes:
      shards: the examples.
      num_rows: rows that are evaluated.
      num_batches: global batches they make; the last is filled up with rows of weight 0.
    """

    def __init__(self, source: Rows, config: Config, rows: np.ndarray | None = None):
        self.shards = source.shards
        self._source = source
        self._batch_size = config.train.batch_size
        self._slice = np.arange(self._batch_size) if rows is None else rows
        self.num_batches = -(-source.num_rows // self._batch_size)
        if config.eval.batches:
            self.num_batches = min(self.num_batches, config.eval.batches)
        self.num_rows = min(source.num_rows, self.num_batches * self._batch_size)
        if remark := source.remark():
            say(remark)

    def batch(self, step: int) -> Batch:
        """This process's rows of batch `step`, in [0, num_batches)."""
        numbers = step * self._batch_size + self._slice
        mine = numbers[numbers < self.num_rows]
        batch = self._source.batch(mine, index_shuffle.combine(0, mine))
        missing = len(numbers) - len(mine)
        return Batch(*(None if part is None else np.pad(part, ((0, missing), (0, 0))) for part in batch))

    def examples(self, step: int) -> np.ndarray:
        """The example behind each row of the global batch, the first where a row shows several; -1 in filling rows."""
        return self._of_rows(step, self._source.examples)

    def example_of_cells(self, step: int) -> np.ndarray:
        """The example that each target cell of the global batch belongs to, [B, T]; -1 in padding and filling rows."""
        numbers = step * self._batch_size + np.arange(self._batch_size)
        found = self._source.example_of_cells(numbers[numbers < self.num_rows])
        return np.pad(found, ((0, self._batch_size - len(found)), (0, 0)), constant_values=-1)

    def num_examples(self) -> int:
        """Examples that are evaluated, whole or in part; all of them unless `eval.batches` is set."""
        if self.num_rows == self._source.num_rows:
            return self._source.num_examples
        found = np.unique(np.concatenate([self.example_of_cells(step).reshape(-1) for step in range(self.num_batches)]))
        return int((found >= 0).sum())

    def windows(self, step: int) -> np.ndarray:
        """The first token of the context that each row of the global batch shows; -1 in filling rows."""
        return self._of_rows(step, self._source.windows)

    def num_bytes(self) -> int:
        """Bytes of text that all evaluated rows, of all processes, predict."""
        firsts = range(0, self.num_rows, index_shuffle.PATTERN)
        numbers = (np.arange(first, min(first + index_shuffle.PATTERN, self.num_rows)) for first in firsts)
        return sum(self._source.num_bytes(part) for part in numbers)

    def all_tags(self) -> Iterator[np.ndarray]:
        """The tags of each evaluated example, also of words beyond its row, int [words]."""
        assert isinstance(self._source, classification_rows.TagRows)
        return map(self._source.tags, range(self.num_rows))

    def documents(self) -> Iterator[np.ndarray]:
        """The token ids of each held-out document, without special ones."""
        for first, end in itertools.pairwise(self.shards.starts):
            yield self.shards.take(np.arange(first, end))

    def max_segments(self) -> int:
        """Greatest number of segments in any row, of the target and, where there is one, of the source."""
        return self._source.max_segments()

    def _of_rows(self, step: int, tell: Any) -> np.ndarray:
        numbers = step * self._batch_size + np.arange(self._batch_size)
        found = np.full(self._batch_size, -1)
        real = numbers < self.num_rows
        found[real] = tell(numbers[real])
        return found


def open_train(
    config: Config, directory: epath.Path, vocab_size: int, rows: np.ndarray | None = None
) -> TrainInput | SyntheticInput:
    """Opens the training rows of a prepared directory.

    Args:
      config: of the run.
      directory: what prepare wrote; not looked at where data.source is synthetic.
      vocab_size: of the model.
      rows: numbers of the rows of each global batch that are made here, from `sharding.local_rows`. None: all.

    Raises:
      ConfigError: settings that do not go together, or a model with too small a vocabulary.
      InputMissing: nothing was prepared, or less than one row.
      DataError: files are missing, truncated or inconsistent.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return SyntheticInput(config, vocab_size, rows)
    weights = [source.weight for source in config.data.mixture] or [1.0]
    sources = list(_open(config, epath.Path(directory), "train", vocab_size).values())
    for source in sources:
        if isinstance(source, DocumentRows) and source.packer.num_slots < source.packer.seq_len:
            slots, seq_len = source.packer.num_slots, source.packer.seq_len
            where = source.shards.directory
            raise InputMissing(f"{where} holds {slots} slots, fewer than one row of {seq_len} (data.seq_len)")
    return TrainInput(sources, weights, config, rows)


def open_eval(
    config: Config,
    directory: epath.Path,
    vocab_size: int,
    rows: np.ndarray | None = None,
    split: str = "valid",
) -> dict[str, EvalInput]:
    """Opens the held-out rows of a prepared directory: by name of their source, "" for the only one; {} for none.

    Args and errors are those of `open_train`, but a set may be shorter than one row. `split` is `valid` or `test`.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return {}
    sources = _open(config, epath.Path(directory), split, vocab_size)
    return {name: EvalInput(source, config, rows) for name, source in sources.items()}


def _open(config: Config, directory: epath.Path, split: str, vocab_size: int) -> dict[str, Rows]:
    """The rows of each source that has such a split; one that is alone lies in the prepared directory itself."""
    path = directory / "manifest.json"
    # Only spans cannot do without sentinels: for all else, a model that was not trained with any need not have them.
    limit = 0 if config.task.objective == "span_corruption" else vocab_size
    words, special = _tokenizer(path, config.model.family, limit)
    found = {}
    for name in [source.name for source in config.data.mixture] or [""]:
        if split != "train" and not (directory / name / split).exists():
            continue
        shards = Shards.open(directory / name / split)
        _check_examples(shards, config)
        found[name] = make_rows(shards, config, special, directory / words["file"] if config.task.whole_words else None)
        if (size := max(shards.vocab_size, special.size)) > vocab_size:
            raise ConfigError(f"model.vocab_size {vocab_size} is too small: {shards.directory} needs {size}")
    return found


def make_rows(shards: Shards, config: Config, special: Special, words: epath.Path | None = None) -> Rows:
    """A split as the rows of the config's objective; `words` is the tokenizer where whole words are masked."""
    objective = config.task.objective
    if objective == "masked":
        return MaskedRows(shards, config, special, load_tokenizer(words).word_starts if words else None)
    if objective == "seq2seq":
        of_family = seq2seq.EncodedPairs if config.model.family == "encoder_decoder" else seq2seq.DecodedPairs
        return of_family(shards, config, special)
    if config.data.is_chat:
        return ChatRows(shards, config)
    return _ROWS[objective](shards, config, special)


def _check_examples(shards: Shards, config: Config) -> None:
    """Whether the examples were prepared for such an objective."""
    objective = config.task.objective
    kind = "chat" if config.data.is_chat else objective
    fields, numbers = _SHAPES[kind] if kind in _SHAPES else ((1,), 0)
    if shards.fields not in fields or shards.numbers.shape[1] != numbers:
        wanted = "data.example=chat" if config.data.is_chat else f"task.objective={objective}"
        raise ConfigError(
            f"{shards.directory} was not prepared for {wanted}: its examples have {shards.fields} "
            f"text(s) and {shards.numbers.shape[1]} number(s); choose another data.dir"
        )


def _tokenizer(path: epath.Path, family: str, limit: int) -> tuple[dict[str, Any], Special]:
    """The entry of that name in a manifest, and the ids it gives the model."""
    if not atomic_io.exists(path):
        raise InputMissing(f"{path.parent} holds no prepared data (no {path.name}): run prepare")
    try:
        entry = atomic_io.read_json(path)["tokenizer"]
        return entry, special_ids(entry, family, limit)
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} does not name the tokenizer's bos_id and eos_id: run prepare again") from error


def _gather(sources: list[Rows], source: np.ndarray, row: np.ndarray, keys: np.ndarray) -> Batch:
    """One batch from rows of several sources, in the order given."""
    if len(sources) == 1:
        return sources[0].batch(row, keys)
    parts = [rows.batch(row[source == i], keys[source == i]) for i, rows in enumerate(sources)]
    back = np.argsort(np.argsort(source, kind="stable"))
    return Batch(*(None if field[0] is None else np.concatenate(field)[back] for field in zip(*parts, strict=True)))
