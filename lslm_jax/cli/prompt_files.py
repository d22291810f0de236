"""Files of prompts: a prompt per line, or JSON lines, compressed or not; `-` is the standard input.

A file whose name ends in .jsonl or .ndjson, or whose first line begins with `{`, holds JSON lines: objects with
`prompt` (and `context` or `target` where the model reads them), or `messages`. Other fields are passed through to the
answers. In any other file each line is a prompt as it stands; empty lines are skipped.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from lslm_jax.data.chat import tokenize_chat
from lslm_jax.data.readers import formats
from lslm_jax.errors import DataError, InputMissing

Prompt = dict[str, Any]

STDIN = "-"
_READ = ("prompt", "context", "target")  # fields that a model reads: text


def read(name: str) -> Iterator[Prompt]:
    """The prompts of a file, or of the standard input.

    Raises:
      InputMissing: it does not exist, or is empty.
      DataError: it is not UTF-8, not compressed as it seems, or a line is no prompt.
    """
    content = read_bytes(name, "prompts")
    lines = [line.removesuffix(b"\r") for line in content.split(b"\n")]
    where = "standard input" if name == STDIN else name
    first = next(line.strip() for line in lines if line.strip())
    is_json = formats.by_suffix(epath.Path(name)) == "jsonl" or first.startswith(b"{")
    parse = _json_line if is_json else _plain_line
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield parse(line, f"{where}:{number}")


def read_bytes(name: str, what: str) -> bytes:
    """The decompressed content of a file, or of the standard input, without a byte order mark.

    Raises:
      InputMissing: it cannot be read, or is empty.
      DataError: it is not compressed as its first bytes tell.
    """
    path = epath.Path(name).expanduser()
    try:
        content = sys.stdin.buffer.read() if name == STDIN else path.read_bytes()
    except OSError as error:
        raise InputMissing(f"cannot read {what} file {path}: {error.strerror or error}") from error
    try:
        content = formats.decompress(content, path)
    except DataError as error:
        raise DataError(f"{what} file {path} is truncated or damaged: {error}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    if not content.strip():
        raise InputMissing(f"{what} file {path} is empty" if name != STDIN else f"no {what} on the standard input")
    return content


def _plain_line(line: bytes, origin: str) -> Prompt:
    try:
        return {"prompt": line.decode()}
    except UnicodeDecodeError as error:
        raise DataError(f"{origin} is not UTF-8") from error


def _json_line(line: bytes, origin: str) -> Prompt:
    try:
        fields = json.loads(line)
        if "messages" in fields and "prompt" not in fields:
            return fields | {"messages": _conversation(fields, origin)}
        fields["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f'{origin} is not a JSON object with a "prompt"') from error
    for key in _READ:
        if key in fields and not is_text(fields[key]):
            raise DataError(f'{origin}: "{key}" is not text: {json.dumps(fields[key])}')
    return fields


def _conversation(fields: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    """The messages of a conversation that the model is to answer."""
    messages = tokenize_chat.messages_of(fields["messages"], origin)
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{origin}: the last message is the assistant's: there is nothing to answer")
    return messages


def is_text(value: Any) -> bool:
    """True for a string that UTF-8 can encode, without lone surrogates."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)
