"""Conversations: only answers are learnt, templates are strangers' programs, and no text spells a special token."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import CleanConfig, Config, DataConfig, MixtureSource, TokenizerConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data import encode_examples
from lslm_jax.data.chat import chat_template, tokenize_chat
from lslm_jax.data.chat.chat_template import Template
from lslm_jax.data.chat.special_token_escaping import guard_of
from lslm_jax.data.dataloader import open_eval, open_train
from lslm_jax.data.encode_examples import Recipe
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.train import train as train_vocabulary
from lslm_jax.errors import ConfigError, DataError, InputMissing

TURNS = """\
{%- for message in messages %}{{ message.role + ':' + message.content + eos_token + '\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"""
FORGETS = """\
{%- set last = messages | length - (1 if messages[-1].role == 'user' else 2) %}
{%- for message in messages %}{{ message.role[0] + ':' }}
{%- set forgets = message.role == 'assistant' and loop.index0 < last %}
{{- (message.content.split('/')[-1] if forgets else message.content) + eos_token }}
{%- endfor %}{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"""
TOKENS = (("bos_token", "<s>"), ("eos_token", "</s>"))
VOCABULARY = 259  # of bytes


def template(text: str, **more) -> Template:
    return Template(text, TOKENS, "2020-02-03T04:05:06", "t.jinja")._replace(**more)


def fill_in(text: str, messages=()) -> str:
    talk = {"messages": list(messages) or tokenize_chat.of_pair("Hi", "Yo")}
    return chat_template.fill_in(template(text), talk, [(len(talk["messages"]), False)], "f:1")[0]


def turns(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def answers_of(learnt: tokenize_chat.Learnt, words) -> list[str]:
    """What is learnt, each stretch of it with the end token as |."""
    edges = np.flatnonzero(np.diff(learnt.marks, prepend=0, append=0))
    parts = [learnt.ids[begin:end] for begin, end in edges.reshape(-1, 2)]
    assert all(part[-1] == words.eos_id for part in parts)
    return [words.decode(part) for part in parts]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def words(request):
    if request.param == "bytes":
        return Bytes()
    texts = ["user assistant said <|im_start|> </s> that </s is not <s> an end\n"] * 9
    return train_vocabulary(iter(texts), TokenizerConfig(vocab_size=300))


# What is learnt.


def test_answers_alone_are_learnt_with_their_ends_and_nothing_behind(words):
    [learnt] = tokenize_chat.learn({"messages": turns("a", "b c", "d", " e\n")}, template(TURNS), words, "f:1")
    assert answers_of(learnt, words) == ["b c", " e\n"]
    assert learnt.num_bytes == len("b c") + len(" e\n")
    whole = words.decode(learnt.ids)
    assert whole.replace("\n", "") == "user:aassistant:b cuser:dassistant: e"
    assert (learnt.ids == words.eos_id).sum() == 4
    assert learnt.ids[0] != words.bos_id, "the template puts none"


def test_what_follows_the_last_answer_is_left_out(words):
    talk = [*turns("a", "b"), {"role": "user", "content": "never read"}]
    [learnt] = tokenize_chat.learn({"messages": talk}, template(TURNS), words, "f:1")
    assert answers_of(learnt, words) == ["b"] and "never" not in words.decode(learnt.ids)


def test_a_template_that_forgets_makes_an_example_of_each_answer_as_it_was_asked(words):
    talk = turns("q/1", "t/b", "q/2", "t/d")
    first, second = tokenize_chat.learn({"messages": talk}, template(FORGETS), words, "f:1")
    assert answers_of(first, words) == ["t/b"] and answers_of(second, words) == ["t/d"]
    assert words.decode(second.ids).replace(" ", "") == "u:q/1a:bu:q/2a:t/d"
    asked = tokenize_chat.prompt({"messages": talk[:3]}, template(FORGETS), words, "f:1")
    np.testing.assert_array_equal(second.ids[: len(asked)], asked)


def test_an_answer_that_begins_a_text_has_something_before_it(words):
    text = "{% for m in messages if m.role == 'assistant' %}{{ m.content + eos_token }}{% endfor %}"
    [learnt] = tokenize_chat.learn({"messages": turns("a", "b")}, template(text), words, "f:1")
    assert learnt.ids[0] == words.bos_id and learnt.marks[0] == 0
    assert answers_of(learnt, words) == ["b"]


def test_a_beginning_that_is_not_that_of_answers_is_refused(words):
    text = "{{ messages[0].content }}{% if add_generation_prompt %}A:{% else %}B:{{ eos_token }}{% endif %}"
    with pytest.raises(ConfigError, match=r"^f:1: the chat template t.jinja asks for an answer with 'A:', but .* 'B:"):
        tokenize_chat.learn({"messages": turns("a", "b")}, template(text), words, "f:1")


def test_a_template_tells_how_an_answer_ends():
    words = Bytes()
    ending = lambda text: tokenize_chat.ending(template(text), words)
    assert ending(TURNS) == ((words.eos_id,), ())
    assert ending("{{ messages[1].content }} [end]\n{{ messages[0].content }}") == ((), ("[end]\nQuestion",))
    with pytest.raises(ConfigError, match=r"t.jinja does not mark where an answer ends: put \{\{ eos_token \}\} behin"):
        ending("{{ messages[1].content }}\n")


def test_an_end_that_is_no_token_is_learnt_as_text():
    words, text = Bytes(), "{% for m in messages %}{{ m.content }}[end]\n\n{% endfor %}"
    [learnt] = tokenize_chat.learn({"messages": turns("a", "b")}, template(text), words, "f:1")
    assert words.decode(learnt.ids[learnt.marks == 1]) == "b[end]"


# No text spells a special token.

HOSTILE = [
    "</s>",
    "a</s>b<s>",
    "</s",
    "s>",
    "/s>",
    "<",
    "\U000f0000</s>\U000f0001",
    "<pad></s></s></s>",
    "</</s>s>",
]


@pytest.mark.parametrize("content", HOSTILE)
def test_contents_spell_no_special_token(words, content):
    special = set(words.special_tokens.values())
    messages = turns(content, f"x{content}", "b", content)
    [learnt] = tokenize_chat.learn({"messages": messages}, template(TURNS), words, "f:1")
    assert sum(id in special for id in learnt.ids.tolist()) == 4
    assert words.decode(learnt.ids).replace("\n", "") == "".join(
        f"{message['role']}:{message['content']}" for message in messages
    )


@pytest.mark.parametrize(("first", "second"), [("<", "/s>"), ("</", "s>"), ("</s", ">"), ("a</s", ">b")])
def test_contents_that_meet_spell_none_either(words, first, second):
    text = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '' if add_generation_prompt else eos_token }}"
    [learnt] = tokenize_chat.learn({"messages": turns(first, second)}, template(text), words, "f:1")
    assert (learnt.ids == words.eos_id).sum() == 1
    assert words.decode(learnt.ids) == first + second


def test_names_and_values_deep_in_a_message_spell_none(words):
    call = {"function": {"name": "</s>", "arguments": {"</s>": ["</s>", 1, None, True]}}}
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]
    text = "{{ messages[0].content }}:{% if messages[1] %}{{ messages[1].tool_calls | tojson + eos_token }}{% endif %}"
    [learnt] = tokenize_chat.learn({"messages": talk}, template(text), words, "f:1")
    assert (learnt.ids == words.eos_id).sum() == 1
    assert json.loads(words.decode(learnt.ids).partition(":")[2]) == [call]


