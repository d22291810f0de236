"""Text to ids and back: SentencePiece, bytes, or a Hugging Face tokenizer.json.

Ids never include special ones unless a caller adds them, and no text can spell one: text is data.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lslm_jax.data.tokenizers import hf_classes
from lslm_jax.data.tokenizers.base import (
    WELL_KNOWN,
    Spans,
    Tokenizer,
    any_of,
    is_panic,
    joined,
    sentinels,
    tokenizers,
    without_panic_text,
)
from lslm_jax.data.tokenizers.hf_metadata import CONFIG, ENCODER_KEYS, Beside, from_word_pieces, with_added
from lslm_jax.data.tokenizers.hf_metadata import read as read_beside
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime import atomic_io

_BYTES_FILE = "bytes.json"
_WORD_PIECES = "vocab.txt"
_FORMATS = {".json": "tokenizer.json", ".txt": "vocab.txt of word pieces", ".gguf": "GGUF file with a vocabulary"}
_MARIAN = ("source.spm", "marian.json")  # as others have it, and as `Tokenizer.save` writes it
_BYTES = {"kind": "bytes", "pad_id": 0, "bos_id": 1, "eos_id": 2, "first_byte": 3}
SPACE_MARK = "\u2581"  # how SentencePiece writes a space
_MAX_SIZE = 1 << 24  # ids; a file of a few bytes can name larger ones, for which there is no memory
_BYTE_LEVEL = str.maketrans("\u0120\u010a\u0109\u010d", " \n\t\r")  # how byte-level BPE (GPT-2) writes blanks


class Bytes(Tokenizer):
    """One token a UTF-8 byte."""

    kind = "bytes"
    _file = _BYTES_FILE

    def __init__(self):
        first = _BYTES["first_byte"]
        ids = (_BYTES["pad_id"], _BYTES["bos_id"], _BYTES["eos_id"])
        super().__init__(json.dumps(_BYTES).encode(), first + 256, *ids)
        self._first = first

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {self.piece(id): id for id in range(self._first)}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) + self._first for text in texts]

    def encode_with_offsets(self, text: str) -> Spans:
        begins = np.repeat(np.arange(len(text)), [len(character.encode()) for character in text])
        return Spans(self.encode(text), begins, begins + 1)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        return (ids[ids >= self._first] - self._first).astype(np.uint8).tobytes().decode(errors="replace")

    def piece(self, id: int) -> str:
        if id < self._first:
            return ("<pad>", "<s>", "</s>")[id]
        byte = id - self._first
        return chr(byte) if 0x21 <= byte <= 0x7E else f"<0x{byte:02X}>"

    def _spelling(self, piece: str) -> str:
        return piece


class SentencePiece(Tokenizer):
    """A SentencePiece model, ours or another's. Ours give every text back exactly."""

    kind = "sentencepiece"
    _file = "tokenizer.model"

    def __init__(self, content: bytes, beside: Beside | None = None):
        """Loads it.

        Args:
          content: of the .model.
          beside: the files beside it: roles, and tokens that were added behind the pieces.
        """
        self._processor = processor = sentencepiece().SentencePieceProcessor(model_proto=content)
        pieces = processor.id_to_piece(list(range(processor.vocab_size())))  # some files are not UTF-8 there
        self._added = (
            {token["content"]: token for token in beside.added if token["content"] not in pieces} if beside else {}
        )
        own = {"pad": processor.pad_id(), "bos": processor.bos_id(), "eos": processor.eos_id(), "mask": -1}
        ids = {role: self._named(names) if own[role] < 0 else own[role] for role, names in WELL_KNOWN.items()}
        for role, token in (beside.named if beside else {}).items():
            found = token if isinstance(token, int) else self._find(token) if token else ids[role]
            ids[role] = ids[role] if found is None else found
        last = max((token["id"] for token in self._added.values()), default=-1)
        sizes = max(processor.vocab_size(), last + 1)
        ids = (ids["pad"], ids["bos"], ids["eos"], ids["mask"])
        super().__init__(content, sizes, *ids, sentinels(self._find))
        if self._added:
            self.sha256 = hashlib.sha256(content + json.dumps(self._added, sort_keys=True).encode()).hexdigest()
        self._keep(beside)
        names = [id for id in (self.mask_id, *self.sentinel_ids) if id is not None]
        names += [token["id"] for token in self._added.values() if token["special"]]
        self._special = {id: self.piece(id) for id in names}
        self._names = {token["id"]: text for text, token in self._added.items()}
        self._mark = self._spell_mark()

    def _keep(self, beside: Beside | None) -> None:
        if beside is None:
            return
        self.settings = beside.settings
        self.role_ids = {role: id for role, id in beside.named.items() if isinstance(id, int)}
        if beside.named.get("bos") == "":
            self.adds_bos, self.prefix_id = False, self.eos_id
        elif "add_bos_token" in beside.settings:
            self.adds_bos = bool(beside.settings["add_bos_token"])

    def _named(self, names: Sequence[str]) -> int | None:
        return next((id for id in map(self._find, names) if id is not None), None)

    def _find(self, name: str) -> int | None:
        if name in self._added:
            return self._added[name]["id"]
        id = self._processor.piece_to_id(name)
        return id if self._processor.id_to_piece(id) == name else None

    def _spell_mark(self) -> np.ndarray | None:
        """U+2581 in bytes: the processor would take it for a space. None for models that change spaces anyway."""
        ids = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode()]
        spells_bytes = all(self._processor.is_byte(id) for id in ids)
        keeps_spaces = self._processor.decode(self._processor.encode(" a  b ")) == " a  b "
        return np.array(ids, np.int32) if spells_bytes and keeps_spaces else None

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        control = (id for id in range(self._processor.vocab_size()) if self._processor.is_control(id))
        return {self.piece(id): id for id in (*control, *self._special)}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        # One thread: preparing runs one process a core.
        arrays = [np.array(ids, np.int32) for ids in self._processor.encode(texts, num_threads=1)]
        for i, text in enumerate(texts):
            marked = (self._mark is not None and SPACE_MARK in text) or any(name in text for name in self._added_text)
            if marked or self._spells_special(arrays[i]):
                arrays[i] = self.encode_with_offsets(text).ids
        return arrays

    @functools.cached_property
    def _added_text(self) -> list[str]:
        """Added tokens that ordinary text spells, the longest first."""
        plain = [text for text, token in self._added.items() if not token["special"]]
        return sorted(plain, key=len, reverse=True)

    def _spells_special(self, ids: Sequence[int] | np.ndarray) -> bool:
        return bool(self._special) and any(int(id) in self._special for id in ids)

    def encode_with_offsets(self, text: str) -> Spans:
        if not any(name in text for name in self._added_text):
            return self._encode_plain(text)
        found, place = [], 0
        for i, part in enumerate(re.split(f"({any_of(self._added_text)})", text)):
            if i % 2:
                spans = Spans(
                    np.array([self._added[part]["id"]], np.int32), np.zeros(1, np.int64), np.array([len(part)])
                )
            else:
                spans = self._encode_plain(part)
            found.append(Spans(spans.ids, spans.begins + place, spans.ends + place))
            place += len(part)
        return joined(found)

    def _encode_plain(self, text: str) -> Spans:
        spans: list[tuple[int, int, int]] = []
        place = 0
        for i, part in enumerate([text] if self._mark is None else text.split(SPACE_MARK)):
            if i and self._mark is not None:
                spans += [(int(id), place - 1, place) for id in self._mark]
            spans += [(id, place + begin, place + end) for id, begin, end in self._places(part)]
            place += len(part) + 1
        return _spans(spans)

    def _places(self, text: str) -> list[tuple[int, int, int]]:
        found = self._processor.encode(text, return_type="offset_mapping", return_bytes=False)
        if self._spells_special(found["ids"]):
            pieces = _letters_apart(text, self._special.values())
            starts = itertools.accumulate(map(len, pieces), initial=0)
            parts = [(start, self._places(piece)) for start, piece in zip(starts, pieces, strict=False)]
            return [(id, start + begin, start + end) for start, part in parts for id, begin, end in part]
        spans = [(id, *span) for id, span in zip(found["ids"], found["offsets"], strict=True)]
        for i in reversed(range(len(spans) - 1)):
            id, begin, end = spans[i]
            if begin == end and self._processor.is_byte(id):  # the processor gives a character to its last byte
                spans[i] = id, *spans[i + 1][1:]
        return spans

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        kept = [int(id) for id in ids if int(id) not in self._special]
        if not self._names:
            return self._processor.decode(kept)
        parts = []
        for added, group in itertools.groupby(kept, lambda id: id in self._names):
            ids = list(group)
            parts += [self._names[id] for id in ids] if added else [self._processor.decode(ids)]
        return "".join(parts)

    def piece(self, id: int) -> str:
        id = int(id)
        if id < self._processor.vocab_size():
            return self._processor.id_to_piece(id)
        return next((text for text, token in self._added.items() if token["id"] == id), "")

    def _spelling(self, piece: str) -> str:
        return piece.replace(SPACE_MARK, " ")


