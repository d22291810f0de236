"""Conversations in words and in ids are here what they are in transformers, for templates of every shape."""

import datetime
import json

import numpy as np
import pytest
from chat_shapes import SHAPES, SPECIAL
from etils import epath

from lslm_jax.config import Config, DataConfig, TokenizerConfig
from lslm_jax.data.chat import chat_template, tokenize_chat
from lslm_jax.data.chat.special_token_escaping import guard_of
from lslm_jax.data.tokenizers.loading import load_tokenizer

pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TALK = [
    {"role": "system", "content": "You are terse.\n"},
    {"role": "user", "content": " What is 2 < 3? > said she, caf\u00e9 \U0001f600 "},
    {"role": "assistant", "content": "<think>\nObvious.\n</think>\n\nTrue, if 2 <"},
    {"role": "user", "content": "And\n\n3 < 2?"},
    {"role": "assistant", "content": "  False.\n"},
]
WORDS = [message["content"] for message in TALK] + ["INST SYS user assistant system model Today: Be of help."] * 3
TAKES_NO_SYSTEM = ("gemma",)


def trained(kind: str):
    """A vocabulary that treats blanks in one of the ways that are about."""
    import tokenizers as library
    from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

    made = library.Tokenizer(models.BPE(byte_fallback=kind != "bytes", unk_token=None if kind == "bytes" else "<unk>"))
    alphabet = []
    if kind == "bytes":
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind == "prepend":
        made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    basic = ["<unk>", "<s>", "</s>", *([] if kind == "bytes" else [f"<0x{byte:02X}>" for byte in range(256)])]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=basic, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(WORDS, trainer)
    content = json.loads(made.to_str())
    content["added_tokens"] = content["added_tokens"][:3]  # bytes are ordinary pieces
    made = library.Tokenizer.from_str(json.dumps(content))
    made.add_special_tokens([*SPECIAL[:-1], library.AddedToken(SPECIAL[-1], rstrip=True, special=True)])
    made.add_tokens(["<think>", "</think>"])
    return made


@pytest.fixture(scope="module", params=["bytes", "prepend", "first", "always", "never"])
def vocabulary(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    trained(request.param).save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


@pytest.fixture(scope="module")
def theirs(vocabulary):
    return transformers.AutoTokenizer.from_pretrained(vocabulary)


@pytest.fixture(scope="module")
def words(vocabulary):
    return load_tokenizer(epath.Path(vocabulary) / "tokenizer.json")


def template_of(shape, vocabulary, words, tmp_path):
    """As a config finds it."""
    path = tmp_path / "template.jinja"
    path.write_text(SHAPES[shape])
    data = DataConfig(chat_template=str(path), example="chat")
    given = TokenizerConfig(kind="huggingface", path=f"{vocabulary}/tokenizer.json")
    return chat_template.choose(Config(data=data, tokenizer=given), words)


def talk_for(shape):
    return TALK[1:] if shape in TAKES_NO_SYSTEM else TALK


def expected(theirs, shape, messages, tokenize=True, **more):
    found = theirs.apply_chat_template(messages, chat_template=SHAPES[shape], tokenize=tokenize, **more)
    return found["input_ids"] if tokenize else found


@pytest.mark.parametrize("shape", SHAPES)
def test_texts_and_ids_of_a_conversation_are_those_of_transformers(shape, vocabulary, words, theirs, tmp_path):
    template, messages = template_of(shape, vocabulary, words, tmp_path), talk_for(shape)
    guard = guard_of(words)
    for count in range(2, len(messages) + 1):
        asks = messages[count - 1]["role"] == "user"
        talk = {"messages": messages[:count]}
        [text] = chat_template.fill_in(template, talk, [(count, asks)], "here")
        assert text == expected(theirs, shape, messages[:count], tokenize=False, add_generation_prompt=asks)
        ids = expected(theirs, shape, messages[:count], add_generation_prompt=asks)
        assert words.encode_framed(text).ids.tolist() == ids
        hidden, seam = guard.hide(talk, "a.jsonl:1")
        [text] = chat_template.fill_in(template, hidden, [(count, asks)], "here")
        assert guard.encode(guard.settle(text, (), seam)[0], seam).ids.tolist() == ids
        if asks:
            assert tokenize_chat.prompt(talk, template, words, "here").tolist() == ids


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_learnt_is_what_transformers_reads_and_the_model_will_be_asked(
    shape, vocabulary, words, theirs, tmp_path
):
    template, messages = template_of(shape, vocabulary, words, tmp_path), talk_for(shape)
    learnt = tokenize_chat.learn({"messages": messages}, template, words, "here")
    places = tokenize_chat.answers(messages)
    if shape == "thinking":
        assert len(learnt) == len(places)
        wholes = [expected(theirs, shape, messages[: i + 1]) for i in places]
    else:
        assert len(learnt) == 1
        wholes = [expected(theirs, shape, messages)]
    prompts = [expected(theirs, shape, messages[:i], add_generation_prompt=True) for i in places]
    for one, whole in zip(learnt, wholes, strict=True):
        assert one.ids.tolist() == whole
        begins = np.flatnonzero(np.diff(one.marks, prepend=0) == 1)
        for begin in begins:
            assert whole[:begin] in prompts


def test_tools_are_told_as_in_transformers(vocabulary, words, theirs, tmp_path):
    template = template_of("llama3", vocabulary, words, tmp_path)
    tools = [{"type": "function", "function": {"name": "caf\u00e9", "description": "<&>", "parameters": {}}}]
    [text] = chat_template.fill_in(template, {"messages": TALK, "tools": tools}, [(5, False)], "here")
    assert text == expected(theirs, "llama3", TALK, tokenize=False, tools=tools)
    assert datetime.datetime.now().strftime("%Y") in text
