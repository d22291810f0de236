"""Marian's vocabularies (OPUS-MT): pieces of two SentencePiece models, one a language, with ids of their own."""

import base64
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from lslm_jax.data.tokenizers.base import SPACE_MARK, Spans, Tokenizer
from lslm_jax.data.tokenizers.hf_metadata import named_tokens
from lslm_jax.data.tokenizers.sentencepiece import sentencepiece
from lslm_jax.errors import ConfigError, InputMissing
from lslm_jax.runtime import atomic_io

FILE = "marian.json"
SOURCE = "source.spm"
_TARGET, _IDS, _UNKNOWN = "target.spm", "vocab.json", "<unk>"


class Marian(Tokenizer):
    """Sources are cut by one model, targets by the other. What begins a text as >>fra<< does is one token."""

    kind = "marian"
    _file = FILE

    def __init__(self, content: bytes):
        """Args: content, from `from_directory`."""
        parts = json.loads(content)
        self._ids: dict[str, int] = parts["ids"]
        self._pieces = {id: piece for piece, id in self._ids.items()}
        self._models = {name: base64.b64decode(parts[name]) for name in (SOURCE, _TARGET)}
        load = sentencepiece().SentencePieceProcessor
        self._source, self._target = (load(model_proto=model) for model in self._models.values())
        self._unknown = self._ids[_UNKNOWN]
        roles = parts["roles"]
        super().__init__(content, max(self._pieces) + 1, roles["pad"], roles["bos"], roles["eos"])
        self._silent = {self.pad_id, self.bos_id, self.eos_id, self._unknown}

    @property
    def special_tokens(self) -> Mapping[str, int]:
        return {self.piece(id): id for id in self._silent - {self._unknown}}

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(self._source, text) for text in texts]

    def encode_targets(self, texts: list[str]) -> list[np.ndarray]:
        return [self._encode(self._target, text) for text in texts]

    def _encode(self, processor: Any, text: str) -> np.ndarray:
        code, text = _language(text)
        pieces = [*([code] if code else []), *processor.encode(text, out_type=str)]
        return np.array([self._id(piece) for piece in pieces], np.int32)

    def _id(self, piece: str) -> int:
        return self._ids.get(piece, self._unknown)

    def encode_with_offsets(self, text: str) -> Spans:
        code, rest = _language(text)
        found = self._source.encode(rest, return_type="offset_mapping", return_bytes=False)["offsets"]
        places = [*([(0, len(code))] if code else []), *((len(code) + a, len(code) + b) for a, b in found)]
        begins, ends = np.array(places, np.int64).reshape(-1, 2).T
        return Spans(self.encode(text), begins, ends)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        pieces = [self._pieces[id] for id in map(int, ids) if id in self._pieces and id not in self._silent]
        return self._source.decode_pieces(pieces).replace(SPACE_MARK, " ").strip()

    def piece(self, id: int) -> str:
        return self._pieces.get(int(id), _UNKNOWN)

    def _spelling(self, piece: str) -> str:
        return piece.replace(SPACE_MARK, " ")

    def files(self) -> dict[str, bytes]:
        """The files that `from_directory` reads, by name, as transformers' MarianTokenizer has them."""
        roles = {f"{role}_token": self.piece(getattr(self, f"{role}_id")) for role in ("eos", "pad")}
        settings = {"tokenizer_class": "MarianTokenizer", "unk_token": _UNKNOWN} | roles
        texts = {_IDS: self._ids, "tokenizer_config.json": settings}
        spelt = {name: json.dumps(value, ensure_ascii=False, indent=1).encode() for name, value in texts.items()}
        return self._models | spelt


def _language(text: str) -> tuple[str, str]:
    """The token that names a language at the beginning of a text, "" for none, and the rest."""
    end = text.find("<<") + 2
    return (text[:end], text[end:]) if text.startswith(">>") and end > 1 else ("", text)


def from_directory(directory: epath.Path) -> bytes:
    """What `Marian` is made of.

    Raises:
      InputMissing: a file is missing.
      ConfigError: its targets have ids of their own.
    """
    for name in (SOURCE, _TARGET, _IDS):
        if not (directory / name).exists():
            raise InputMissing(f"{directory} holds no {name}, which Marian's vocabularies need")
    if (directory / "target_vocab.json").exists():
        raise ConfigError("target_vocab.json: a vocabulary whose targets have ids of their own is not supported")
    ids, named = atomic_io.read_json(directory / _IDS), named_tokens(directory)
    pad = ids[str(named.get("pad", "<pad>"))]
    start = named.get("bos")  # an id, where config.json tells it
    roles = {"bos": start if isinstance(start, int) else pad, "eos": ids[str(named.get("eos", "</s>"))], "pad": pad}
    models = {name: base64.b64encode((directory / name).read_bytes()).decode() for name in (SOURCE, _TARGET)}
    return json.dumps({"ids": ids, "roles": roles} | models, ensure_ascii=False).encode()
