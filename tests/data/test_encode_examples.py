"""What an objective makes of an example of each kind: texts, tokens, numbers, and what tells two of them apart."""

import random

import numpy as np
import pytest

from lslm_jax.config import CleanConfig, Source, TokenizerConfig
from lslm_jax.data import encode_examples, label_names
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.readers import squad
from lslm_jax.data.tokenizers import train
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.errors import DataError

REMEDY = "; correct it, or name all by data.labels"
WORDS = "the old caf\u00e9 in town 42, (whose) \U0001f600 owner's name is Zo\u00eb na\u00efve \ud55c\uad6d".split()
QUESTION = {
    "id": "q",
    "question": "Who?",
    "context": "It was Zo\u00eb \U0001f600 of the caf\u00e9.",
    "answers": [{"text": "Zo\u00eb", "start": 7}],
}


def recipe(example: str, objective: str, names=(), **settings) -> Recipe:
    return Recipe(Source(example=example, **settings), objective, {name: i for i, name in enumerate(names)})


@pytest.fixture(scope="module", params=["bytes", "bpe", "unigram"])
def tokenizer(request) -> Tokenizer:
    if request.param == "bytes":
        return Bytes()
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))] * 3
    return train.train(iter(texts), TokenizerConfig(model=request.param, vocab_size=310))


@pytest.mark.parametrize(
    ("given", "example", "expected"),
    [
        (recipe("pair", "seq2seq"), {"source": "a", "target": "b"}, ["a", "b"]),
        (recipe("pair", "seq2seq", prefix="say: "), {"source": "a", "target": ""}, ["say: a", ""]),
        (recipe("label", "seq2seq", prefix="sst2: "), {"text": "good", "label": "pos"}, ["sst2: good", "pos"]),
        (
            recipe("label", "seq2seq", prefix="mnli ", text_key="x/premise", target_key="hypothesis"),
            {"text": "a", "target": "b", "label": "neutral"},
            ["mnli premise: a hypothesis: b", "neutral"],
        ),
        (
            recipe("qa", "seq2seq", prefix="squad "),
            QUESTION,
            [f"squad question: Who? context: {QUESTION['context']}", "Zo\u00eb"],
        ),
        (recipe("qa", "seq2seq"), QUESTION | {"answers": []}, [f"question: Who? context: {QUESTION['context']}", ""]),
        (recipe("label", "classification", prefix="not: "), {"text": "good", "label": "pos"}, ["good"]),
        (recipe("label", "regression", target_key="b"), {"text": "a", "target": "b", "label": 1.5}, ["a", "b"]),
        (recipe("tags", "tagging"), {"words": ["a", "b"], "tags": ["x", "y"]}, ["a b"]),
        (recipe("qa", "qa", prefix="not: "), QUESTION, ["Who?", QUESTION["context"]]),
        (recipe("text", "masked", prefix="not: "), {"text": "a"}, ["a"]),
    ],
)
def test_what_is_tokenised(given, example, expected):
    assert encode_examples.texts(example, given) == expected
    predicted = expected[1:] if given.objective == "seq2seq" else expected
    assert encode_examples.num_bytes(example, given) == sum(len(text.encode()) for text in predicted)


def test_fields_and_numbers_have_the_promised_shape(tokenizer):
    label = {"text": "the old caf\u00e9", "target": "in town", "label": "pos"}
    cases = [
        (recipe("text", "causal"), {"text": "a"}),
        (recipe("pair", "seq2seq"), {"source": "a", "target": "b"}),
        (recipe("label", "classification", ("neg", "pos")), label | {"target": None}),
        (recipe("label", "classification", ("neg", "pos"), target_key="b"), label),
        (recipe("label", "regression"), label | {"label": -0.25}),
        (recipe("label", "seq2seq", ("neg", "pos")), label),
        (recipe("tags", "tagging", ("x",)), {"words": ["a"], "tags": ["x"]}),
        (recipe("qa", "qa"), QUESTION),
        (recipe("qa", "seq2seq"), QUESTION),
    ]
    for given, example in cases:
        if not given.source.target_key and given.source.example == "label":
            example = {key: part for key, part in example.items() if key != "target"}
        [[encoded]] = encode_examples.encode([example], given, tokenizer)
        assert (len(encoded.fields), len(encoded.numbers)) == encode_examples.shape(given.source, given.objective)
        if given.source.example != "tags":
            for ids, text in zip(encoded.fields, encode_examples.texts(example, given), strict=True):
                np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert encode_examples.encode([label], cases[3][0], tokenizer)[0][0].numbers == (1,)
    assert encode_examples.encode([label | {"label": -0.25}], cases[4][0], tokenizer)[0][0].numbers == (-0.25,)


