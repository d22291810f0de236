"""The interactive prompt: lines are answered one by one, errors are printed, a chat goes on until an empty line."""

import argparse

import pytest

from lslm_jax.cli import generate, interactive
from lslm_jax.config import Config, DataConfig, TaskConfig
from lslm_jax.errors import ConfigError
from lslm_jax.evaluate.types import Setting

FLAGS = argparse.Namespace(prompt=None, prompts=None, context=None, json=False)


def lines(*texts: object):
    """A terminal: each call gives the next line, or raises what stands in its place."""
    left = list(texts)

    def read(prompt: str) -> str:
        line = left.pop(0) if left else EOFError()
        if isinstance(line, BaseException):
            raise line
        return str(line)

    return read


def setting(example: str = "text", objective: str = "causal") -> Setting:
    config = Config(data=DataConfig(files=("a.txt",), example=example), task=TaskConfig(objective=objective))
    return Setting(config, None, [], None, None, None)  # type: ignore[arg-type]


@pytest.fixture
def asked(monkeypatch):
    """The prompts that a model was given; it writes what they end with, twice."""
    found = []

    def stream(_setting, _model, prompt):
        found.append(prompt)
        text = prompt["messages"][-1]["content"] if "messages" in prompt else prompt["prompt"]
        if text == "fail":
            raise ConfigError("the prompt is bad")
        if text == "interrupt":
            yield "begun"
            raise KeyboardInterrupt
        yield from (text, text)

    monkeypatch.setattr(generate, "stream", stream)
    return found


def test_each_line_is_a_prompt_until_the_end_of_the_input(asked, capsys):
    interactive.run(setting(), None, FLAGS, str, lines("ab", "", "fail", "interrupt", "c, d"))
    assert asked == [{"prompt": text} for text in ("ab", "fail", "interrupt", "c, d")]
    output = capsys.readouterr()
    assert output.out == "abab\nbegun\nc, dc, d\n\n"
    assert "the prompt is bad" in output.err and "Ctrl-D ends" in output.err


def test_a_chat_goes_on_until_an_empty_line(asked):
    interactive.run(setting("chat"), None, FLAGS, str, lines("a", "b", "fail", " ", "c"))
    talk = lambda *texts: {
        "messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    }
    assert asked == [talk("a"), talk("a", "aa", "b"), talk("a", "aa", "b", "bb", "fail"), talk("c")]


def test_answers_of_a_head_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(generate, "answer", lambda *_: iter([{"label": "x"}]))
    read = lines("ab")
    interactive.run(setting("label", "classification"), None, FLAGS, lambda found: f"label {found['label']}", read)
    assert capsys.readouterr().out == "label x\n\n"