class HuggingFace(Tokenizer):
    """A tokenizer.json of the `tokenizers` package."""

    kind = "huggingface"
    _file = "tokenizer.json"

    def __init__(self, content: bytes, named: Mapping[str, str | int], settings: Mapping[str, Any] | None = None):
        """Loads it.

        Args:
          content: of tokenizer.json.
          named: special tokens by role (bos, eos, pad, mask), or their ids, where other files tell; well-known names
            stand in, also for "".
          settings: content of tokenizer_config.json, which is kept.
        """
        self.settings = dict(settings or {})
        self.role_ids = {role: id for role, id in named.items() if isinstance(id, int)}
        self._tokenizer = tokenizer = tokenizers().Tokenizer.from_str(content.decode())
        self._model = json.loads(content)["model"]
        self._is_byte_level = b'"ByteLevel"' in content
        unknown = self._model.get("unk_token")
        if self._model.get("type") == "WordPiece" and unknown not in self._model["vocab"]:
            raise DataError(f"lacks its unk_token {unknown!r}, which stands for what it cannot spell")
        tokenizer.no_padding()
        tokenizer.no_truncation()
        first = tokenizer.encode("a").ids[:1]
        tokenizer.encode_special_tokens = True  # that is: as the ordinary text they are in a document
        for role, token in named.items():
            if isinstance(token, str) and token and tokenizer.token_to_id(token) is None:
                key = f"{role}_token"
                key = key if (settings or {}).get(key) else ENCODER_KEYS.get(role, key)
                raise ConfigError(f"{key} {token!r} is not in the vocabulary")
        ids = {role: self._find(names, named.get(role)) for role, names in WELL_KNOWN.items()}
        vocab_size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
        if vocab_size > _MAX_SIZE:
            raise DataError(f"has an id of {vocab_size - 1}; ids must be below {_MAX_SIZE:,}")
        ids = (ids["pad"], ids["bos"], ids["eos"], ids["mask"])
        super().__init__(content, vocab_size, *ids, sentinels(tokenizer.token_to_id))
        self.adds_bos = first == [self.bos_id]
        self.separators = _separators(tokenizer)
        self.prefix_id = self.eos_id if named.get("bos") == "" else self.bos_id
        self._special = self._special_tokens()

    def _find(self, names: Sequence[str], first: str | int | None) -> int | None:
        if isinstance(first, int):
            return first
        ids = (self._tokenizer.token_to_id(name) for name in ([first] if first else []) + list(names))
        return next((id for id in ids if id is not None), None)

    def _special_tokens(self) -> dict[int, str]:
        added = self._tokenizer.get_added_tokens_decoder()
        special = {id: token.content for id, token in added.items() if token.special}
        ids = (self.pad_id, self.bos_id, self.eos_id, self.mask_id, *self.sentinel_ids)
        roles = {id: self._tokenizer.id_to_token(id) for id in ids if id is not None}
        # An unknown character is told by its own id even when it stands in text.
        return {id: token for id, token in (special | roles).items() if token not in ("<unk>", "[UNK]")}

    @functools.cached_property
    def special_tokens(self) -> Mapping[str, int]:
        added = self._tokenizer.get_added_tokens_decoder()
        return {token.content: id for id, token in added.items() if token.special} | {
            token: id for id, token in self._special.items()
        }

    @functools.cached_property
    def _framer(self) -> Any:
        """The same vocabulary, to which special tokens are what they spell."""
        tokenizer = tokenizers().Tokenizer.from_str(self.content.decode())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
        tokenizer.add_special_tokens([token for token in self.special_tokens if token not in known])
        return tokenizer

    def encode_framed(self, text: str) -> Spans:
        with _encoding():
            encoding = self._framer.encode(text, add_special_tokens=False)
        return _spans((id, *offsets) for id, offsets in zip(encoding.ids, encoding.offsets, strict=True))

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        with _encoding():
            encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        arrays = [np.array(encoding.ids, np.int32) for encoding in encodings]
        special = list(self._special)
        return [
            self._encode_apart(text) if np.isin(ids, special).any() else ids
            for text, ids in zip(texts, arrays, strict=True)
        ]

    def _encode_apart(self, text: str) -> np.ndarray:
        return np.array(
            [id for _, encoding in self._apart(text) for id in encoding.ids if id not in self._special], np.int32
        )

    def _apart(self, text: str) -> Iterator[tuple[int, Any]]:
        """For models that know a special token as ordinary text (T5 does): its letters are encoded one by one."""
        pieces = _letters_apart(text, self._special.values())
        starts = itertools.accumulate(map(len, pieces), initial=0)
        yield from zip(starts, self._tokenizer.encode_batch(pieces, add_special_tokens=False), strict=False)

    def encode_with_offsets(self, text: str) -> Spans:
        with _encoding():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        apart = self._apart(text) if any(id in self._special for id in encoding.ids) else [(0, encoding)]
        return _spans(
            (id, place + begin, place + end)
            for place, encoding in apart
            for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if id not in self._special
        )

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return self._tokenizer.decode([int(id) for id in ids if int(id) not in self._special])

    def piece(self, id: int) -> str:
        return self._tokenizer.id_to_token(int(id))

    def _spelling(self, piece: str) -> str:
        model, suffix = self._model.get("type"), self._model.get("end_of_word_suffix")
        if model in ("WordPiece", "WordLevel"):
            continues = model == "WordPiece" and piece.startswith(self._model["continuing_subword_prefix"])
            return piece if continues else f" {piece}"
        if suffix and piece.endswith(suffix):
            return piece.removesuffix(suffix) + " "
        return piece.translate(_BYTE_LEVEL) if self._is_byte_level else piece.replace(SPACE_MARK, " ")


