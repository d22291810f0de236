"""From an example of any kind to the texts, token fields and numbers that an objective wants of it.

    example        objective        fields                                numbers
    text           any of its own   the text                              none
    any other      seq2seq          source with its prefix, target        none
    label          classification   the text, the second where there is   the class
    label          regression       the same                              the value
    tags           tagging          the text of the words; tags           none
    qa             qa               question, context                     first and last token of the answer, or -1, -1
    chat           causal           all in its template's words; marks    first token of an answer, and how many

A conversation may make several examples (`chat.py`). Its marks are as many as its tokens, 1 for those of answers. Tags
are as many as the text's tokens: the first token of each word has the number of its tag plus 1, the others 0.
"""

import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from lslm_jax.config import CleanConfig, Source
from lslm_jax.data import label_names
from lslm_jax.data.chat import tokenize_chat
from lslm_jax.data.chat.chat_template import Template
from lslm_jax.data.prepare import cleaning
from lslm_jax.data.readers.example_schema import BadRecord, RecordError
from lslm_jax.data.readers.sources import Content
from lslm_jax.data.tokenizers.base import Tokenizer

_TEXTS = {"text": ("text",), "pair": ("source", "target"), "label": ("text", "target"), "tags": ("words",)}
_TEXTS |= {"qa": (), "chat": ()}  # the first stay as they are, the second are cleaned message by message
_LENGTH = {"text": "text", "pair": "source", "label": "text"}
_STAND_IN = "?"  # for a word that leaves no token

Example = dict[str, Any]
_Parts = tuple[list[np.ndarray], tuple[float, ...]]  # fields and numbers


class Recipe(NamedTuple):
    """What is made of a source's examples.

    Attributes:
      source: where they come from; `example`, the keys and `prefix` are read.
      objective: task.objective.
      labels: the number of each class or tag, in their order.
      template: that conversations are put into words by.
      held_out: the share of digests, from the smallest on, whose examples are held out; None: the source's
        `valid_fraction`.
    """

    source: Source
    objective: str
    labels: Mapping[str, int]
    template: Template | None = None
    held_out: float | None = None

    @property
    def valid_fraction(self) -> float:
        """The share of digests whose examples are held out."""
        return self.source.valid_fraction if self.held_out is None else self.held_out


class Encoded(NamedTuple):
    """An example as shards hold it.

    Attributes:
      fields: its tokens.
      numbers: its class, or whatever else.
      num_bytes: of UTF-8 that are to be predicted.
    """

    fields: list[np.ndarray]
    numbers: tuple[float, ...]
    num_bytes: int


def shape(source: Source, objective: str) -> tuple[int, int]:
    """Token fields and numbers of one example of a source."""
    if source.example == "text":
        return 1, 0
    if objective == "seq2seq" or source.example == "tags":
        return 2, 0
    if source.example in ("qa", "chat"):
        return 2, 2
    return (2 if source.target_key else 1), 1


def size(content: Any) -> int:
    """About how many characters there are in what was read."""
    if isinstance(content, dict):
        return sum(map(size, content.values()))
    if isinstance(content, list):
        return sum(map(size, content))
    return len(content) if isinstance(content, (str, bytes)) else 8


def decode(
    content: Content, recipe: Recipe, policy: Literal["strict", "replace", "skip"], origin: str
) -> Example | None:
    """The example as text, with a label's or tag's name in place of its number; None where it is to be skipped.

    Raises:
      RecordError: words and tags are not equally many; a label is no number; it is no conversation; or it was a bad
        record when it was read.
      DataError: it is undecodable and the policy is strict; a label is unknown.
    """
    if isinstance(content, BadRecord):
        raise RecordError(content.message)
    try:
        example: Example = _decode(content if isinstance(content, dict) else {"text": content}, policy, origin)
    except _Undecodable:
        return None
    if "label" in example:
        regression = recipe.objective == "regression"
        label = example["label"]
        if not label_names.is_missing(label):
            label = label_names.value(label, origin) if regression else label_names.name(label, recipe.labels, origin)
            example = example | {"label": label}
    if "tags" in example:
        if len(example["words"]) != len(example["tags"]):
            raise RecordError(f"{origin}: {len(example['words'])} words, but {len(example['tags'])} tags")
        if not any(map(label_names.is_missing, example["tags"])):
            example = example | {"tags": [label_names.name(tag, recipe.labels, origin) for tag in example["tags"]]}
    return _talk(example, recipe.source, origin) if recipe.source.example == "chat" else example


