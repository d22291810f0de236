"""What every vocabulary can do, whatever kind it is of."""

import abc
import contextlib
import functools
import hashlib
import itertools
import os
import re
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from etils import epath

from lslm_jax.errors import ConfigError
from lslm_jax.runtime import atomic_io

_FACTS = ("kind", "sha256", "vocab_size", "pad_id", "bos_id", "eos_id", "mask_id", "sentinel_ids", "separators")
WELL_KNOWN = {
    "bos": ("<s>", "<bos>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]", "[CLS]", "<|endoftext|>"),
    "eos": ("</s>", "<eos>", "<|end_of_text|>", "<|endoftext|>", "[EOS]", "[SEP]"),
    "pad": ("<pad>", "[PAD]", "<|pad|>", "<|padding|>", "<|finetune_right_pad_id|>"),
    "mask": ("[MASK]", "<mask>"),
}
SPACE_MARK = "\u2581"  # how SentencePiece writes a space
BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


class Spans(NamedTuple):
    """A text's tokens and their places in it.

    Attributes:
      ids: int32 [n], without special ids.
      begins: int64 [n], the first character that each token spells.
      ends: int64 [n], the character after the last. Tokens that share a character (its bytes, say) each span all of it;
        one that spells nothing (a blank that the vocabulary puts before a text) is empty.
    """

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


class Tokenizer(abc.ABC):
    """A vocabulary.

    Attributes:
      kind: which of the four.
      vocab_size: ids are below it.
      pad_id, bos_id, eos_id: special ids; where the vocabulary lacks one, another stands in for it.
      prefix_id: what a text's first token is predicted from: bos, or eos where the vocabulary says that it has no bos.
      mask_id: of [MASK] or <mask>; None where the vocabulary has neither.
      sentinel_ids: of <extra_id_0>, <extra_id_1> and so on (T5); () where it has none.
      adds_bos: whether a text that is read begins with bos, by the vocabulary's own rules.
      separators: eos tokens between the two texts of a pair, 1 or 2 (RoBERTa).
      settings: tokenizer_config.json of the directory that it came from, or {}.
      role_ids: ids of roles that other files than tokenizer_config.json give.
      content: of the file that defines it.
      sha256: of that.
    """

    kind: Literal["sentencepiece", "bytes", "huggingface", "marian"]
    adds_bos: bool = True
    separators: int = 1
    settings: Mapping[str, Any] = MappingProxyType({})
    role_ids: Mapping[str, int] = MappingProxyType({})
    _file: str

    def __init__(
        self,
        content: bytes,
        vocab_size: int,
        pad_id: int | None,
        bos_id: int | None,
        eos_id: int | None,
        mask_id: int | None = None,
        sentinel_ids: tuple[int, ...] = (),
    ):
        self.content = content
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.vocab_size = vocab_size
        known = [id for id in (bos_id, eos_id) if id is not None]
        if not known:
            raise ConfigError("no token begins or ends a text (such as <s>, </s> or <|endoftext|>)")
        self.bos_id, self.eos_id = known[0], known[-1]
        self.prefix_id = self.bos_id
        self.pad_id = self.eos_id if pad_id is None else pad_id
        self.mask_id, self.sentinel_ids = mask_id, sentinel_ids

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [n], without special ids."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text, int32 [n], without special ids."""

    def encode_targets(self, texts: list[str]) -> list[np.ndarray]:
        """Ids of each text as a pair's target; the same unless the vocabulary cuts the two languages differently."""
        return self.encode_batch(texts)

    @abc.abstractmethod
    def encode_with_offsets(self, text: str) -> Spans:
        """The ids that `encode` gives, and which characters of the text each of them spells."""

    @property
    @abc.abstractmethod
    def special_tokens(self) -> Mapping[str, int]:
        """How special tokens are written, and their ids: what no text may spell, but a chat template does."""

    def encode_framed(self, text: str) -> Spans:
        """The ids of a text in which special tokens are what they spell, as a chat template writes them; and places."""
        known = self.special_tokens
        parts, found, place = re.split(f"({any_of(known)})", text), [], 0
        for i, part in enumerate(parts):
            if i % 2:
                spans = Spans(np.array([known[part]], np.int32), np.zeros(1, np.int64), np.array([len(part)]))
            else:
                spans = self.encode_with_offsets(part)
            found.append(Spans(spans.ids, spans.begins + place, spans.ends + place))
            place += len(part)
        return joined(found)

    @abc.abstractmethod
    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text that ids spell; special ids are dropped, and bytes that are not UTF-8 become U+FFFD."""

    @abc.abstractmethod
    def piece(self, id: int) -> str:
        """How the vocabulary writes one id, for people to read."""

    @abc.abstractmethod
    def _spelling(self, piece: str) -> str:
        """A piece as it stands in text: with blanks where a word begins or ends, whatever the vocabulary writes."""

    def word_starts(self, ids: np.ndarray) -> np.ndarray:
        """Which tokens of a text begin a word, bool [n]; the first always does.

        Words are what blanks separate, and blanks belong to the word after them. WordPiece keeps no blanks: there each
        piece that does not continue another is a word. Of bytes, only ASCII blanks count.

        Args:
          ids: int [n], of consecutive tokens of one text; what is not in the vocabulary counts as a word.
        """
        opens, closes, blank = self._edges[:, np.minimum(ids, self.vocab_size)]
        starts = np.ones(len(ids), bool)
        starts[1:] = (opens[1:] | closes[:-1]) & ~blank[:-1]
        return starts

    @functools.cached_property
    def _edges(self) -> np.ndarray:
        """Whether each id begins with a blank, ends with one, is nothing else; bool [3, vocab_size + 1]."""
        texts = [self._text(id) for id in range(self.vocab_size)]
        edges = [(text[:1].isspace(), text[-1:].isspace(), text.isspace()) for text in texts]
        return np.array([*edges, (True, True, False)]).T

    def _text(self, id: int) -> str:
        piece = self.piece(id) or ""  # a Hugging Face vocabulary may have gaps
        byte = BYTE_PIECE.fullmatch(piece)
        return bytes([int(byte[1], 16)]).decode(errors="replace") if byte else self._spelling(piece)

    def facts(self) -> dict[str, Any]:
        """What others need to know of it, as JSON values."""
        return {key: getattr(self, key) for key in _FACTS}

    def roles(self) -> dict[str, str]:
        """Which of its tokens has which role, in the words of tokenizer_config.json."""
        ids = {f"{role}_token": getattr(self, f"{role}_id") for role in WELL_KNOWN}
        return {role: self.piece(id) for role, id in ids.items() if id is not None}

    def save(self, directory: epath.Path) -> str:
        """Writes the file that `load` reads, and those beside it, and returns its name.

        Raises:
          SaveError: the directory cannot be written.
        """
        if self.settings or self.kind == "huggingface":
            atomic_io.write_json(directory / "tokenizer_config.json", dict(self.settings) or self.roles())
        if self.role_ids:
            atomic_io.write_json(directory / "special_ids.json", dict(self.role_ids))
        atomic_io.write(directory / self._file, self.content)
        return self._file


def any_of(tokens: Iterable[str]) -> str:
    """A pattern that matches any of the tokens, the longest first."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))