@contextlib.contextmanager
def _encoding() -> Iterator[None]:
    """Reports what the library raises as a DataError: panics, as of a pattern that backtracks without end, too."""
    try:
        yield
    except BaseException as error:
        if type(error) is not Exception and not is_panic(error):
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise DataError(f"the tokenizer cannot encode a text: {reason}") from error


def _separators(tokenizer: Any) -> int:
    """Special tokens between the two texts of a pair: 2 in RoBERTa, else 1."""
    owners = tokenizer.encode("a", "a").sequence_ids
    between = owners[: owners.index(1)][owners.index(0) :].count(None) if {0, 1} <= set(owners) else 1
    return min(max(between, 1), 2)


def _letters_apart(text: str, tokens: Iterable[str]) -> list[str]:
    """A text in parts: those of its places that read like one of the tokens letter by letter, the rest whole."""
    parts = re.split(f"({'|'.join(map(re.escape, tokens))})", text)
    return [piece for i, part in enumerate(parts) for piece in (part if i % 2 else [part]) if piece]


def _spans(found: Iterable[tuple[int, int, int]]) -> Spans:
    ids, begins, ends = np.array(list(found), np.int64).reshape(-1, 3).T
    return Spans(ids.astype(np.int32), begins, ends)


def load(path: epath.Path | str) -> Tokenizer:
    """Reads a tokenizer.

    Args:
      path: a SentencePiece .model, a Hugging Face tokenizer.json, BERT's vocab.txt, a GGUF file, Marian's source.spm
        with its target.spm and vocab.json beside it, or what `Tokenizer.save` wrote.

    Raises:
      InputMissing: there is no such file.
      DataError: it is not a tokenizer.
      ConfigError: it has no token to begin or end a text, or a package is missing.
    """
    path = epath.Path(path).expanduser()
    if not path.is_file():
        raise InputMissing(f"tokenizer {path} does not exist")
    if not path.stat().length:
        raise DataError(f"tokenizer {path} is empty")
    if path.name == _BYTES_FILE:
        if atomic_io.read_json(path) != _BYTES:
            raise DataError(f"{path} defines other bytes than this program's")
        return Bytes()
    try:
        with without_panic_text():
            return _read(path)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except InputMissing:
        raise
    except DataError as error:
        raise error if str(path.parent) in str(error) else DataError(f"{path} {error}") from error
    except BaseException as error:  # what the two libraries raise on a bad file is Exception itself, or RuntimeError
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise DataError(f"{path} is not a {_FORMATS.get(path.suffix, 'SentencePiece model')}") from error


def _read(path: epath.Path) -> Tokenizer:
    if path.name in _MARIAN:
        from lslm_jax.data.tokenizers import marian

        return marian.Marian(marian.from_directory(path.parent) if path.name == marian.SOURCE else path.read_bytes())
    if path.suffix == ".gguf":
        from lslm_jax.data.tokenizers import gguf

        return HuggingFace(*gguf.vocabulary(path))
    beside = read_beside(path.parent)
    if path.suffix == ".json" or path.name == _WORD_PIECES:
        content = path.read_bytes() if path.suffix == ".json" else from_word_pieces(path, tokenizers())
        if path.suffix == ".json":
            hf_classes.check(beside.settings, beside.model_type, json.loads(content), path.parent / CONFIG)
        return HuggingFace(with_added(content, beside, path), beside.named, beside.settings)
    return SentencePiece(path.read_bytes(), beside)


@functools.cache
def sentencepiece() -> Any:
    """The package, or a ConfigError that says how to install it."""
    try:
        import sentencepiece as package
    except ImportError as error:
        raise ConfigError("tokenizer.kind=sentencepiece needs sentencepiece: pip install sentencepiece") from error
    return package
