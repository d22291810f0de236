"""A process of its own that fills in chat templates, which are strangers' programs: little memory, few seconds.

It reads JSON lines and writes one for each. The first says what the template is and what it may take; every other one
is a conversation with the parts of it that are wanted, as text: `{"texts": [...]}`. What cannot be done is told as
`{"error": ..., "guilty": ...}`: whether the template is at fault or does not take such a conversation. One that takes
too long ends the process.

`templates.py` starts it as a script, so that nothing but the standard library and jinja2 is loaded.
"""

import contextlib
import datetime
import json
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

GUILTY, REFUSES = "template", "conversation"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)  # whoever started it ends it, by closing its input


def serve() -> None:
    """Answers requests until there are no more."""
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    setup = json.loads(sys.stdin.buffer.readline())
    resource.setrlimit(resource.RLIMIT_AS, (setup["memory"], setup["memory"]))
    try:
        with _limited(setup["seconds"]):
            template = _compile(setup["template"], setup["now"])
        failure = None
    except Exception as error:
        template, failure = None, _explain(error)
    for line in sys.stdin.buffer:
        reply = failure or _fill_in(template, json.loads(line), setup)
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends the process if what is done here takes more computing; however busy the machine is, that does not count."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)


def _fill_in(template: Any, request: dict[str, Any], setup: dict[str, Any]) -> dict[str, Any]:
    parts = request.pop("parts")
    messages = request.pop("messages")
    try:
        texts = []
        for count, asks in parts:
            with _limited(setup["seconds"]):
                variables = request | {"messages": messages[:count], "add_generation_prompt": asks}
                texts.append(_joined(template.generate(variables), setup["characters"]))
    except Exception as error:
        return _explain(error)
    return {"texts": texts}


def _joined(parts: Iterator[str], most: int) -> str:
    found, length = [], 0
    for part in parts:
        length += len(part)
        if length > most:
            raise OverflowError(f"writes more than {most:,} characters")
        found.append(part)
    return "".join(found)


def _explain(error: Exception) -> dict[str, str]:
    from jinja2 import TemplateSyntaxError
    from jinja2.exceptions import SecurityError

    message = " ".join(str(error).split()) or type(error).__name__
    match error:
        case TemplateSyntaxError():
            said, whose = f"is not one: line {error.lineno}: {message}", GUILTY
        case SecurityError():
            said, whose = f"reaches for what it may not have: {message}", GUILTY
        case MemoryError():
            said, whose = "takes too much memory", GUILTY
        case RecursionError():
            said, whose = "calls itself without end", GUILTY
        case OverflowError():
            said, whose = message[0].lower() + message[1:], GUILTY
        case _:
            said, whose = message, REFUSES
    return {"error": said[:300], "guilty": whose}


def _compile(text: str, now: str) -> Any:
    """The template, with all that those of Hugging Face expect to be there."""
    import jinja2
    from jinja2.exceptions import SecurityError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
            raise SecurityError(f"{attribute!r} of a {type(obj).__name__}")

    def deny(name: str) -> str:
        raise SecurityError(f"another template, {name!r}")

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def strftime_now(form: str) -> str:
        return datetime.datetime.fromisoformat(now).strftime(form)

    def tojson(value: Any, ensure_ascii: bool = False, **form: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **form)

    extensions = ["jinja2.ext.loopcontrols", _generation_blocks()]
    loader = jinja2.FunctionLoader(deny)
    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=extensions, loader=loader)
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment.from_string(text)


def _generation_blocks() -> Any:
    """`{% generation %}`, with which some templates enclose answers: what stands in it is written as it is."""
    from jinja2 import nodes
    from jinja2.ext import Extension

    class Generation(Extension):
        tags: Any = frozenset({"generation"})

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    return Generation


if __name__ == "__main__":
    serve()