def test_the_tokens_of_an_answer_are_the_fewest_that_hold_its_characters(tokenizer):
    pick = random.Random(0)
    for _ in range(100):
        context = " ".join(pick.choices(WORDS, k=20))
        start = pick.randrange(len(context) - 1)
        end = pick.randrange(start + 1, min(len(context), start + 30))
        example = QUESTION | {"context": context, "answers": [{"text": context[start:end], "start": start}]}
        [[encoded]] = encode_examples.encode([example], recipe("qa", "qa"), tokenizer)
        first, last = map(int, encoded.numbers)
        spans = tokenizer.encode_with_offsets(context)
        assert spans.begins[first] <= start < spans.ends[first]
        assert spans.begins[last] < end <= spans.ends[last]
        assert first == 0 or spans.ends[first - 1] <= start
        assert last == len(spans.ids) - 1 or spans.begins[last + 1] >= end
        assert context[start:end] in context[spans.begins[first] : spans.ends[last]]


def test_no_answer_and_no_answer_in_its_place_have_no_tokens():
    given, tokenizer, config = recipe("qa", "qa"), Bytes(), CleanConfig(min_chars=1000)
    wrong = [{"text": "Zo\u00eb", "start": 8}, {"text": "", "start": 0}, {"text": "Zo\u00eb", "start": -19}]
    for answers, why in [([], None), (wrong, "misplaced_answer"), ([*wrong, QUESTION["answers"][0]], None)]:
        example = QUESTION | {"answers": answers}
        assert encode_examples.reason(example, given, config) == why
        [[encoded]] = encode_examples.encode([example], given, tokenizer)
        assert (encoded.numbers == (-1, -1)) == (answers == [] or why is not None)


def test_each_words_first_token_has_its_tag_and_no_other_has_any(tokenizer):
    pick = random.Random(0)
    given = recipe("tags", "tagging", ("O", "B", "I"))
    odd = ["", "\u200b", "New York", " ", "x"]
    for vocabulary_words in (WORDS, WORDS + odd):
        for count in (0, 1, 2, 17):
            words = pick.choices(vocabulary_words, k=count)
            tags = pick.choices(list(given.labels), k=count)
            [[encoded]] = encode_examples.encode([{"words": words, "tags": tags}], given, tokenizer)
            ids, marks = encoded.fields
            assert len(ids) == len(marks)
            assert [list(given.labels)[mark - 1] for mark in marks[marks > 0]] == tags
            if vocabulary_words is WORDS:
                assert tokenizer.decode(ids) == " ".join(words)
                parts = np.split(ids, np.flatnonzero(marks))[1:]
                assert [tokenizer.decode(part).strip() for part in parts] == words


def test_lengths_are_those_of_the_source_text_and_questions_are_left_alone():
    config = CleanConfig(min_chars=3, max_chars=8, whitespace="collapse")
    pair = recipe("pair", "seq2seq")
    assert encode_examples.reason({"source": "ab", "target": "long enough"}, pair, config) == "too_short"
    assert encode_examples.reason({"source": "abc", "target": ""}, pair, config) is None
    assert (
        encode_examples.reason({"text": "123456789", "label": "x"}, recipe("label", "classification"), config)
        == "too_long"
    )
    assert encode_examples.reason({"words": ["ab", "cd"], "tags": []}, recipe("tags", "tagging"), config) is None
    context = "e\u0301  \x07 x"
    question = QUESTION | {"context": context}
    assert encode_examples.cleaned(question, recipe("qa", "qa"), config) == question
    cleaned = encode_examples.cleaned(
        {"words": ["e\u0301", "a\x07"], "tags": ["x", "y"]}, recipe("tags", "tagging"), config
    )
    assert cleaned == {"words": ["\u00e9", "a"], "tags": ["x", "y"]}
    assert encode_examples.cleaned({"source": " a  b ", "target": "c  d"}, pair, config) == {
        "source": "a b",
        "target": "c d",
    }