def test_a_guarded_text_has_the_ids_of_the_plain_one_where_nothing_is_hidden(words):
    guard = guard_of(words)
    for text in ("plain", "a < b </", "> quoted", "", "\u2581 \U0001f600 <"):
        value, seam = guard.hide(text, "a.jsonl:1")
        shown, _ = guard.settle(value, (), seam)
        np.testing.assert_array_equal(guard.encode(shown, seam).ids, words.encode(text))


# Templates.


def test_a_template_has_what_those_of_hugging_face_expect():
    assert fill_in("{{ strftime_now('%d %b %Y') }}") == "03 Feb 2020"
    assert fill_in("{{ {'a': '<\u00e9>'} | tojson }}") == '{"a": "<\u00e9>"}'
    assert fill_in("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert fill_in("{% for i in range(9) %}{% if i == 1 %}{% continue %}{% endif %}{% if i == 3 %}{% break %}"
                   "{% endif %}{{ i }}{% endfor %}") == "02"  # fmt: skip
    assert fill_in("{% generation %}\n  {% if true %}\na\n  {% endif %}\n{% endgeneration %}\nb") == "a\nb"
    assert fill_in("{{ tools is none }}{{ documents is none }}{{ bos_token }}{{ pad_token is defined }}") == (
        "TrueTrue<s>False"
    )
    assert fill_in("{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}") == "2"  # fmt: skip # noqa: E501


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for what it may not have: '__class__' of a str"),
        ("{{ ''['__class__'] }}", "reaches for what it may not have: '__class__' of a str"),
        ("{{ messages | attr('__class__') }}", "reaches for what it may not have: '__class__' of a list"),
        (
            "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
            "reaches for what it may not have: '__init__' of a type",
        ),
        ("{{ '{0.__class__}'.format(1) }}", "reaches for what it may not have: '__class__' of a int"),
        ("{% set _ = messages.clear() %}", "reaches for what it may not have: 'clear' of a list"),
        ("{% include '/etc/passwd' %}", "reaches for what it may not have: another template, '/etc/passwd'"),
        ("{% for i in range(10**9) %}{% endfor %}", "range too big"),
        ("{{ 'x' * 10**10 }}", "takes too much memory"),
        (
            "{% set ns = namespace(x='xx') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "takes too much memory",
        ),
        ("{% for i in range(9999) %}{{ 'x' * 99999 }}{% endfor %}", "writes more than 16,777,216 characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "calls itself without end"),
        ("a\n{% if %}", "is not one: line 2: Expected an expression, got 'end of statement block'"),
        ("{% generation %}", "is not one: line 1: Unexpected end of template"),
    ],
)
def test_a_hostile_or_broken_template_is_refused_in_one_line(text, message):
    with pytest.raises(ConfigError) as error:
        fill_in(text)
    assert str(error.value).startswith(f"f:1: the chat template t.jinja {message}")
    assert "\n" not in str(error.value)
    assert fill_in("{{ messages[0].content }}") == "Hi"


