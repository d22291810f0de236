"""What a row's new tokens spell, told as far as later tokens cannot change it."""

from typing import Any, NamedTuple

from lslm_jax.config import GenerateConfig

_UNKNOWN = "\ufffd"  # how tokenizers write bytes that are not, or not yet, a character


class Result(NamedTuple):
    """What became of one prompt.

    Attributes:
      ids: the new tokens without the one that ends a text; up to the one that completed a stop string.
      text: what they spell after the prompt, up to a stop string.
      ended: by the end of the text (`eos`), a `stop` string, or the `length` allowed.
      num_tokens: tokens drawn, the end of the text included.
      score: of beam search, the log-probability of these tokens over ((5 + num_tokens) / 6)^length_penalty; else None.
    """

    ids: list[int]
    text: str
    ended: str
    num_tokens: int
    score: float | None = None


class Row:
    """One prompt as the host sees it: its new tokens, and the text they spell."""

    def __init__(
        self,
        tokenizer: Any,
        number: int,
        prompt: list[int],
        limit: int,
        settings: GenerateConfig,
        *,
        source: list[int] | None = None,
        context: list[int] | None = None,
    ):
        """Makes a row without new tokens.

        Args:
          tokenizer: decodes, and knows eos.
          number: of the row.
          prompt: what the model reads before the new tokens.
          limit: tokens after which it ends.
          settings: strings and ids at which it ends.
          source: what an encoder reads.
          context: the tokens that the text goes on from. None: the prompt.
        """
        self.number, self.prompt, self.limit = number, prompt, limit
        self.source = source or []
        self.score: float | None = None  # the search sets it
        self.ids: list[int] = []
        self.num_tokens = 0
        self.ended = ""  # how, once it has
        self._tokenizer, self._stop = tokenizer, settings.stop
        self._ends = {*([tokenizer.eos_id] if settings.eos else []), *settings.stop_ids}
        self._text, self._told = "", 0
        self._held = ""  # spelt, but perhaps the beginning of a stop string
        self._context = (
            prompt if context is None else context
        )  # tokens spelt last: how a token is written depends on the one before it
        self._unspelt: list[int] = []

    def push(self, id: int) -> None:
        """Takes the next token, unless the row has ended."""
        if self.ended:
            return
        self.num_tokens += 1
        if id in self._ends:
            self.ended = "eos"
            return
        self.ids.append(id)
        self._unspelt.append(id)
        if self._stop:
            self._tell(self._spell())
        if not self.ended and self.num_tokens == self.limit:
            self.ended = "length"

    def spell(self) -> str:
        """Brings the text up to date as far as later tokens cannot change it; returns what was not returned before."""
        if not self._stop:
            self._tell(self._spell_all())
        if self.ended in ("eos", "length"):
            self._tell(self._spell(final=True))
        if self.ended in ("eos", "length"):
            self._text, self._held = self._text + self._held, ""
        new, self._told = self._text[self._told :], len(self._text)
        return new

    def result(self) -> Result:
        """What became of the prompt, once its row has ended."""
        self.spell()
        return Result(self.ids, self._text, self.ended, self.num_tokens, self.score)

    def _spell_all(self) -> str:
        """Spells many tokens with one call if they are whole characters, which gives the same text as one by one."""
        if _UNKNOWN not in self._tokenizer.decode(self._unspelt):
            return self._spell()
        ids, self._unspelt, text = self._unspelt, [], ""
        for id in ids:
            self._unspelt.append(id)
            text += self._spell()
        return text

    def _spell(self, final: bool = False) -> str:
        """The text of tokens not spelt so far; nothing yet if they end within a character, unless they are final."""
        known = self._tokenizer.decode(self._context)
        text = self._tokenizer.decode(self._context + self._unspelt)
        if text.endswith(_UNKNOWN) and not final:
            return ""
        # Byte fallback may take back a character before invalid bytes; what was told stays told.
        text = text[len(known) :] if text.startswith(known) else self._tokenizer.decode(self._unspelt)
        if text:
            self._context, self._unspelt = self._unspelt, []
        return text

    def _tell(self, text: str) -> None:
        """Adds to the text, up to a stop string or what might become one."""
        text = self._held + text
        found = [at for at in map(text.find, self._stop) if at >= 0]
        if found:
            self.ended = "stop"
        cut = min(found) if found else len(text) - _overlap(text, self._stop)
        self._text, self._held = self._text + text[:cut], "" if found else text[cut:]


def _overlap(text: str, stop: tuple[str, ...]) -> int:
    """Length of the longest end of the text that begins a stop string."""
    longest = max(map(len, stop), default=0)
    return next((n for n in range(min(longest, len(text)), 0, -1) if any(s.startswith(text[-n:]) for s in stop)), 0)
