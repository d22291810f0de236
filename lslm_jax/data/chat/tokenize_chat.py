"""Conversations: checked, put into words by a chat template, and cut where answers begin and end.

An answer is what follows the text of the messages before it, with the template's own beginning of an answer, and ends
with the token, or the text, by which the template ends it. Where the text of the whole conversation begins with that of
each of its parts it is one example with several answers. A template that writes earlier turns otherwise once there are
later ones (without their thoughts, say) makes an example of each answer.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lslm_jax.config import ROLES
from lslm_jax.data.chat import chat_template
from lslm_jax.data.chat.chat_template import Template
from lslm_jax.data.chat.special_token_escaping import Guard, guard_of
from lslm_jax.data.readers.example_schema import RecordError, require_shallow
from lslm_jax.data.tokenizers.base import Spans, Tokenizer
from lslm_jax.errors import ConfigError

_SHAREGPT = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_NO_ROLES: Mapping[str, str] = {}
_ROLES_REMEDY = "data.roles may map other names"
_PROBE = "Answer"
_ANCHOR = "\n"

Message = dict[str, Any]


class Learnt(NamedTuple):
    """What is learnt from a conversation, or from one answer of it.

    Attributes:
      ids: int32 [n], of all, with the special tokens that the template writes.
      marks: int32 [n], 1 where a token belongs to an answer, else 0.
      num_bytes: of UTF-8 in the answers.
    """

    ids: np.ndarray
    marks: np.ndarray
    num_bytes: int


class Ending(NamedTuple):
    """How a template ends an answer: by a token, or else by a text.

    Attributes:
      ids: of the token; () where there is none.
      texts: the text; () where it is a token.
    """

    ids: tuple[int, ...]
    texts: tuple[str, ...]


# Messages.


def conversation(value: Any, origin: str, roles: Mapping[str, str] = _NO_ROLES) -> list[Message]:
    """The messages of a conversation to learn from, as templates want them; arguments are those of `messages_of`.

    Raises:
      RecordError: it is none, or nobody answers in it.
    """
    messages = messages_of(value, origin, roles)
    if not any(message["role"] == "assistant" for message in messages):
        raise RecordError(f"{origin}: no message is of the assistant: there is nothing to learn")
    return messages


def named_roles(entries: Sequence[str]) -> dict[str, str]:
    """The roles that the entries of `data.roles`, NAME=ROLE, stand for."""
    return {name: role for name, _, role in (entry.partition("=") for entry in entries)}


def messages_of(value: Any, origin: str, roles: Mapping[str, str] = _NO_ROLES) -> list[Message]:
    """The messages of any conversation.

    Args:
      value: a list of {role, content} with what else a message has, or of ShareGPT's {from, value}; or, as TFDS keeps
        it, an object of lists. Content may be a list of parts of type text.
      origin: where it was read, for messages.
      roles: other names of roles.

    Raises:
      RecordError: it is none.
    """
    require_shallow(value, origin)
    if isinstance(value, dict) and value and all(isinstance(part, list) for part in value.values()):
        value = [dict(zip(value, parts, strict=False)) for parts in zip(*value.values(), strict=False)]
    if not isinstance(value, list) or not value:
        raise RecordError(f"{origin}: a conversation is a list of messages, each with a role and content")
    return [_message(one, number, origin, roles) for number, one in enumerate(value, 1)]


def _message(value: Any, number: int, origin: str, roles: Mapping[str, str]) -> Message:
    where = f"{origin}: message {number}"
    if not isinstance(value, dict):
        raise RecordError(f"{where} is not an object with a role and content")
    message = {key: part for key, part in value.items() if part is not None}
    if "role" not in message and "from" in message:
        message = _of_sharegpt(message, where, roles)
    if isinstance(message.get("content"), list):
        message = message | {"content": _text_of_parts(message["content"], where)}
    for key in ("role", "content"):
        if key not in message and (key == "role" or "tool_calls" not in message):
            raise RecordError(f"{where} has no {key}; it has: {', '.join(message) or 'nothing'}")
        if key in message and not isinstance(message[key], str):
            raise RecordError(f"{where}: its {key} is not text")
    role = roles.get(message["role"], message["role"])
    if role not in ROLES:
        raise RecordError(f"{where} is of {role!r}, not of one of {', '.join(ROLES)}; {_ROLES_REMEDY}")
    return message | {"role": role}


def _text_of_parts(parts: list[Any], where: str) -> str:
    """The text of content that is given as a list of parts, as multimodal models have it."""
    texts = []
    for part in parts:
        if not isinstance(part, dict):
            raise RecordError(f"{where}: its content is not text")
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            shown = repr(part.get("type"))[:40]
            raise RecordError(
                f"{where}: a part of its content is of type {shown}, which is not supported: only text is"
            )
        texts.append(part["text"])
    return "".join(texts)


def _of_sharegpt(message: Message, where: str, roles: Mapping[str, str]) -> Message:
    who = message["from"]
    known = _SHAREGPT | dict(roles)
    if not isinstance(who, str) or who not in known:
        shown = repr(who)[:40]
        raise RecordError(f"{where} is from {shown}, not from one of {', '.join(known)}; {_ROLES_REMEDY}")
    rest = {key: part for key, part in message.items() if key not in ("from", "value")}
    return rest | {"role": known[who]} | ({"content": message["value"]} if "value" in message else {})


def of_pair(text: str, answer: str, more: str = "") -> list[Message]:
    """A text of the user, perhaps with more input in a paragraph after it, and the answer to it."""
    return [
        {"role": "user", "content": f"{text}\n\n{more}" if more else text},
        {"role": "assistant", "content": answer},
    ]


def answers(messages: Sequence[Message]) -> list[int]:
    """Which messages are learnt: those of the assistant that say or do something."""
    says = lambda message: "tool_calls" in message or bool(message["content"].strip())
    return [i for i, message in enumerate(messages) if message["role"] == "assistant" and says(message)]


# What is learnt.


def learn(talk: Mapping[str, Any], template: Template, words: Tokenizer, origin: str) -> list[Learnt]:
    """What is learnt from a conversation.

    Args:
      talk: `messages`, and what else the template may look at.
      template: that puts it into words.
      words: the vocabulary.
      origin: where it stands, for messages.

    Raises:
      ConfigError: the template is wrong, or begins an answer otherwise than it writes it.
      RecordError: the template does not take it, or writes nothing of its answers.
    """
    guard = guard_of(words)
    value, seam = guard.hide(dict(talk), origin)
    found = _texts(value, template, origin)
    made = [_learnt(guard, *guard.settle(text, cuts, seam), seam) for text, cuts in found]
    made = [_with_beginning(one, words) for one in made if one.marks.any()]
    if not made:
        raise RecordError(f"{origin}: the chat template writes nothing of its answers")
    return made


def _texts(value: Mapping[str, Any], template: Template, origin: str) -> list[tuple[str, list[int]]]:
    """The conversation in words, or each of its answers with all that is before it; and where answers begin and end."""
    parts = [part for i in answers(value["messages"]) for part in ((i, True), (i + 1, False))]
    texts = chat_template.fill_in(template, value, parts, origin)
    pairs = list(zip(texts[::2], texts[1::2], strict=True))
    for prompt, whole in pairs:
        if not whole.startswith(prompt):
            shared = next(i for i in range(len(prompt)) if prompt[i] != whole[i : i + 1])
            raise ConfigError(
                f"{origin}: the chat template {template.origin} asks for an answer with {prompt[shared:][:40]!r}, "
                f"but writes one that begins with {whole[shared:][:40]!r}"
            )
    if all(texts[-1].startswith(text) for text in texts):
        return [(texts[-1], [len(text) for text in texts])]
    return [(whole, [len(prompt), len(whole)]) for prompt, whole in pairs]


def _learnt(guard: Guard, text: str, cuts: list[int], seam: str) -> Learnt:
    """Tokens of a text that are prompts and answers in turn, with their marks."""
    ids, marks, num_bytes = [], [], 0
    for number, spans in enumerate(_parts(guard, text, cuts, seam)):
        ids.append(spans.ids)
        marks.append(np.zeros(len(spans.ids), np.int32))
        if number % 2:
            begin, end, stop = cuts[number - 1], *_end_of(guard, spans, text[: cuts[number]])
            marks[-1][:stop] = 1
            num_bytes += len(guard.reveal(text[begin:end], seam).encode())
    return Learnt(np.concatenate(ids), np.concatenate(marks), num_bytes)


def _end_of(guard: Guard, spans: Spans, text: str) -> tuple[int, int]:
    """Where the text of an answer ends, and how many of its tokens count.

    They count up to the last special token if there is nothing but blanks behind it, else up to the last that is none.
    """
    special = np.flatnonzero(guard.tokens_at(spans, text))
    if len(special) and not text[spans.ends[special[-1]] :].strip():
        return int(spans.begins[special[-1]]), int(special[-1]) + 1
    end = len(text.rstrip())
    return end, int(np.searchsorted(spans.begins, end, "left"))


def _parts(guard: Guard, text: str, cuts: list[int], seam: str) -> list[Spans]:
    """Tokens of each part, the parts ending at the cuts.

    They are those of the whole text, unless the text up to a cut, which is what will be read when an answer is asked
    for, has others: then each part is encoded on its own.
    """
    whole = guard.encode(text, seam)
    special = guard.tokens_at(whole, text)
    places = [_place(guard, text, cut, whole, special, seam) for cut in cuts]
    if None in places:
        return [_apart(guard, text[:end], begin, seam) for begin, end in itertools.pairwise([0, *cuts])]
    return [Spans(*(array[a:b] for array in whole)) for a, b in itertools.pairwise([0, *places])]


def _place(guard: Guard, text: str, cut: int, whole: Spans, special: np.ndarray, seam: str) -> int | None:
    """How many tokens the text up to a cut has; None if it has others than the whole text begins with."""
    before = np.flatnonzero(special & (whole.ends <= cut))
    # What is before a special token has no say in how the text behind it is encoded.
    first, begin = (int(before[-1]), int(whole.begins[before[-1]])) if len(before) else (0, 0)
    head = guard.encode(text[begin:cut], seam).ids
    place = first + len(head)
    same = np.array_equal(whole.ids[first:place], head)
    return place if same and (whole.begins[place:] >= cut).all() and (whole.ends[:place] <= cut).all() else None


def _apart(guard: Guard, text: str, begin: int, seam: str) -> Spans:
    """Tokens of a text from some place on, without the blank that a vocabulary may put before a text of its own."""
    if begin:
        anchor, spans = guard.encode(_ANCHOR, seam).ids, guard.encode(_ANCHOR + text[begin:], seam)
        rest = Spans(*(array[len(anchor) :] for array in spans))
        if np.array_equal(spans.ids[: len(anchor)], anchor) and (rest.begins >= 1).all():
            return Spans(rest.ids, rest.begins + begin - 1, rest.ends + begin - 1)
    spans = guard.encode(text[begin:], seam)
    return Spans(spans.ids, spans.begins + begin, spans.ends + begin)


def _with_beginning(learnt: Learnt, words: Tokenizer) -> Learnt:
    """The same, with something to read before the first token of an answer."""
    if not learnt.marks[0]:
        return learnt
    return learnt._replace(ids=np.insert(learnt.ids, 0, words.bos_id), marks=np.insert(learnt.marks, 0, 0))


# What is asked.


def prompt(talk: Mapping[str, Any], template: Template, words: Tokenizer, origin: str) -> np.ndarray:
    """The ids that a model reads before it answers a conversation, int32 [n]; errors are those of `fill_in`."""
    guard = guard_of(words)
    value, seam = guard.hide(dict(talk), origin)
    [text] = chat_template.fill_in(template, value, [(len(value["messages"]), True)], origin)
    return guard.encode(guard.settle(text, (), seam)[0], seam).ids


def ending(template: Template, words: Tokenizer) -> Ending:
    """How a template ends an answer, as it does with one of its own.

    Raises:
      ConfigError: it does not, so that no model could learn to.
    """
    [text] = chat_template.fill_in(template, {"messages": of_pair("Question", _PROBE)}, [(2, False)], "an example")
    behind = text[text.rfind(_PROBE) + len(_PROBE) :]
    spans = words.encode_framed(behind)
    special = np.flatnonzero(guard_of(words).tokens_at(spans, behind))
    if len(special):
        return Ending((int(spans.ids[special[0]]),), ())
    if mark := behind.strip():
        return Ending((), (mark,))
    raise ConfigError(
        f"the chat template {template.origin} does not mark where an answer ends: put {{{{ eos_token }}}} behind it"
    )
