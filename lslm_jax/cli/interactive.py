"""An interactive prompt: lines of the terminal are answered by a model that is loaded once."""

import argparse
import contextlib
from collections.abc import Callable
from typing import Any

from lslm_jax.cli import generate
from lslm_jax.errors import LslmError
from lslm_jax.evaluate.types import Setting
from lslm_jax.runtime.progress import say

Messages = list[dict[str, str]]


def run(
    setting: Setting,
    model: Any,
    flags: argparse.Namespace,
    show: Callable[[dict[str, Any]], str],
    read: Callable[[str], str] = input,
) -> None:
    """Answers lines until the end of the input.

    A chat goes on with what was said before, until an empty line starts a new one. Ctrl-C ends a text that is being
    written. What is wrong with one prompt is printed, and the next one is read.

    Args:
      setting: of the run.
      model: loaded.
      flags: of the command `generate`; `context` and `json` are read.
      show: formats an answer that is not streamed.
      read: returns the next line, after it printed its argument; raises an EOFError at the end.
    """
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (editing and history in `input`)
    is_chat = setting.config.data.is_chat
    say(f"Ctrl-D ends{', an empty line starts a new conversation' * is_chat}")
    history: Messages = []
    while True:
        try:
            line = read("> ")
        except EOFError:
            print()
            return
        if not line.strip():
            history = []
            continue
        try:
            [prompt] = generate.read_prompts(setting.config, with_prompt(flags, line))
            talk = [*history, {"role": "user", "content": line}]
            text = _answer(setting, model, {"messages": talk} if is_chat else prompt, flags, show)
            history = [*talk, {"role": "assistant", "content": text}] if is_chat else []
        except KeyboardInterrupt:
            print()
        except LslmError as error:
            say(str(error))


def with_prompt(flags: argparse.Namespace, text: str) -> argparse.Namespace:
    """The flags of a command line with one prompt."""
    return argparse.Namespace(**vars(flags) | {"prompt": [text]})


def _answer(
    setting: Setting, model: Any, prompt: generate.Prompt, flags: argparse.Namespace, show: Callable[[Any], str]
) -> str:
    """Prints the answer to a prompt, as it is written where it is a text; returns its text."""
    if flags.json or setting.config.task.objective not in ("causal", "seq2seq"):
        [found] = generate.answer(setting, model, [prompt])
        print(show(found))
        return str(found.get("text", ""))
    parts = []
    for part in generate.stream(setting, model, prompt):
        print(part, end="", flush=True)
        parts.append(part)
    print()
    return "".join(parts)