def test_the_whole_example_tells_duplicates():
    pair, qa = recipe("pair", "seq2seq"), recipe("qa", "qa")
    one = encode_examples.digest({"source": "a", "target": "b"}, pair)
    assert one == encode_examples.digest({"target": "b", "source": "a"}, pair)
    assert one != encode_examples.digest({"source": "a", "target": "c"}, pair)
    assert encode_examples.digest(QUESTION, qa) == encode_examples.digest(QUESTION | {"id": "other"}, qa)
    assert encode_examples.digest(QUESTION, qa) != encode_examples.digest(QUESTION | {"question": "What?"}, qa)


def test_bytes_become_text_by_the_policy():
    given = recipe("pair", "seq2seq")
    bad = {"source": b"a\xff", "target": "b"}
    with pytest.raises(DataError, match=r"^f:3: byte 0xff at offset 1 is not UTF-8"):
        encode_examples.decode(bad, given, "strict", "f:3")
    assert encode_examples.decode(bad, given, "skip", "f:3") is None
    assert encode_examples.decode(bad, given, "replace", "f:3") == {"source": "a\ufffd", "target": "b"}
    question = {**QUESTION, "context": "a\udcffZo\u00eb", "answers": [{"text": "Zo\u00eb", "start": 2}]}
    decoded = encode_examples.decode(question, recipe("qa", "qa"), "replace", "f")
    assert encode_examples.reason(decoded, recipe("qa", "qa"), CleanConfig()) is None


# Labels.


def test_a_label_is_a_name_or_its_number():
    numbers = {"neg": 0, "pos": 1}
    for label in ("pos", b"pos", 1, "1", 1.0, b"1", " pos\r"):
        assert label_names.name(label, numbers, "f:1") == "pos"
    for label in ("Pos", 2, -1, "", True, 0.5):
        with pytest.raises(DataError) as error:
            label_names.name(label, numbers, "f:7")
        assert str(error.value) == f"f:7: unknown label {label_names.spell(label)!r}; known are: neg, pos{REMEDY}"


def test_names_that_are_numbers_are_names_first():
    assert label_names.name(1, {"1": 0, "2": 1}, "f") == "1"
    assert label_names.in_order({"10", "9", "-1", "2.5"}) == ["-1", "2.5", "9", "10"]
    assert label_names.in_order({"10", "9", "b"}) == ["10", "9", "b"]


def test_a_value_is_a_finite_number():
    assert [label_names.value(label, "f") for label in (1, "2.5", b"-3e1")] == [1.0, 2.5, -30.0]
    for label in ("high", "nan", float("inf")):
        with pytest.raises(DataError, match=r"^f:2: label '\w+' is not a number, as task.objective=regression wants"):
            label_names.value(label, "f:2")


def test_words_and_tags_are_equally_many():
    given = recipe("tags", "tagging", ("O",))
    assert encode_examples.decode({"words": ["a"], "tags": [0]}, given, "strict", "f")["tags"] == ["O"]
    with pytest.raises(DataError, match=r"^f:1: 2 words, but 1 tags$"):
        encode_examples.decode({"words": ["a", "b"], "tags": ["O"]}, given, "strict", "f:1")
    with pytest.raises(DataError, match=r"^f:1: unknown label 'B'; known are: O; correct it"):
        encode_examples.decode({"words": ["a"], "tags": ["B"]}, given, "strict", "f:1")


@pytest.mark.parametrize(
    "answers",
    [
        {"text": ["Zo\u00eb"], "answer_start": [7]},
        [{"text": "Zo\u00eb", "answer_start": 7}],
        [{"text": "Zo\u00eb", "start": 7}],
    ],
)
def test_answers_are_read_in_all_their_forms(answers):
    assert squad.flat(QUESTION | {"answers": answers}, "f:1") == QUESTION
    assert squad.flat({**QUESTION, "answers": answers, "id": None}, "f:1")["id"] == "f:1"


@pytest.mark.parametrize("answers", [{"text": ["a"]}, [{"text": "a"}], ["a"], {"text": ["a"], "answer_start": []}])
def test_other_forms_of_answers_are_refused(answers):
    with pytest.raises(DataError, match=r"^f:1: answers want text and answer_start, got "):
        squad.flat(QUESTION | {"answers": answers}, "f:1")