@pytest.mark.parametrize(
    "text",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 10 ** (10 ** 9) }}",
    ],
)
def test_a_template_without_an_end_is_ended(text, monkeypatch):
    monkeypatch.setitem(chat_template._LIMITS, "seconds", 0.3)
    with pytest.raises(ConfigError, match=r"^f:1: the chat template t\.jinja takes more than 0\.3 s$"):
        fill_in(text)


def test_the_process_that_fills_templates_in_has_no_secret_of_ours(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    started = []
    popen = chat_template.subprocess.Popen
    monkeypatch.setattr(
        chat_template.subprocess, "Popen", lambda *args, **more: (started.append(more), popen(*args, **more))[1]
    )
    text = "{{ messages[0]['content'] }}{# of its own process #}"
    assert chat_template.fill_in(template(text), {"messages": turns("a", "b")}, [(1, False)], "f:1") == ["a"]
    assert started and set(started[0]["env"]) <= {"PATH", "LANG", "LC_ALL", "TZ", "PYTHONPATH"}


def test_a_conversation_that_a_template_does_not_take_is_told_with_its_place():
    for text, message in [
        ("{{ raise_exception('roles take\nturns') }}", "roles take turns"),
        ("{{ messages[9].content }}", "list object has no element 9"),
    ]:
        with pytest.raises(DataError) as error:
            fill_in(text)
        assert str(error.value) == f"f:1: the chat template does not take it: {message}"


def found(directory, name="tokenizer.json", given="") -> str | None:
    config = Config(
        tokenizer=TokenizerConfig(kind="huggingface", path=f"{directory}/{name}"),
        data=DataConfig(example="chat", chat_template=given),
    )
    text = chat_template.read(config)
    return text and text[0]


def test_a_template_is_found_beside_its_vocabulary_or_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    assert found(tmp_path) is None and found(tmp_path / "nowhere") is None
    settings = tmp_path / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    for value, expected in [("text", "text"), (several, "plain"), (several[:1], "tools"), ([], None), (None, None)]:
        settings.write_text(json.dumps({"chat_template": value}))
        assert found(tmp_path) == expected
    (tmp_path / "chat_template.jinja").write_text("file")
    assert found(tmp_path) == "file"
    (tmp_path / "given.jinja").write_text("given")
    assert found(tmp_path, given=f"{tmp_path}/given.jinja") == "given"
    with pytest.raises(InputMissing, match=r"data.chat_template .*none.jinja does not exist$"):
        found(tmp_path, given=f"{tmp_path}/none.jinja")
    (tmp_path / "given.jinja").write_bytes(b"\xff")
    with pytest.raises(DataError, match="is not UTF-8"):
        found(tmp_path, given=f"{tmp_path}/given.jinja")


# Examples.


def decode(content, **source):
    recipe = Recipe(DataConfig(example="chat", **source), "causal", {}, template(TURNS))
    return encode_examples.decode(content, recipe, "strict", "f:1"), recipe


def nested(depth: int) -> list:
    value: list = []
    for _ in range(depth):
        value = [value]
    return value


def test_conversations_of_every_form_are_the_same():
    plain = turns("a", "b")
    sharegpt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    of_lists = {"role": [b"user", b"assistant"], "content": [b"a", b"b"]}
    nothing = [message | {"name": None} for message in plain]
    for value in (plain, sharegpt, of_lists, nothing):
        assert decode({"messages": value, "tools": None})[0] == {"messages": plain, "origin": "f:1"}
    parts = [message | {"content": [{"type": "text", "text": message["content"]}]} for message in plain]
    assert decode({"messages": parts})[0]["messages"] == plain
    named = [{"role": "customer", "content": "a"}, {"from": "agent", "value": "b"}]
    roles = ("customer=user", "agent=assistant")
    assert decode({"messages": named}, roles=roles)[0]["messages"] == plain
    assert decode({"text": b"a", "target": b"b"}, target_key="x")[0]["messages"] == plain


def test_the_input_of_an_instruction_follows_it(tmp_path):
    lines = [
        {"instruction": "Translate.", "input": "eins", "output": "one"},
        {"instruction": "Count.", "input": "", "output": "1"},
        {"instruction": "Wait.", "input": None, "output": "2"},
        {"instruction": "Go.", "output": "3"},
    ]
    keys = {"text_key": "instruction", "input_key": "input", "target_key": "output"}
    config = config_of(tmp_path, lines=lines, **keys)
    run(config, tmp_path / "out")
    shards, words = Shards.open(epath.Path(tmp_path / "out" / "train")), Bytes()
    texts = [words.decode(shards.take(np.arange(*shards.starts[2 * i : 2 * i + 2]))) for i in range(4)]
    assert [text.partition("assistant:")[0] for text in texts] == [
        "user:Translate.\n\neins\n",
        "user:Count.\n",
        "user:Wait.\n",
        "user:Go.\n",
    ]
    with pytest.raises(ConfigError, match=r"input_key=x needs example=chat and target_key"):
        validate(dataclasses.replace(config, data=dataclasses.replace(config.data, input_key="x", target_key="")))
    with pytest.raises(ConfigError, match=r"roles wants NAME=ROLE with ROLE one of system, .*; got 'bot=robot'"):
        validate(dataclasses.replace(config, data=dataclasses.replace(config.data, roles=("bot=robot",))))


def test_surrogates_are_told_of_in_text_in_keys_and_in_what_a_template_writes(tmp_path):
    for message in ({"role": "user", "content": "a\ud800"}, {"role": "user", "content": "a", "k\ud800": "b"}):
        with pytest.raises(DataError, match=r"lone surrogate U\+D800"):
            decode({"messages": [message, *turns("a", "b")]})
    with pytest.raises(ConfigError, match=r"writes half of a surrogate pair, no text$"):
        fill_in(r"{{ '\ud800' }}")


def test_conversations_that_a_template_does_not_take_are_skipped_and_counted(tmp_path):
    text = "{% if messages[0].content == 'no' %}{{ raise_exception('not this') }}{% endif %}" + TURNS
    lines = [{"messages": turns(first, "b")} for first in ("a", "no", "c")] + [{"messages": turns("d")}]
    config = config_of(tmp_path, text, lines)
    with pytest.raises(DataError, match=r"a\.jsonl:4: no message is of the assistant: there is nothing to learn$"):
        run(config, tmp_path / "strict")
    summary = run(dataclasses.replace(config, clean=CleanConfig(bad_records="skip")), tmp_path / "out")
    assert summary["documents"] == 2 and summary["dropped"] == {"bad_record": 2}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a conversation is a list of messages, each with a role and content"),
        (["a"], "message 1 is not an object with a role and content"),
        ([{"content": "a"}], "message 1 has no role; it has: content"),
        ([{"role": "user"}], "message 1 has no content; it has: role"),
        ([{"role": "user", "content": None}], "message 1 has no content; it has: role"),
        ([{"role": 1, "content": "a"}], "message 1: its role is not text"),
        ([{"role": "user", "content": ["a"]}], "message 1: its content is not text"),
        (
            [{"role": "asistant", "content": "a"}],
            "message 1 is of 'asistant', not of one of system, developer, user, assistant, tool, function, ipython"
            "; data.roles may map other names",
        ),
        (
            [{"from": "bot", "value": "a"}],
            "message 1 is from 'bot', not from one of human, user, gpt, assistant, system; data.roles may map other "
            "names",
        ),
        (
            [{"from": {"name": "bot"}, "value": "a"}],
            "message 1 is from {'name': 'bot'}, not from one of human, user, gpt, assistant, system; data.roles may "
            "map other names",
        ),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            "message 1: a part of its content is of type 'image_url', which is not supported: only text is",
        ),
        ([{"role": "user", "content": "a", "tool_calls": nested(70)}], "nested more than 64 levels deep"),
        (turns("a"), "no message is of the assistant: there is nothing to learn"),
    ],
)
def test_what_is_no_conversation_is_told_in_one_line(messages, message):
    with pytest.raises(DataError) as error:
        decode({"messages": messages})
    assert str(error.value) == f"f:1: {message}"


