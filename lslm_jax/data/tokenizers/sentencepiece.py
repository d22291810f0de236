"""SentencePiece tokenizers, trained here or elsewhere."""

import functools
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lslm_jax.data.tokenizers.base import (
    SPACE_MARK,
    WELL_KNOWN,
    Spans,
    Tokenizer,
    any_of,
    joined,
    letters_apart,
    sentinels,
    spans_of,
)
from lslm_jax.data.tokenizers.hf_metadata import Beside
from lslm_jax.errors import ConfigError


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
        return spans_of(spans)

    def _places(self, text: str) -> list[tuple[int, int, int]]:
        found = self._processor.encode(text, return_type="offset_mapping", return_bytes=False)
        if self._spells_special(found["ids"]):
            pieces = letters_apart(text, self._special.values())
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


@functools.cache
def sentencepiece() -> Any:
    """The package, or a ConfigError that says how to install it."""
    try:
        import sentencepiece as package
    except ImportError as error:
        raise ConfigError("tokenizer.kind=sentencepiece needs sentencepiece: pip install sentencepiece") from error
    return package
