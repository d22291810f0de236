"""What is done to a document before anything else sees it: decode, normalise, filter, and drop what was seen before.

Functions of one text each, so that they can run in any process; only `Deduplicator` remembers.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from lslm_jax.config import CleanConfig
from lslm_jax.errors import ConfigError, DataError

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]+")  # category Cc without tab and newline
_SURROGATE = re.compile(r"[\ud800-\udfff]")
# Chinese and Japanese put no blanks between words, so each of their characters counts as one.
_WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\u3040-\u30ff\u3400-\u9fff]+")
_SHINGLE_WORDS = 5
_NEAR = 0.8
_SEED = 1


def decode(data: bytes | str, policy: Literal["strict", "replace", "skip"], origin: str) -> str | None:
    """Text of a document; None where it is undecodable and the policy is to skip it.

    A str may hold lone surrogates: bytes that its file format could not decode, or half a pair of JSON escapes.

    Args:
      data: the document as it was read.
      policy: `clean.bad_utf8`.
      origin: where it was read, for the message.

    Raises:
      DataError: it is undecodable and the policy is strict; the message gives the place.
    """
    try:
        if isinstance(data, bytes):
            return data.decode()
        data.encode()
        return data
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        if policy == "strict":
            place = _bad_byte(data, error.start) if isinstance(data, bytes) else _bad_character(data, error.start)
            raise DataError(f"{origin}: {place} is not UTF-8; clean.bad_utf8 may be replace or skip") from None
        if policy == "skip":
            return None
        return data.decode(errors="replace") if isinstance(data, bytes) else _SURROGATE.sub("\ufffd", data)


def _bad_byte(data: bytes, offset: int) -> str:
    newlines = data.count(b"\n", 0, offset)
    line = f" (line {newlines + 1})" if b"\n" in data else ""
    return f"byte 0x{data[offset]:02x} at offset {offset}{line}"


def _bad_character(text: str, offset: int) -> str:
    code = ord(text[offset])
    if 0xDC80 <= code <= 0xDCFF:  # how Python's surrogateescape writes an undecodable byte
        return f"byte 0x{code - 0xDC00:02x} at character {offset}"
    return f"lone surrogate U+{code:04X} at character {offset}"


def clean_text(text: str, config: CleanConfig) -> str:
    """The text with control characters, Unicode form and whitespace as configured; cleaning twice changes nothing."""
    text = clean_part(text, config)
    return text if config.whitespace == "keep" else text.strip()


def clean_part(text: str, config: CleanConfig) -> str:
    """A part of a text, cleaned but for the blanks around the whole."""
    if config.control == "strip":
        text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    if config.unicode != "none":
        text = unicodedata.normalize(config.unicode, text)
    if config.whitespace == "collapse":
        text = re.sub(r"[^\S\n]+", " ", text)
    if config.whitespace != "keep":
        text = "\n".join(line.rstrip() for line in text.split("\n"))
    if config.whitespace == "collapse":
        text = re.sub(r"\n{3,}", "\n\n", text)
    return text


def reason(text: str, config: CleanConfig) -> Literal["too_short", "too_long"] | None:
    """Why a cleaned text is dropped; None where it is kept."""
    return length_reason(len(text), config)


def length_reason(length: int, config: CleanConfig) -> Literal["too_short", "too_long"] | None:
    """Why a cleaned text of so many characters is dropped; None where it is kept."""
    if length < config.min_chars:
        return "too_short"
    if config.max_chars and length > config.max_chars:
        return "too_long"
    return None


def digest(text: str) -> bytes:
    """16 bytes that stand for the text."""
    return hashlib.blake2b(text.encode(), digest_size=16).digest()


def is_valid(digest: bytes, fraction: float) -> bool:
    """Whether a document is held out. Equal texts always fall on the same side."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def signature(text: str) -> np.ndarray:
    """MinHash of a text's word 5-grams, integers [128]: two texts share as many entries as they share of their 5-grams.

    Raises:
      ConfigError: datasketch is not installed.
    """
    return signature_of_parts([text])


def signature_of_parts(parts: Iterable[str]) -> np.ndarray:
    """The same of a text in parts that end between words."""
    minhash, before, is_empty = _empty_minhash().copy(), [], True
    for part in parts:
        words = before + _WORD.findall(part.lower())
        starts = range(max(0, len(words) - _SHINGLE_WORDS + 1))
        is_empty = is_empty and not starts
        minhash.update_batch([" ".join(words[i : i + _SHINGLE_WORDS]).encode() for i in starts])
        before, last = words[-_SHINGLE_WORDS + 1 :], part
    if is_empty:
        minhash.update_batch([(" ".join(before) if before else last).encode()])
    return minhash.hashvalues


class Deduplicator:
    """Remembers documents: about 100 bytes for each, and 4 kB more where near ones are looked for."""

    def __init__(self, near: bool):
        """Begins with nothing seen.

        Args:
          near: whether signatures are compared too.

        Raises:
          ConfigError: near, and datasketch is not installed.
        """
        self._digests: set[bytes] = set()
        self._index: Any = _datasketch().MinHashLSH(threshold=_NEAR, num_perm=128) if near else None
        self._signatures: list[np.ndarray] = []

    def seen(self, digest: bytes, signature: np.ndarray | None) -> Literal["duplicate", "near_duplicate"] | None:
        """Whether an equal document came before, or a near one of those with a signature; else it is remembered."""
        found = self.find(digest, signature)
        self.add(digest, None if found else signature)
        return found

    def find(self, digest: bytes, signature: np.ndarray | None) -> Literal["duplicate", "near_duplicate"] | None:
        """Finds a remembered document that one repeats: an equal one, or a near one of those with a signature."""
        if digest in self._digests:
            return "duplicate"
        return "near_duplicate" if signature is not None and self._has_near(signature) else None

    def add(self, digest: bytes, signature: np.ndarray | None) -> None:
        """Remembers a document; of a near duplicate of another one, its digest alone is enough."""
        self._digests.add(digest)
        if signature is not None:
            self._index.insert(len(self._signatures), _minhash(signature))
            self._signatures.append(signature)

    def _has_near(self, signature: np.ndarray) -> bool:
        # The index proposes; the signatures decide.
        return any(
            np.mean(self._signatures[key] == signature) >= _NEAR for key in self._index.query(_minhash(signature))
        )


def _minhash(signature: np.ndarray) -> Any:
    minhash = _empty_minhash().copy()
    minhash.hashvalues = signature
    return minhash


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise ConfigError("clean.deduplicate=near needs datasketch: pip install datasketch") from error
    return datasketch


@functools.cache
def _empty_minhash() -> Any:
    return _datasketch().MinHash(seed=_SEED)  # its permutations are costly to draw, and the same for every text