def test_contents_are_cleaned_and_count_and_who_read_them_where_is_nothing():
    example, recipe = decode({"messages": turns("a  b ", " c\x00")})
    cleaned = encode_examples.cleaned(example, recipe, CleanConfig(whitespace="collapse"))
    assert cleaned["messages"] == turns("a b", "c")
    assert encode_examples.reason(cleaned, recipe, CleanConfig(max_chars=4)) == "too_long"
    assert encode_examples.reason(cleaned, recipe, CleanConfig()) is None
    assert encode_examples.reason(decode({"messages": turns("a", " ")})[0], recipe, CleanConfig()) == "no_answer"
    other = cleaned | {"origin": "f:2"}
    assert encode_examples.digest(other, recipe) == encode_examples.digest(cleaned, recipe)
    assert encode_examples.texts(cleaned, recipe) == ["a b", "c"]


# From files to rows.


def config_of(tmp_path, text=TURNS, lines=None, **settings) -> Config:
    """A config of conversations, the file of which is written."""
    if lines is None:
        lines = [{"messages": turns(*(f"{i}.{k}/" + "x" * (3 * i % 11) for k in range(2 + i % 3)))} for i in range(30)]
    (tmp_path / "t.jinja").write_text(text)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = {"files": (f"{tmp_path}/a.jsonl",), "text_key": "messages", "chat_template": f"{tmp_path}/t.jinja"}
    data |= {"example": "chat", "seq_len": 48, "packing": "bins"} | settings
    return Config(data=DataConfig(**data), tokenizer=TokenizerConfig(kind="bytes"), train=TrainConfig(batch_size=4))