def lacks_label(example: Example) -> bool:
    """True if an example has an empty label, or an empty tag."""
    found = [example["label"]] if "label" in example else example.get("tags", [])
    return any(map(label_names.is_missing, found))


def _talk(example: Example, source: Source, origin: str) -> Example:
    """A conversation with the place where it was read, which its template may complain of."""
    if "messages" not in example:
        more = example.get("input") or ""
        return {"messages": tokenize_chat.of_pair(example["text"], example["target"], more), "origin": origin}
    tools = {"tools": example["tools"]} if example.get("tools") else {}
    roles = tokenize_chat.named_roles(source.roles)
    return tools | {"messages": tokenize_chat.conversation(example["messages"], origin, roles), "origin": origin}


class _Undecodable(Exception):
    pass


def _decode(value: Any, policy: Literal["strict", "replace", "skip"], origin: str) -> Any:
    if isinstance(value, dict):
        return {_decode(key, policy, origin): _decode(part, policy, origin) for key, part in value.items()}
    if isinstance(value, list):
        return [_decode(part, policy, origin) for part in value]
    if not isinstance(value, (str, bytes)):
        return value
    text = cleaning.decode(value, policy, origin)
    if text is None:
        raise _Undecodable
    return text


_UNITS = {
    "text": ("document", "documents"),
    "pair": ("pair", "pairs"),
    "label": ("labelled text", "labelled texts"),
    "tags": ("tagged text", "tagged texts"),
    "qa": ("question", "questions"),
    "chat": ("conversation", "conversations"),
}


def noun(source: Source, plural: bool = False) -> str:
    """The word for an example of a source."""
    return _UNITS[source.example][plural]


def units(sources: Iterable[Source], count: int) -> str:
    """A number of examples with the word for what they are: `1 document`, `2 pairs`."""
    kinds = {source.example for source in sources}
    singular, plural = _UNITS[kinds.pop()] if len(kinds) == 1 else ("example", "examples")
    return f"{count:,} {singular if count == 1 else plural}"


def nothing(recipes: Mapping[str, Recipe], dropped: Mapping[str, int], held_out: int = 0) -> str:
    """A message for a source without any example to train on, with the cause.

    Args:
      recipes: the sources.
      dropped: examples by reason.
      held_out: how many of the duplicates are also among the held-out examples.
    """
    what = ", ".join(" ".join(recipe.source.files) or recipe.source.tfds for recipe in recipes.values())
    message = f"nothing to train on in {what}; dropped: {counted(dropped) or 'none'}"
    if held_out:
        return f"{message}; {held_out:,} of them are also in the held-out data: name other files to train on"
    if not dropped and any(recipe.source.valid_files or recipe.source.test_files for recipe in recipes.values()):
        return f"{message}: every file of data.files is also held out by data.valid_files or data.test_files"
    return message if dropped else f"{message}: there are no records in it"


def counted(dropped: Mapping[str, int]) -> str:
    """How many examples were dropped, and why: `3 duplicate, 1 too_short`."""
    return ", ".join(f"{count:,} {why}" for why, count in sorted(dropped.items()))


def cleaned(example: Example, recipe: Recipe, config: CleanConfig) -> Example:
    """The example with its texts cleaned; a question and its context stay, since answers name places in them."""
    done = {}
    if recipe.source.example == "chat":
        done["messages"] = [
            message | {"content": cleaning.clean_text(message["content"], config)} if "content" in message else message
            for message in example["messages"]
        ]
    for key in _TEXTS[recipe.source.example]:
        if example.get(key) is not None:
            part = example[key]
            done[key] = (
                [cleaning.clean_text(word, config) for word in part]
                if isinstance(part, list)
                else cleaning.clean_text(part, config)
            )
    return example | done


