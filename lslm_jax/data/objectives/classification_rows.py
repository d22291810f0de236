"""One example a row, read whole: a text, or two, for a class, a number, a tag of each word, or an answer's place.

A row reads bos a eos, or bos a eos b eos with type 0 up to the first eos and type 1 after it. RoBERTa has two eos
between the texts, both of type 0.
"""

import numpy as np

from lslm_jax.config import Config
from lslm_jax.data.batch import Batch
from lslm_jax.data.example_packing import cut
from lslm_jax.data.objectives.causal_lm import read
from lslm_jax.data.row_dataset import Rows
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.special_tokens import Special
from lslm_jax.errors import ConfigError

_MAX_QUESTION = 64  # tokens; what is longer is cut
_MIN_LEN = 5  # bos a eos b eos


class _Texts(Rows):
    """Rows of one or two texts each."""

    def __init__(self, shards: Shards, config: Config, special: Special, texts: int):
        super().__init__(shards)
        self.cells, self._texts, self._special = config.data.seq_len, texts, special
        if self.cells < _MIN_LEN:
            objective = f"task.objective={config.task.objective}"
            raise ConfigError(f"data.seq_len={self.cells} is too short for {objective}: use {_MIN_LEN} or more")
        self._between = special.separators if texts == 2 else 1  # eos behind the first text
        self._room = self.cells - texts - self._between  # without bos, and an eos after each

    def max_segments(self) -> int:
        return 1

    def _lengths_of(self, examples: np.ndarray) -> np.ndarray:
        """Tokens of each field of the examples, int64 [B, F]."""
        document = examples[:, None] * self.shards.fields + np.arange(self.shards.fields)
        return self.shards.starts[document + 1] - self.shards.starts[document]

    def _lay(self, starts_BF: np.ndarray, lengths_BF: np.ndarray) -> Batch:
        """Rows of texts that begin at these places of the split; targets are left out."""
        place_T, row_B = np.arange(self.cells), np.arange(len(starts_BF))
        tokens_BT = np.zeros((len(row_B), self.cells), np.int32)
        types_BT = np.zeros_like(tokens_BT)
        tokens_BT[:, 0] = self._special.bos_id
        ends_B = np.ones_like(row_B)
        for text, (start_B, length_B) in enumerate(zip(starts_BF.T, lengths_BF.T, strict=True)):
            within_BT = place_T - ends_B[:, None]
            inside_BT = (within_BT >= 0) & (within_BT < length_B[:, None])
            tokens_BT[inside_BT] = read(self.shards, (start_B[:, None] + within_BT)[inside_BT])
            types_BT[(within_BT >= 0) & (within_BT <= length_B[:, None])] = text
            ends_B = ends_B + length_B + 1
            tokens_BT[row_B, ends_B - 1] = self._special.eos_id
            if text == 0 and self._between == 2:
                tokens_BT[row_B, ends_B] = self._special.eos_id
                ends_B = ends_B + 1
        return Batch(
            tokens_BT=tokens_BT,
            targets_BT=None,
            weights_BT=None,
            segments_BT=(place_T < ends_B[:, None]).astype(np.int32),
            types_BT=types_BT,
        )


class _Examples(_Texts):
    """An example a row."""

    def __init__(self, shards: Shards, config: Config, special: Special, texts: int):
        super().__init__(shards, config, special, texts)
        self.num_rows = shards.num_examples
        lengths = self._cut(np.diff(shards.starts).reshape(-1, shards.fields)[:, :texts])
        self.num_slots = int(lengths.sum()) + (texts + self._between) * self.num_rows

    def examples(self, rows: np.ndarray) -> np.ndarray:
        return rows

    def remark(self) -> str:
        return self._cut_remark({"texts": len(self._cut_examples())}, f"data.seq_len={self.cells}")

    def _cut_examples(self) -> np.ndarray:
        """Numbers of the examples that are longer than a row."""
        whole_NF = np.diff(self.shards.starts).reshape(-1, self.shards.fields)[:, : self._texts]
        return np.flatnonzero((self._cut(whole_NF) < whole_NF).any(axis=1))

    def _read(self, rows: np.ndarray) -> Batch:
        starts_BF = self.shards.starts[rows[:, None] * self.shards.fields + np.arange(self._texts)]
        return self._lay(starts_BF, self._cut(self._lengths_of(rows)[:, : self._texts]))

    def _cut(self, lengths_BF: np.ndarray) -> np.ndarray:
        if self._texts == 1:
            return np.minimum(lengths_BF, self._room)
        return np.stack(cut(lengths_BF[:, 0], lengths_BF[:, 1], self._room), axis=1)


class LabelRows(_Examples):
    """A class or a number for a text, or for two. An example whose label is not known counts for nothing."""

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards, config, special, shards.fields)
        self._classes = config.task.objective == "classification"

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        labels = self.shards.numbers[rows, :1]
        known = labels >= 0 if self._classes else np.isfinite(labels)
        return self._read(rows)._replace(
            targets_BT=np.where(known, labels, 0).astype(np.int32 if self._classes else np.float32),
            weights_BT=known.astype(np.float32),
        )


