"""(seed, step) -> batch. The state of the input is the step: no shuffle buffer, no iterator to save.

Position p of a run is row p of all the batches laid end to end. It names a source, through a fixed pattern of the
mixture; a place in that source's endless sequence of epochs; and so, through the epoch's permutation, a row. A host
takes its slice of the global batch and gathers nothing else, hence order and content do not depend on the hosts.
"""

import itertools
from collections.abc import Iterator

import numpy as np
from etils import epath

from lslm_jax import atomic
from lslm_jax.batch import Batch
from lslm_jax.config import Config
from lslm_jax.data import objectives, order, packing
from lslm_jax.data.shards import Shards
from lslm_jax.errors import ConfigError, DataError, InputMissing

_SYNTHETIC_DOCUMENTS = 8  # at most, in a row of the synthetic source
_PACKERS = {"stream": packing.Stream, "bins": packing.Bins, "pad": packing.Pad}


class Rows:
    """One prepared split, as rows.

    Attributes:
      shards: its documents.
      packer: which of them make a row; `packer.fill` is the share of cells that are not padding.
      num_rows: rows in the split.
    """

    def __init__(self, shards: Shards, config: Config, bos_id: int, eos_id: int):
        if not shards.num_tokens:
            raise InputMissing(f"{shards.directory} holds no tokens")
        self.shards = shards
        self.packer = _PACKERS[config.data.packing](shards.starts, objectives.CAUSAL_EXTRA, config.data.seq_len)
        self.num_rows = self.packer.num_rows
        self._bos_id, self._eos_id, self._mask = bos_id, eos_id, config.data.mask_documents

    def batch(self, rows: np.ndarray) -> Batch:
        """The rows of these numbers, int64 [B].

        Raises:
          DataError: a token is outside the vocabulary.
        """
        return objectives.causal(self.packer.layout(rows), self.shards, self._bos_id, self._eos_id, self._mask)

    def num_bytes(self, rows: np.ndarray) -> int:
        """Bytes of text that these rows, int64 [B], predict.

        A document's bytes are spread evenly over its slots and rounded so that all rows add up to all bytes exactly.
        """
        pieces = self.packer.pieces(rows)
        size, slots = self.shards.num_bytes[pieces.document], self.packer.slots(pieces.document)
        return int(((pieces.offset + pieces.length) * size // slots - pieces.offset * size // slots).sum())

    def max_segments(self) -> int:
        """Greatest number of segments in any row: 1 where documents are not kept apart."""
        return self.packer.max_segments() if self._mask else 1


class TrainInput:
    """Endless shuffled rows of one source or a mixture.

    Attributes:
      num_rows: rows of all sources together.
    """

    def __init__(self, sources: list[Rows], weights: list[float], config: Config, host: int, hosts: int):
        self._sources = sources
        self._seed = config.seed
        self._batch_size = config.train.batch_size
        self._slice = _host_slice(config, host, hosts)
        self._pattern, self._before = order.mixture_pattern(weights)
        self.num_rows = sum(source.num_rows for source in sources)

    def batch(self, step: int) -> Batch:
        """This host's rows of the batch of a step."""
        source, local = self._locate(step * self._batch_size + self._slice)
        num_rows = np.array([rows.num_rows for rows in self._sources])[source]
        epoch, place = np.divmod(local, num_rows)
        row = np.empty_like(place)
        for i, rows in enumerate(self._sources):
            mine = source == i
            row[mine] = order.permute(place[mine], rows.num_rows, order.combine(self._seed, i, epoch[mine]))
        return _gather(self._sources, source, row)

    def epoch(self, step: int) -> float:
        """Passes over the data before a step: rows drawn to rows there are."""
        return step * self._batch_size / self.num_rows

    def max_segments(self) -> int:
        """Greatest number of segments in any row."""
        return max(source.max_segments() for source in self._sources)

    @property
    def fill(self) -> float:
        """Share of the cells of all rows that are not padding."""
        slots = sum(source.packer.num_slots for source in self._sources)
        return slots / (self.num_rows * self._sources[0].packer.seq_len)

    def _locate(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Source of each position, and how many earlier positions had the same one."""
        repeat, at = np.divmod(position, order.PATTERN)
        source = self._pattern[at]
        return source, repeat * self._before[-1, source] + self._before[at, source]


class EvalInput:
    """Every row once, in order: the sources of a mixture one after another.

    Attributes:
      num_rows: rows that are evaluated.
      num_batches: global batches they make; the last is filled up with rows of weight 0.
    """

    def __init__(self, sources: list[Rows], config: Config, host: int, hosts: int):
        self._sources = sources
        self._ends = np.cumsum([source.num_rows for source in sources])
        self._batch_size = config.train.batch_size
        self._slice = _host_slice(config, host, hosts)
        self.num_batches = -(-int(self._ends[-1]) // self._batch_size)
        if config.eval.batches:
            self.num_batches = min(self.num_batches, config.eval.batches)
        self.num_rows = min(int(self._ends[-1]), self.num_batches * self._batch_size)

    def batch(self, step: int) -> Batch:
        """This host's rows of batch `step`, in [0, num_batches)."""
        rows = step * self._batch_size + self._slice
        batch = _gather(self._sources, *self._locate(rows[rows < self.num_rows]))
        missing = len(rows) - len(batch.tokens_BT)
        return Batch(*(None if part is None else np.pad(part, ((0, missing), (0, 0))) for part in batch))

    def num_bytes(self) -> int:
        """Bytes of text that all evaluated rows, of all hosts, predict."""
        total = 0
        for first in range(0, self.num_rows, order.PATTERN):
            source, row = self._locate(np.arange(first, min(first + order.PATTERN, self.num_rows)))
            total += sum(rows.num_bytes(row[source == i]) for i, rows in enumerate(self._sources))
        return total

    def documents(self) -> Iterator[np.ndarray]:
        """The token ids of each held-out document, without special ones."""
        for shards in (source.shards for source in self._sources):
            for first, end in itertools.pairwise(shards.starts):
                yield shards.take(np.arange(first, end))

    def max_segments(self) -> int:
        """Greatest number of segments in any row."""
        return max(source.max_segments() for source in self._sources)

    def _locate(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        source = np.searchsorted(self._ends, row, "right")
        return source, row - np.concatenate([[0], self._ends])[source]


class SyntheticInput:
    """Random ids for benchmarks, in up to eight documents a row where documents are kept apart.

    Attributes:
      num_rows: 0, as there is no end to them.
      fill: 1, as there is no padding.
    """

    num_rows = 0
    fill = 1.0

    def __init__(self, config: Config, vocab_size: int, host: int, hosts: int):
        self._config = config
        self._vocab_size = vocab_size
        self._slice = _host_slice(config, host, hosts)

    def batch(self, step: int) -> Batch:
        """This host's rows of the batch of a step."""
        seq_len = self._config.data.seq_len
        row = (step * self._config.train.batch_size + self._slice)[:, None]
        ids = order.combine(self._config.seed, row, np.arange(seq_len + 1)) % np.uint64(self._vocab_size)
        ids = ids.astype(np.int32)
        positions, segments = self._documents(row) if self._config.data.mask_documents else (None, None)
        weights = np.ones((len(row), seq_len), np.float32)
        return Batch(ids[:, :-1].copy(), ids[:, 1:].copy(), weights, positions, segments)

    def epoch(self, step: int) -> float:
        """0: nothing is seen twice."""
        return 0.0

    def max_segments(self) -> int:
        """Greatest number of segments in any row."""
        return _SYNTHETIC_DOCUMENTS if self._config.data.mask_documents else 1

    def _documents(self, row: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions and segments of rows cut at random places."""
        seq_len = self._config.data.seq_len
        # Numbers beyond the ids' own, so that cuts and ids are independent.
        cuts = order.combine(self._config.seed, row, seq_len + np.arange(1, _SYNTHETIC_DOCUMENTS)) % np.uint64(seq_len)
        begins = np.zeros((len(row), seq_len), bool)
        np.put_along_axis(begins, cuts.astype(np.int64), True, axis=1)
        begins[:, 0] = True
        place = np.arange(seq_len, dtype=np.int32)
        positions = place - np.maximum.accumulate(np.where(begins, place, 0), axis=1)
        return positions, np.cumsum(begins, axis=1, dtype=np.int32)


def open_train(
    config: Config, directory: epath.Path, vocab_size: int, host: int = 0, hosts: int = 1
) -> TrainInput | SyntheticInput:
    """Opens the training rows of a prepared directory.

    Args:
      config: of the run.
      directory: what prepare wrote; not looked at where data.source is synthetic.
      vocab_size: of the model.
      host: number of this process, whose slice of each batch is made.
      hosts: number of processes.

    Raises:
      ConfigError: settings that do not go together, or a model with too small a vocabulary.
      InputMissing: nothing was prepared, or less than one row.
      DataError: files are missing, truncated or inconsistent.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return SyntheticInput(config, vocab_size, host, hosts)
    names, weights = _sources(config)
    sources = _open(config, [epath.Path(directory) / name / "train" for name in names], directory, vocab_size)
    for source in sources:
        slots, seq_len = source.packer.num_slots, config.data.seq_len
        if slots < seq_len:
            where = source.shards.directory
            raise InputMissing(f"{where} holds {slots} slots, fewer than one row of {seq_len} (data.seq_len)")
    return TrainInput(sources, weights, config, host, hosts)


def open_eval(
    config: Config, directory: epath.Path, vocab_size: int, host: int = 0, hosts: int = 1
) -> EvalInput | None:
    """Opens the validation rows of a prepared directory; None where no documents were held out.

    Args and errors are those of `open_train`, but a set may be shorter than one row.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return None
    names, _ = _sources(config)
    splits = [epath.Path(directory) / name / "valid" for name in names]
    splits = [split for split in splits if split.exists()]
    return EvalInput(_open(config, splits, directory, vocab_size), config, host, hosts) if splits else None


def _sources(config: Config) -> tuple[list[str], list[float]]:
    """Directories below the prepared one, and weights: one source lies in the prepared directory itself."""
    if not config.data.mixture:
        return [""], [1.0]
    return [source.name for source in config.data.mixture], [source.weight for source in config.data.mixture]


def _open(config: Config, splits: list[epath.Path], directory: epath.Path, vocab_size: int) -> list[Rows]:
    bos_id, eos_id = _special_ids(epath.Path(directory) / "manifest.json")
    sources = [Rows(Shards.open(split), config, bos_id, eos_id) for split in splits]
    for source in sources:
        size = max(source.shards.vocab_size, bos_id + 1, eos_id + 1)
        if size > vocab_size:
            raise ConfigError(f"model.vocab_size {vocab_size} is too small: {source.shards.directory} needs {size}")
    return sources


def _special_ids(path: epath.Path) -> tuple[int, int]:
    if not atomic.exists(path):
        raise InputMissing(f"{path.parent} holds no prepared data (no {path.name}): run prepare")
    try:
        tokenizer = atomic.read_json(path)["tokenizer"]
        return tokenizer["bos_id"], tokenizer["eos_id"]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} does not name the tokenizer's bos_id and eos_id: run prepare again") from error


def _host_slice(config: Config, host: int, hosts: int) -> np.ndarray:
    """Numbers of this host's rows within the global batch."""
    size, rest = divmod(config.train.batch_size, hosts)
    if rest:
        raise ConfigError(f"train.batch_size {config.train.batch_size} is not a multiple of the {hosts} hosts")
    return np.arange(host * size, (host + 1) * size)


def _gather(sources: list[Rows], source: np.ndarray, row: np.ndarray) -> Batch:
    """One batch from rows of several sources, in the order given."""
    if len(sources) == 1:
        return sources[0].batch(row)
    parts = [rows.batch(row[source == i]) for i, rows in enumerate(sources)]
    back = np.argsort(np.argsort(source, kind="stable"))
    return Batch(*(None if field[0] is None else np.concatenate(field)[back] for field in zip(*parts, strict=True)))
