"""Tokenizers of the `tokenizers` package: tokenizer.json."""

import contextlib
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lslm_jax.data.tokenizers.base import (
    SPACE_MARK,
    WELL_KNOWN,
    Spans,
    Tokenizer,
    is_panic,
    letters_apart,
    sentinels,
    spans_of,
    tokenizers,
)
from lslm_jax.data.tokenizers.hf_metadata import ENCODER_KEYS
from lslm_jax.errors import ConfigError, DataError

_MAX_SIZE = 1 << 24  # ids; a file of a few bytes can name larger ones, for which there is no memory
_BYTE_LEVEL = str.maketrans("\u0120\u010a\u0109\u010d", " \n\t\r")  # how byte-level BPE (GPT-2) writes blanks


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
        return spans_of((id, *offsets) for id, offsets in zip(encoding.ids, encoding.offsets, strict=True))

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
        pieces = letters_apart(text, self._special.values())
        starts = itertools.accumulate(map(len, pieces), initial=0)
        yield from zip(starts, self._tokenizer.encode_batch(pieces, add_special_tokens=False), strict=False)

    def encode_with_offsets(self, text: str) -> Spans:
        with _encoding():
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        apart = self._apart(text) if any(id in self._special for id in encoding.ids) else [(0, encoding)]
        return spans_of(
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
