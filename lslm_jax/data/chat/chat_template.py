"""Chat templates, as Hugging Face has them: where they come from, and how they are filled in."""

import contextlib
import datetime
import functools
import hashlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from lslm_jax.config import Config
from lslm_jax.data.chat import template_sandbox
from lslm_jax.data.readers.example_schema import RecordError
from lslm_jax.data.tokenizers import gguf
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime import atomic_io

FILE = "chat_template.jinja"
_CONFIG = "tokenizer_config.json"
_LIMITS = {"memory": 1 << 30, "seconds": 10.0, "characters": 1 << 24}  # for one text
_SURROGATE = re.compile("[\ud800-\udfff]")
_VARIABLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


class Template(NamedTuple):
    """A chat template.

    Attributes:
      text: in Jinja.
      variables: names and values that it may use beside the conversation: how special tokens are written.
      now: the time that it is told when it asks, in ISO format.
      origin: where it stands, for messages.
    """

    text: str
    variables: tuple[tuple[str, str], ...]
    now: str
    origin: str


def read(config: Config) -> tuple[str, str] | None:
    """The template that a config names and where it stands: data.chat_template, or the one beside its vocabulary.

    Raises:
      InputMissing: data.chat_template does not exist.
      DataError: a file is damaged.
    """
    if given := config.data.chat_template:
        path = epath.Path(given).expanduser()
        if not path.is_file():
            raise InputMissing(f"data.chat_template {path} does not exist")
        return _read_text(path), str(path)
    path = epath.Path(config.tokenizer.path).expanduser()
    if not config.tokenizer.path or not path.is_file():
        return None
    if path.suffix == ".gguf":
        text = gguf.open_file(path)[0].get("tokenizer.chat_template")
        return (text, str(path)) if text else None
    if (path.parent / FILE).is_file():
        return _read_text(path.parent / FILE), str(path.parent / FILE)
    beside = path.parent / _CONFIG
    text = _default(atomic_io.read_json(beside).get("chat_template")) if beside.is_file() else None
    return (text, str(beside)) if text else None


def _read_text(path: epath.Path) -> str:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8") from error


def _default(found: Any) -> str | None:
    """The template among several: the one of that name, or the only one."""
    if isinstance(found, list):
        named = {one.get("name"): one.get("template") for one in found if isinstance(one, dict)}
        found = named.get("default", next(iter(named.values())) if len(named) == 1 else None)
    return found if isinstance(found, str) else None


def require(config: Config) -> tuple[str, str]:
    """What `read` finds.

    Raises:
      ConfigError: there is none.
      InputMissing, DataError: see `read`.
    """
    found = read(config)
    if found is None:
        raise ConfigError("the vocabulary has no chat template: name one by data.chat_template, a file in Jinja")
    return found


def choose(config: Config, words: Tokenizer) -> Template:
    """The template of a config and its vocabulary; errors are those of `require`."""
    text, origin = require(config)
    return Template(text, tuple(_variables(config, words).items()), _now(), origin)


def _now() -> str:
    return datetime.datetime.now().isoformat(timespec="seconds")