def run(config: Config, directory: pathlib.Path, **settings) -> dict:
    return prepare(config, epath.Path(directory), lambda line: None, **{"workers": 1} | settings)


def content(directory: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def said(batch, documents=True) -> list[tuple[tuple[int, ...], int]]:
    """Every counted prediction of a batch, with what is read before it in its conversation."""
    found = []
    for row in range(len(batch.tokens_BT)):
        segments = batch.segments_BT[row] if documents else np.ones(len(batch.tokens_BT[row]), int)
        for place in np.flatnonzero(batch.weights_BT[row]):
            seen = (segments == segments[place]) & (np.arange(len(segments)) <= place)
            found.append((tuple(batch.tokens_BT[row][seen].tolist()), int(batch.targets_BT[row][place])))
    return found


def expected_predictions(directory, limit=10**9):
    shards = Shards.open(epath.Path(directory) / "train")
    fields = np.split(shards.take(np.arange(shards.num_tokens)), shards.starts[1:-1])
    return [
        (tuple(ids[:place].tolist()), int(ids[place]))
        for ids, marks in zip(fields[::2], fields[1::2], strict=True)
        for place in np.flatnonzero(marks)
        if place <= limit
    ]


@pytest.mark.parametrize("packing", ["stream", "bins", "pad"])
@pytest.mark.parametrize(("text", "seq_len"), [(TURNS, 96), (TURNS, 30), (FORGETS, 40)])
def test_each_answer_token_is_predicted_once_from_all_before_it_however_packed(tmp_path, text, seq_len, packing):
    config = config_of(tmp_path, text, packing=packing, seq_len=seq_len)
    run(config, tmp_path / "out")
    (source,) = open_train(config, tmp_path / "out", VOCABULARY)._sources
    rows = np.arange(source.num_rows)
    batch = source.batch(rows, rows.astype(np.uint64))
    assert sorted(said(batch)) == sorted(expected_predictions(tmp_path / "out", seq_len))
    assert (batch.targets_BT[batch.weights_BT == 0] == 0).all()
    assert (batch.tokens_BT[batch.segments_BT == 0] == 0).all()
    assert source.max_segments() == batch.segments_BT.max()
    assert source.num_slots == np.count_nonzero(batch.segments_BT)
    for one in rows:
        alone = source.batch(rows[one : one + 1], rows[:1].astype(np.uint64))
        for got, want in zip(alone, batch, strict=True):
            assert (got is None and want is None) or np.array_equal(got[0], want[one])


def test_conversations_too_long_for_a_row_are_cut_counted_and_their_bytes_too(tmp_path):
    lines = [{"messages": turns("q", "a" * 10)}, {"messages": turns("q", "b" * 90)}, {"messages": turns("q" * 60, "c")}]
    config = config_of(tmp_path, lines=lines, packing="pad", seq_len=40)
    run(config, tmp_path / "out")
    rows = open_train(config, tmp_path / "out", VOCABULARY)
    assert rows.num_rows == 2
    assert rows.remarks() == [
        f"{tmp_path}/out/train: 2 of 3 conversations are longer than data.seq_len=40 and cut there, 1 of them before "
        "any answer"
    ]
    (source,) = rows._sources
    whole, cut = (source.num_bytes(np.array([row])) for row in (0, 1))
    shown = int(source.batch(np.array([1]), np.zeros(1, np.uint64)).weights_BT.sum())
    assert whole == 10 and cut == 90 * shown // 91
    none = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=5))
    with pytest.raises(InputMissing, match=r"no answer of .*train begins within data.seq_len=5$"):
        open_train(none, tmp_path / "out", VOCABULARY)
    full = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_len=200))
    assert open_train(full, tmp_path / "out", VOCABULARY).remarks() == []


