"""Documents too large to be cleaned and tokenized as one string: both are done in parts, in bounded memory.

A part ends where neither cleaning nor tokenization reaches across, so that the tokens are those of the whole text. For
cleaning this is checked by cleaning the surroundings of a cut together and apart; for tokenization likewise, with the
tokens of some text before each cut as context.
"""

import hashlib
import itertools
import re
from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

import numpy as np

from lslm_jax.config import CleanConfig
from lslm_jax.data.prepare import cleaning
from lslm_jax.data.tokenizers.base import Tokenizer

LONG = 1 << 22
"""Bytes or characters from which a document is treated in parts."""

_PART = 1 << 20
_AROUND = 64  # bytes or characters on both sides of a cut that are cleaned to check it
_CONTEXT = 512  # characters on both sides of a cut that are tokenized to check it
_STABLE = 8  # tokens before a cut that must not depend on where their context begins
_TRIES = 50


class LongText(NamedTuple):
    """A cleaned text.

    Attributes:
      parts: of it, in UTF-8.
      length: characters.
      digest: as `clean.digest` of the whole.
    """

    parts: list[bytes]
    length: int
    digest: bytes

    @property
    def num_bytes(self) -> int:
        """Bytes in UTF-8."""
        return sum(map(len, self.parts))

    def texts(self) -> Iterator[str]:
        """The parts as text."""
        return (part.decode() for part in self.parts)


def cleaned(
    content: str | bytes, config: CleanConfig, policy: Literal["strict", "replace", "skip"], origin: str
) -> LongText | None:
    """The text as `clean.decode` and `clean.clean_text` would return it; None where it is to be skipped.

    Raises:
      DataError: it is undecodable and the policy is strict.
    """
    parts: list[bytes] = []
    hasher, length = hashlib.blake2b(digest_size=16), 0
    for part in _stripped(_cleaned_parts(content, config, policy, origin), config):
        if part is None:
            return None
        parts.append(part.encode())
        hasher.update(parts[-1])
        length += len(part)
    return LongText(parts, length, hasher.digest())


def _cleaned_parts(content: str | bytes, config: CleanConfig, policy: str, origin: str) -> Iterator[str | None]:
    for start, end in itertools.pairwise(_cuts(content, config)):
        text = cleaning.decode(content[start:end], "replace" if policy == "replace" else "skip", origin)
        if text is None:
            if policy == "strict":
                cleaning.decode(content, "strict", origin)  # which names the place in the whole
            yield None
            return
        yield cleaning.clean_part(text, config)


def _stripped(parts: Iterator[str | None], config: CleanConfig) -> Iterator[str | None]:
    """The parts without the blanks around the whole, where these are not kept."""
    if config.whitespace == "keep":
        yield from parts
        return
    before = None
    for part in parts:
        if part is None:
            yield None
            return
        if before is not None:
            yield before
        before = part.lstrip() if not before else part  # no part but the first begins with blanks
    yield (before or "").rstrip()


def _cuts(content: str | bytes, config: CleanConfig) -> Iterator[int]:
    """Offsets 0, ..., len(content) between which the content is cleaned part by part."""
    start = 0
    while len(content) - start > 2 * _PART:
        yield start
        start = _cut(content, start + _PART, config)
    yield start
    if start < len(content):
        yield len(content)


def _cut(content: str | bytes, target: int, config: CleanConfig) -> int:
    """The first good place for a cut after `target`, best after a line; the end where there is none."""
    window = content[target : target + _PART // 2]
    places = re.finditer(b"\n", window) if isinstance(window, bytes) else re.finditer("\n", window)
    newlines = (found.end() for found in places)
    for offset in itertools.chain(itertools.islice(newlines, _TRIES), range(min(_TRIES, len(window)))):
        if _is_cut(content, target + offset, config):
            return target + offset
    return next((i for i in range(target, len(content)) if _is_cut(content, i, config)), len(content))


def _is_cut(content: str | bytes, place: int, config: CleanConfig) -> bool:
    """True if cleaning the content up to a place and from there on is cleaning the whole."""
    left, right = _decoded(content[place - _AROUND : place]), _decoded(content[place : place + _AROUND])
    if isinstance(content, bytes) and content[place : place + 1] and content[place] & 0xC0 == 0x80:
        return False
    if not right or not right[0].isprintable() or right[0].isspace() or right[0] == "\ufffd" or "\ufffd" in left[-1:]:
        return False
    return cleaning.clean_part(left + right, config) == cleaning.clean_part(left, config) + cleaning.clean_part(
        right, config
    )


def _decoded(part: str | bytes) -> str:
    return part.decode(errors="replace") if isinstance(part, bytes) else part


def encode(texts: Iterable[str], tokenizer: Tokenizer) -> np.ndarray:
    """The ids of the text that the parts make together, of the smallest type that holds the vocabulary."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    ids = bytearray()
    for part in _encoded_parts(texts, tokenizer):
        ids += part.astype(dtype).tobytes()
    return np.frombuffer(ids, dtype)


def _encoded_parts(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[np.ndarray]:
    buffer, context, known = "", 0, np.empty(0, np.int32)  # context: characters at the start that are encoded already
    enough = _PART
    for text in texts:
        buffer += text
        while len(buffer) - context > enough:
            if not (cut := _token_cut(buffer, context, tokenizer)):
                enough *= 2  # as in a long run of blanks
                break
            enough = _PART
            yield _after(buffer[:cut], context, known, tokenizer)
            first = max(0, cut - _CONTEXT)
            context, buffer = cut - first, buffer[first:]
            known = tokenizer.encode(buffer[:context])
    if len(buffer) > context or not context:
        yield _after(buffer, context, known, tokenizer)


def _after(text: str, context: int, known: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The ids of a text after the context at its start, whose ids are `known`."""
    ids = tokenizer.encode(text)
    if np.array_equal(ids[: len(known)], known):
        return ids[len(known) :]
    return tokenizer.encode(text[context:])


def _token_cut(buffer: str, context: int, tokenizer: Tokenizer) -> int:
    """The last place in the buffer where tokens end whatever lies around; 0 for none, so that more text is taken."""
    first, last = context + 1, len(buffer) - _CONTEXT
    after_line, before_blank = re.compile("(?<=\n)(?=\\S)"), re.compile("(?<=\\S)(?=\\s)")
    window = max(first, last - (_CONTEXT << 5))
    for pattern in (after_line, before_blank, re.compile("")):
        places = [found.start() for found in pattern.finditer(buffer, window, last)]
        for place in places[::-1][:_TRIES]:
            if _is_token_cut(buffer, place, tokenizer):
                return place
    return 0


def _is_token_cut(buffer: str, place: int, tokenizer: Tokenizer) -> bool:
    """True if a token ends here, wherever the text before begins and the text behind ends.

    It does not within runs of one character or word, whose tokens depend on where the run begins, or ends.
    """
    left, right = buffer[max(0, place - _CONTEXT) : place], buffer[place : place + _CONTEXT]
    shorter = [left[i:] for i in range(1, 4)]
    longer = [left + right[: len(right) - i] for i in range(4)]
    alone, *others = tokenizer.encode_batch([left, *shorter, *longer])
    before, together = others[: len(shorter)], others[len(shorter) :]
    if any(len(ids) <= len(alone) or not np.array_equal(ids[: len(alone)], alone) for ids in together):
        return False
    return all(np.array_equal(ids[-_STABLE:], alone[-_STABLE:]) for ids in before)
