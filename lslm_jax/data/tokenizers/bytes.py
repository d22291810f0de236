"""Byte tokenizer: one token for each UTF-8 byte."""

import json
from collections.abc import Mapping, Sequence

import numpy as np

from lslm_jax.data.tokenizers.base import Spans, Tokenizer

BYTES_FILE = "bytes.json"
BYTES_LAYOUT = {"kind": "bytes", "pad_id": 0, "bos_id": 1, "eos_id": 2, "first_byte": 3}


class Bytes(Tokenizer):
    """One token a UTF-8 byte."""

    kind = "bytes"
    _file = BYTES_FILE

    def __init__(self):
        first = BYTES_LAYOUT["first_byte"]
        ids = (BYTES_LAYOUT["pad_id"], BYTES_LAYOUT["bos_id"], BYTES_LAYOUT["eos_id"])
        super().__init__(json.dumps(BYTES_LAYOUT).encode(), first + 256, *ids)
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