def _variables(config: Config, words: Tokenizer) -> dict[str, str]:
    """How special tokens are written: as the file beside the vocabulary has them, and no others, or else our own."""
    path = epath.Path(config.tokenizer.path).expanduser()
    has_others = bool(config.tokenizer.path) and path.suffix != ".gguf" and (path.parent / _CONFIG).is_file()
    theirs = atomic_io.read_json(path.parent / _CONFIG) if has_others else {}
    named = {f"{role}_token": theirs.get(f"{role}_token") for role in _VARIABLES}
    found = {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    return found or words.roles()


# In the directory of prepared data.


def save(template: Template, directory: epath.Path) -> dict[str, Any]:
    """Puts it beside the shards; returns what the record says of it.

    The time is on record only if the template asks for it, so that equal data are prepared equally.
    """
    atomic_io.write(directory / FILE, template.text.encode())
    asks = {"now": template.now} if "strftime_now" in template.text else {}
    return {"file": FILE, "sha256": sha256(template.text), "variables": dict(template.variables)} | asks


def load(record: Mapping[str, Any], directory: epath.Path, today: bool = False) -> Template:
    """What `save` put there.

    Args:
      record: what it returned.
      directory: of the prepared data.
      today: whether it is told the time of now, and not that of the preparation.

    Raises:
      DataError: the file is gone, or not what it was.
    """
    path = directory / record["file"]
    text = _read_text(path) if path.is_file() else ""
    if sha256(text) != record["sha256"]:
        raise DataError(f"{path} is not what the data were prepared with: restore it, or prepare again")
    now = record["now"] if "now" in record and not today else _now()
    return Template(text, tuple(record["variables"].items()), now, str(path))


def of_run(config: Config, facts: Mapping[str, Any], directory: epath.Path, words: Tokenizer | None) -> Template | None:
    """The template of prepared data, or that of the vocabulary, as of now; None where nobody chats.

    Args:
      config: of the run.
      facts: the manifest of the data, or what stands for it.
      directory: of the data.
      words: the vocabulary; None where there is none.

    Raises:
      ConfigError, InputMissing, DataError: as `load` and `choose`.
    """
    if not config.data.is_chat or words is None:
        return None
    return load(facts["chat"], directory, today=True) if "chat" in facts else choose(config, words)


def sha256(text: str) -> str:
    """Of a template's text."""
    return hashlib.sha256(text.encode()).hexdigest()


# Filling in.


def fill_in(
    template: Template, conversation: Mapping[str, Any], parts: Sequence[tuple[int, bool]], origin: str
) -> list[str]:
    """A conversation as text, in parts.

    Args:
      template: to fill in.
      conversation: `messages`, and what else the template may look at, as `tools`: plain JSON values.
      parts: of each text wanted, how many messages it holds and whether it ends where an answer is to begin.
      origin: where the conversation stands, for messages.

    Raises:
      ConfigError: the template is wrong, reaches for what it may not have, or takes too much.
      RecordError: it does not take such a conversation.
    """
    variables = {"tools": None, "documents": None} | dict(template.variables) | dict(conversation)
    reply = _process(template).ask(variables | {"parts": list(parts)})
    if "texts" in reply:
        if any(_SURROGATE.search(text) for text in reply["texts"]):
            raise ConfigError(f"{origin}: the chat template {template.origin} writes half of a surrogate pair, no text")
        return reply["texts"]
    if reply["guilty"] == template_sandbox.GUILTY:
        raise ConfigError(f"{origin}: the chat template {template.origin} {reply['error']}")
    raise RecordError(f"{origin}: the chat template does not take it: {reply['error']}")


@functools.lru_cache(maxsize=2)
def _process(template: Template) -> "_Process":
    return _Process(template)


class _Process:
    """A process that fills in one template; it ends with this object, and is started again where it died."""

    def __init__(self, template: Template):
        if importlib.util.find_spec("jinja2") is None:
            raise ConfigError("chat templates need jinja2: pip install jinja2")
        self._setup = {"template": template.text, "now": template.now} | _LIMITS
        self._start()

    def _start(self) -> None:
        # Its own directory is not on its path (-P): modules here have short names.
        command = [sys.executable, "-P", template_sandbox.__file__]
        # Nothing else of ours: a template is a stranger's program, and the environment may hold tokens and keys.
        environment = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "TZ") if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self._end = weakref.finalize(self, _end, self._child)
        self._send(self._setup)

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What it answers."""
        with contextlib.suppress(BrokenPipeError):
            self._send(request)
        assert self._child.stdout is not None
        if line := self._child.stdout.readline():
            return json.loads(line)
        slow = self._child.wait() == -signal.SIGPROF
        self._end()
        self._start()
        error = f"takes more than {_LIMITS['seconds']:g} s" if slow else "ended the process that fills it in"
        return {"error": error, "guilty": template_sandbox.GUILTY}

    def _send(self, request: dict[str, Any]) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request).encode() + b"\n")
        self._child.stdin.flush()


def _end(child: subprocess.Popen) -> None:
    child.kill()
    for pipe in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    child.wait()
