"""Keeps special tokens that strangers' text spells apart from those that a chat template writes around it.

Before a template is filled in, each such token in the conversation is replaced by one private character, which no
conversation of the same text holds. Where a text begins or ends as part of a token would, a seam is put there, so that
no token arises where two texts meet. What the template then spells is a token; what the private characters stand for is
encoded as the text that it is.
"""

import bisect
import functools
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.tokenizers.base import Spans, Tokenizer, any_of, joined

_PRIVATE = range(0xF0000, 0x10FFFE)  # characters that mean nothing to anybody else


class Guarded(NamedTuple):
    """A conversation whose texts spell no special token.

    Attributes:
      value: the conversation.
      seam: the private character that parts texts; those after it stand for the tokens, in the guard's order.
    """

    value: Any
    seam: str


class Guard:
    """Knows the special tokens of a vocabulary."""

    def __init__(self, words: Tokenizer):
        self._words = words
        self._tokens = sorted(words.special_tokens, key=len, reverse=True)
        self._names = {id: token for token, id in words.special_tokens.items()}
        self._number = {token: number for number, token in enumerate(self._tokens, 1)}
        self._any = re.compile(any_of(self._tokens))
        self._begins = {token[:end] for token in self._tokens for end in range(1, len(token))}
        self._ends = {token[begin:] for token in self._tokens for begin in range(1, len(token))}
        self._longest = max(map(len, self._tokens), default=0)

    def hide(self, value: Any, origin: str) -> Guarded:
        """A conversation, of plain JSON values, with its special tokens hidden.

        Args:
          value: the conversation.
          origin: where it was read, for the message.

        Raises:
          RecordError: it uses so many private-use characters that none are left to stand for the tokens.
        """
        used, size = set().union(*_texts(value)), len(self._tokens) + 1
        firsts = range(_PRIVATE.start, _PRIVATE.stop - size, size)
        free = (first for first in firsts if used.isdisjoint(map(chr, range(first, first + size))))
        if (first := next(free, None)) is None:
            raise RecordError(f"{origin}: it uses too many different private-use characters (U+F0000 to U+10FFFD)")
        return Guarded(self._hide(value, first), chr(first))

    def _hide(self, value: Any, first: int) -> Any:
        match value:
            case str():
                return self._hide_text(value, first)
            case dict():
                return {self._hide_text(key, first): self._hide(part, first) for key, part in value.items()}
            case list():
                return [self._hide(part, first) for part in value]
        return value

    def _hide_text(self, text: str, first: int) -> str:
        text = self._any.sub(lambda found: chr(first + self._number[found[0]]), text)
        lengths = range(1, min(len(text), self._longest) + 1)
        before = any(text[:n] in self._ends for n in lengths)
        after = any(text[-n:] in self._begins for n in lengths)
        return chr(first) * before + text + chr(first) * after

    def settle(self, text: str, cuts: Sequence[int], seam: str) -> tuple[str, list[int]]:
        """A filled-in template, and places in it, without the seams at which no token would arise."""
        if seam not in text:
            return text, list(cuts)
        seams = [place for place, character in enumerate(text) if character == seam]
        tokens = [found.span() for found in self._any.finditer(text.replace(seam, ""))]
        needed = [any(begin < place - i < end for begin, end in tokens) for i, place in enumerate(seams)]
        gone = [place for place, stays in zip(seams, needed, strict=True) if not stays]
        ends = [0, *(place + 1 for place in gone)]
        kept = "".join(text[begin:end] for begin, end in zip(ends, [*gone, len(text)], strict=True))
        return kept, [cut - bisect.bisect_left(gone, cut) for cut in cuts]

    def encode(self, text: str, seam: str) -> Spans:
        """The ids of a filled-in template, and their places; what is hidden is encoded as ordinary text."""
        first, place, found = ord(seam), 0, []
        for i, part in enumerate(re.split(f"([{seam}-{chr(first + len(self._tokens))}])", text)):
            if i % 2:
                ids = self._words.encode(self._tokens[ord(part) - first - 1]) if part != seam else np.empty(0, np.int32)
                found.append(Spans(ids, np.full(len(ids), place), np.full(len(ids), place + 1)))
            elif part or not found:
                spans = self._words.encode_framed(part)
                found.append(Spans(spans.ids, spans.begins + place, spans.ends + place))
            place += len(part)
        return joined(found)

    def tokens_at(self, spans: Spans, text: str) -> np.ndarray:
        """Which of a text's ids are special tokens that it spells, bool [n]."""
        # An unknown character, say, has the id of one, too.
        found = np.isin(spans.ids, list(self._names))
        for i in np.flatnonzero(found):
            found[i] = text[spans.begins[i] : spans.ends[i]].strip() == self._names[int(spans.ids[i])]
        return found

    def reveal(self, text: str, seam: str) -> str:
        """A text with what is hidden in it."""
        names = {ord(seam) + number: token for token, number in self._number.items()}
        return text.translate(names | {ord(seam): ""})


def _texts(value: Any) -> Iterator[str]:
    match value:
        case str():
            yield value
        case dict():
            for key, part in value.items():
                yield key
                yield from _texts(part)
        case list():
            for part in value:
                yield from _texts(part)


@functools.lru_cache(maxsize=2)
def guard_of(words: Tokenizer) -> Guard:
    """The guard of a vocabulary; kept, for it knows all beginnings and ends of its tokens."""
    return Guard(words)