def test_rows_without_borders_read_all_that_is_before(tmp_path):
    config = config_of(tmp_path, packing="stream", mask_documents=False, seq_len=96)
    run(config, tmp_path / "out")
    rows = open_train(config, tmp_path / "out", VOCABULARY)
    batch = rows.batch(0)
    assert batch.segments_BT is None and batch.positions_BT is None and rows.max_segments() == 1
    assert len(said(batch, documents=False)) == batch.weights_BT.sum() > 0


def test_an_evaluation_counts_the_bytes_of_answers(tmp_path):
    lines = [{"messages": turns("q", "caf\u00e9", "q", "b" * i)} for i in range(1, 9)]
    config = config_of(tmp_path, lines=lines[:4], seq_len=96)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = dataclasses.replace(config.data, valid_files=(f"{tmp_path}/b.jsonl",))
    config = dataclasses.replace(config, data=data)
    # Held out are all; what is held out is not trained on.
    with pytest.raises(InputMissing, match="dropped: 4 duplicate"):
        run(config, tmp_path / "none")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": turns("other", "one")}) + "\n")
    run(config, tmp_path / "out")
    (rows,) = open_eval(config, tmp_path / "out", VOCABULARY).values()
    assert rows.num_bytes() == sum(5 + i for i in range(1, 9))