def reason(example: Example, recipe: Recipe, config: CleanConfig) -> str | None:
    """Why a cleaned example is not trained on; None where it is. Lengths are those of the source text."""
    kind = recipe.source.example
    if lacks_label(example):
        return "no_label"
    if kind == "qa":
        answers = example["answers"]
        return "misplaced_answer" if answers and _answer(example) is None else None
    if kind == "chat":
        answered = bool(tokenize_chat.answers(example["messages"]))
        return cleaning.reason("\n".join(texts(example, recipe)), config) if answered else "no_answer"
    return cleaning.reason(" ".join(example["words"]) if kind == "tags" else example[_LENGTH[kind]], config)


def digest(example: Example, recipe: Recipe) -> bytes:
    """16 bytes that stand for the whole cleaned example, but for its id and where it was read."""
    if recipe.source.example == "text":
        return cleaning.digest(example["text"])
    return cleaning.digest(
        json.dumps({key: part for key, part in example.items() if key not in ("id", "origin")}, sort_keys=True)
    )


def signature(example: Example, recipe: Recipe) -> np.ndarray | None:
    """What tells near duplicates; None for kinds that may share most of their text and yet differ in what is asked."""
    if recipe.source.example not in ("text", "pair"):
        return None
    return cleaning.signature("\n".join(example[key] for key in _TEXTS[recipe.source.example]))


def texts(example: Example, recipe: Recipe) -> list[str]:
    """What is tokenised, in the order of the fields; of a conversation all that is said in it."""
    kind, prefix = recipe.source.example, recipe.source.prefix
    if kind == "tags":
        return [" ".join(example["words"])]
    if kind == "chat":
        return [message["content"] for message in example["messages"] if "content" in message]
    if recipe.objective != "seq2seq" or kind == "text":
        keys = ("question", "context") if kind == "qa" else _TEXTS[kind]
        return [example[key] for key in keys if key in example]
    if kind == "pair":
        return [prefix + example["source"], example["target"]]
    if kind == "qa":
        first = example["answers"][0]["text"] if example["answers"] else ""
        return [f"{prefix}question: {example['question']} context: {example['context']}", first]
    return [prefix + _one_text(example, recipe.source), example["label"]]


def _one_text(example: Example, source: Source) -> str:
    """A text, or two that are told apart by the names of their fields, as T5 has them."""
    if "target" not in example:
        return example["text"]
    first, second = (key.split("/")[-1] for key in (source.text_key, source.target_key))
    return f"{first}: {example['text']} {second}: {example['target']}"


def num_bytes(example: Example, recipe: Recipe) -> int:
    """UTF-8 bytes of the text that is to be predicted: of the target, or of all where there is none."""
    found = texts(example, recipe)
    return sum(len(text.encode()) for text in (found[1:] if recipe.objective == "seq2seq" else found))


def encode(examples: Sequence[Example], recipe: Recipe, tokenizer: Tokenizer) -> list[list[Encoded]]:
    """What each example is in shards: itself, or of a conversation perhaps each answer.

    Raises:
      ConfigError, DataError: a chat template is wrong, or does not take a conversation.
    """
    match recipe.source.example, recipe.objective:
        case "chat", _:
            return [_encode_talk(example, recipe, tokenizer) for example in examples]
        case "tags", _:
            made = [_encode_tags(example, recipe.labels, tokenizer) for example in examples]
        case _, "qa":
            made = [_encode_question(example, tokenizer) for example in examples]
        case _:
            made = _encode_texts(examples, recipe, tokenizer)
    return [[Encoded(*parts, num_bytes(example, recipe))] for example, parts in zip(examples, made, strict=True)]