def joined(parts: Sequence[Spans]) -> Spans:
    """Tokens of consecutive parts of a text as those of one."""
    return Spans(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def sentinels(find: Callable[[str], int | None]) -> tuple[int, ...]:
    """Ids of T5's sentinels, in the order of their use, in a vocabulary whose ids `find` tells by their names."""
    found = (find(f"<extra_id_{i}>") for i in itertools.count())
    return tuple(id for id in itertools.takewhile(lambda id: id is not None, found) if id is not None)


_stderr = threading.RLock()


@contextlib.contextmanager
def without_panic_text() -> Iterator[None]:
    """Withholds what Rust writes on stderr when it panics, several lines: the exception has the reason."""
    with _stderr, tempfile.TemporaryFile() as written:
        try:
            stderr = os.dup(2)
        except OSError:  # closed, as in some services: nothing to withhold
            yield
            return
        os.dup2(written.fileno(), 2)
        panicked = False
        try:
            yield
        except BaseException as error:
            panicked = is_panic(error)
            raise
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            if not panicked and (text := written.read()):
                os.write(2, text)


def is_panic(error: BaseException) -> bool:
    """True for a panic of Rust, which is no Exception."""
    return type(error).__name__ == "PanicException"


@functools.cache
def tokenizers() -> Any:
    """The package, or a ConfigError that says how to install it."""
    try:
        import tokenizers as package
    except ImportError as error:
        raise ConfigError("tokenizer.kind=huggingface needs tokenizers: pip install tokenizers") from error
    return package


def letters_apart(text: str, tokens: Iterable[str]) -> list[str]:
    """A text in parts: those of its places that read like one of the tokens letter by letter, the rest whole."""
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return [piece for i, part in enumerate(parts) for piece in (part if i % 2 else [part]) if piece]


def spans_of(found: Iterable[tuple[int, int, int]]) -> Spans:
    """Spans of (id, begin, end) triples."""
    ids, begins, ends = np.array(list(found), np.int64).reshape(-1, 3).T
    return Spans(ids.astype(np.int32), begins, ends)