class TagRows(_Examples):
    """A tag for the first token of each word. On disk 0 stands for no tag, tag t for t + 1."""

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards, config, special, texts=1)

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        batch = self._read(rows)
        place_T, length_B = np.arange(self.cells) - 1, self._cut(self._lengths_of(rows)[:, :1])
        inside_BT = (place_T >= 0) & (place_T < length_B)
        start_B1 = self.shards.starts[2 * rows + 1][:, None]
        tags_BT = np.zeros_like(batch.tokens_BT)
        tags_BT[inside_BT] = read(self.shards, (start_B1 + place_T)[inside_BT])
        return batch._replace(targets_BT=np.maximum(tags_BT - 1, 0), weights_BT=(tags_BT > 0).astype(np.float32))

    def remark(self) -> str:
        examples = self._cut_examples()
        cuts = {"texts": len(examples), "tags in them": sum(map(self._num_lost, examples))}
        return self._cut_remark(cuts, f"data.seq_len={self.cells}")

    def _num_lost(self, example: int) -> int:
        """Tags of a text beyond the row."""
        start, end = self.shards.starts[2 * example + 1 : 2 * example + 3]
        return int(np.count_nonzero(self.shards.take(np.arange(start + self._room, end))))

    def tags(self, example: int) -> np.ndarray:
        """All tags of a text by number, also those beyond the row, int [words]."""
        start, end = self.shards.starts[2 * example + 1 : 2 * example + 3]
        marks = self.shards.take(np.arange(start, end))
        return marks[marks > 0] - 1


class AnswerRows(_Texts):
    """A question, and a window over the context that may hold its answer; the target is where it begins and ends.

    The windows over a context too long for a row move on by a fixed number of tokens, so that they overlap. Where a
    window does not hold the whole answer, or there is none, the target is the first place of the row, twice.
    """

    def __init__(self, shards: Shards, config: Config, special: Special):
        super().__init__(shards, config, special, texts=2)
        self._stride = config.task.stride
        questions, contexts = np.diff(shards.starts).reshape(-1, 2).T
        question, room, stride = self._sizes(questions)
        counts = 1 + np.maximum(-(-(contexts - room) // stride), 0)
        self._ends = np.cumsum(counts)
        self.num_rows = int(self._ends[-1])
        # All windows but the last of each context are full; that one has what is left.
        shown = (counts - 1) * room + contexts - (counts - 1) * stride
        self.num_slots = int((shown + counts * (question + 2 + self._between)).sum())

    def batch(self, rows: np.ndarray, keys: np.ndarray) -> Batch:
        examples, windows = self._locate(rows)
        lengths_BF = self._lengths_of(examples)
        question, room, _ = self._sizes(lengths_BF[:, 0])
        shown = np.minimum(lengths_BF[:, 1] - windows, room)
        starts_BF = self.shards.starts[2 * examples[:, None] + np.arange(2)]
        starts_BF[:, 1] += windows
        first, last = self.shards.numbers[examples].astype(np.int64).T - windows
        inside = (first >= 0) & (last < shown)
        answer = np.stack([first, last], axis=1) + (question + 1 + self._between)[:, None]
        return self._lay(starts_BF, np.stack([question, shown], axis=1))._replace(
            targets_BT=np.where(inside[:, None], answer, 0).astype(np.int32),
            weights_BT=np.ones((len(rows), 2), np.float32),
        )

    def remark(self) -> str:
        questions, contexts = np.diff(self.shards.starts).reshape(-1, 2).T
        question, room, stride = self._sizes(questions)
        first, last = self.shards.numbers.astype(np.int64).T
        windows = np.maximum(-(-(contexts - room) // stride), 0)  # behind the first one
        begin = np.minimum(np.maximum(first, 0) // stride, windows) * stride  # of the window that reaches farthest
        unseen = (first >= 0) & (last >= begin + room)
        cuts = {"questions": int((question < questions).sum()), "answers": int(unseen.sum())}
        limit = f"min({_MAX_QUESTION}, half a row), or what data.seq_len={self.cells} leaves of the context,"
        return self._cut_remark(cuts, limit)

    def examples(self, rows: np.ndarray) -> np.ndarray:
        return self._locate(rows)[0]

    def windows(self, rows: np.ndarray) -> np.ndarray:
        return self._locate(rows)[1]

    def _sizes(self, questions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens of the question and of the context that a row shows, and by which its windows move on."""
        question = np.minimum(questions, min(_MAX_QUESTION, self._room // 2))
        room = self._room - question
        return question, room, np.minimum(self._stride, room)

    def _locate(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Example and first token of the window of each row."""
        examples = np.searchsorted(self._ends, rows, "right")
        number = rows - np.where(examples > 0, self._ends[examples - 1], 0)
        _, _, stride = self._sizes(self._lengths_of(examples)[:, 0])
        return examples, number * stride