def _encode_texts(examples: Sequence[Example], recipe: Recipe, tokenizer: Tokenizer) -> list[_Parts]:
    rendered = [texts(example, recipe) for example in examples]
    pairs = recipe.objective == "seq2seq"
    firsts = iter(tokenizer.encode_batch([text for parts in rendered for text in (parts[:1] if pairs else parts)]))
    rest = iter(tokenizer.encode_targets([text for parts in rendered for text in parts[1:]])) if pairs else firsts
    fields = [[next(firsts), *(next(rest) for _ in parts[1:])] for parts in rendered]
    return [(parts, _numbers(example, recipe)) for example, parts in zip(examples, fields, strict=True)]


def text_fields(encoded: Encoded, recipe: Recipe) -> list[np.ndarray]:
    """The fields of an example that hold tokens, without tags and loss masks."""
    return encoded.fields[:1] if recipe.source.example in ("tags", "chat") else encoded.fields


def _encode_talk(example: Example, recipe: Recipe, tokenizer: Tokenizer) -> list[Encoded]:
    assert recipe.template is not None  # which was chosen with the vocabulary
    talk = {key: part for key, part in example.items() if key != "origin"}
    found = tokenize_chat.learn(talk, recipe.template, tokenizer, example["origin"])
    return [
        Encoded([one.ids, one.marks], (int(one.marks.argmax()), int(one.marks.sum())), one.num_bytes) for one in found
    ]


def _numbers(example: Example, recipe: Recipe) -> tuple[float, ...]:
    if recipe.objective == "classification":
        return (recipe.labels[example["label"]],)
    return (example["label"],) if recipe.objective == "regression" else ()


def _encode_question(example: Example, tokenizer: Tokenizer) -> _Parts:
    spans = tokenizer.encode_with_offsets(example["context"])
    place = _answer(example)
    first, last = (-1, -1) if place is None else covering(spans.begins, spans.ends, *place)
    return [tokenizer.encode(example["question"]), spans.ids], (first, last)


def _answer(example: Example) -> tuple[int, int] | None:
    """First character of the first answer that stands where it says, and the one after its last."""
    for answer in example["answers"]:
        start, end = answer["start"], answer["start"] + len(answer["text"])
        if end > start >= 0 and example["context"][start:end] == answer["text"]:
            return start, end
    return None


def covering(begins: np.ndarray, ends: np.ndarray, start: int, end: int) -> tuple[int, int]:
    """First and last of the fewest tokens that hold all of a text's characters [start, end); -1, -1 if none does."""
    first = int(np.searchsorted(ends, start, "right"))
    last = int(np.searchsorted(begins, end, "left")) - 1
    return (first, last) if first <= last else (-1, -1)


def _encode_tags(example: Example, numbers: Mapping[str, int], tokenizer: Tokenizer) -> _Parts:
    words = example["words"]
    ids, firsts = _words_together(words, tokenizer) or _words_apart(words, tokenizer)
    tags = np.zeros(len(ids), np.int32)
    tags[firsts] = [1 + numbers[tag] for tag in example["tags"]]
    return [ids, tags], ()


def _words_together(words: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]] | None:
    """Tokens of the words with single blanks between them, and the first of each; None if two share their first."""
    spans = tokenizer.encode_with_offsets(" ".join(words))
    firsts, start = [], 0
    for word in words:
        first, _ = covering(spans.begins, spans.ends, start, start + len(word))
        if not word or first < 0 or (firsts and first <= firsts[-1]):
            return None
        firsts.append(first)
        start += len(word) + 1
    return spans.ids, firsts


def _words_apart(words: list[str], tokenizer: Tokenizer) -> tuple[np.ndarray, list[int]]:
    """The same for odd words: those that would leave no token, or share one with the next."""
    parts = [tokenizer.encode((" " if i else "") + word) for i, word in enumerate(words)]
    parts = [part if len(part) else tokenizer.encode(_STAND_IN) for part in parts]
    firsts = functools.reduce(lambda found, part: [*found, found[-1] + len(part)], parts, [0])[:-1]
    return np.concatenate([*parts, np.empty(0, np.int32)]), firsts