def test_processes_and_interruptions_change_nothing_though_a_conversation_makes_several_examples(tmp_path, monkeypatch):
    text = FORGETS + "{% if false %}{{ strftime_now('%Y') }}{% endif %}"
    config = config_of(tmp_path, text, shard_tokens=150)
    monkeypatch.setattr("lslm_jax.data.chat.chat_template._now", lambda: "2020-01-01T00:00:00")
    summary = run(config, tmp_path / "one")
    assert summary["documents"] > 30 and summary["shards"] > 5
    monkeypatch.setattr("lslm_jax.data.prepare.worker_pool._BLOCK_DOCUMENTS", 7)
    run(config, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")

    class Killed(Exception):
        pass

    def kill(line: str) -> None:
        if (tmp_path / "killed" / "train" / "tokens-00003.bin").exists():
            raise Killed

    monkeypatch.setattr("lslm_jax.data.prepare.prepare._LOG_SECONDS", 0.0)
    with pytest.raises(Killed):
        prepare(config, epath.Path(tmp_path / "killed"), kill, workers=1)
    monkeypatch.setattr("lslm_jax.data.chat.chat_template._now", lambda: "2031-01-01T00:00:00")
    run(config, tmp_path / "killed")
    assert content(tmp_path / "killed") == content(tmp_path / "one")


def test_the_template_travels_with_the_data_and_another_is_refused(tmp_path):
    config = config_of(tmp_path)
    assert not run(config, tmp_path / "out")["skipped"]
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TURNS
    record = json.loads((tmp_path / "out" / "manifest.json").read_text())["chat"]
    assert chat_template.load(record, epath.Path(tmp_path / "out")).text == TURNS
    (tmp_path / "t.jinja").write_text(TURNS + " ")
    with pytest.raises(ConfigError, match=r"was prepared with another chat template: choose another data\.dir"):
        run(config, tmp_path / "out")
    (tmp_path / "t.jinja").write_text(TURNS)
    assert run(config, tmp_path / "out")["skipped"]
    (tmp_path / "out" / "chat_template.jinja").write_text("x")
    with pytest.raises(DataError, match=r"chat_template\.jinja is not what the data were prepared with"):
        chat_template.load(record, epath.Path(tmp_path / "out"))


def test_a_mixture_of_conversations_is_drawn_from(tmp_path):
    config = config_of(tmp_path)
    sources = tuple(
        MixtureSource(name=name, example="chat", files=config.data.files, text_key="messages")
        for name in ("one", "two")
    )
    both = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=sources))
    both = dataclasses.replace(both, clean=CleanConfig(deduplicate="none"))
    validate(both)
    run(both, tmp_path / "out")
    assert open_train(both, tmp_path / "out", VOCABULARY).batch(3).weights_BT.sum() > 0
    mixed = (sources[0], dataclasses.replace(sources[1], example="text"))
    with pytest.raises(ConfigError, match="are mixed with conversations only"):
        validate(dataclasses.replace(both, data=dataclasses.replace(both.data, mixture=mixed)))


def test_settings_that_do_not_go_with_conversations_are_refused(tmp_path):
    config = config_of(tmp_path)
    validate(config)
    with pytest.raises(ConfigError, match=r"the vocabulary has no chat template: name one by data\.chat_template"):
        run(dataclasses.replace(config, data=dataclasses.replace(config.data, chat_template="")), tmp_path / "out")
    text = dataclasses.replace(config.data, example="text")
    with pytest.raises(ConfigError, match=r"data\.chat_template=.* needs data\.example=chat$"):
        validate(dataclasses.replace(config, data=text))
    run(config, tmp_path / "out")
    with pytest.raises(ConfigError, match=r"was not prepared for task\.objective=causal: its examples have 2 text"):
        open_train(dataclasses.replace(config, data=text), tmp_path / "out", VOCABULARY)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_tables_hold_conversations_or_questions_and_answers(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    config = config_of(tmp_path, files=(str(path),), seq_len=96)
    if suffix == "parquet":
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist([{"messages": turns("a", "b", "c", "d")}] * 2), path)
    else:
        path.write_text("question,answer\na,b\n")
        with pytest.raises(DataError, match="a table of plain columns cannot hold 'messages': use JSONL or Parquet"):
            run(config, tmp_path / "none")
        data = dataclasses.replace(config.data, text_key="question", target_key="answer")
        config = dataclasses.replace(config, data=data)
    dropped = run(config, tmp_path / "out")["dropped"]
    assert dropped == ({"duplicate": 1} if suffix == "parquet" else {})
    words = Bytes()
    [learnt] = tokenize_chat.learn(
        {"messages": turns(*("abcd" if suffix == "parquet" else "ab"))}, template(TURNS), words, "f:1"
    )
    shards = Shards.open(epath.Path(tmp_path / "out" / "train"))
    np.testing.assert_array_equal(shards.take(np.arange(shards.num_tokens)), np.concatenate(learnt[:2]))
