"""Result of a command as a person reads it on a terminal: a table, and commands to type next."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

_NEXT = {
    "train": ("generate", "evaluate --files=FILE", "export --to=DIR"),
    "import": ("generate", "export --to=DIR"),
    "evaluate": ("generate", "export --to=DIR"),
}
_MAX_ITEMS = 8  # of a list that are shown


def text(result: Mapping[str, Any], command: str, workdir: str | None) -> str:
    """Returns the table of a result.

    Args:
      result: JSON values.
      command: that ended with it.
      workdir: run directory; None or "" for none.
    """
    rows = [(name, _shown(value)) for name, value in _flat(result, "")]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    if workdir:
        lines.append(f"{'run directory':<{width}}  {workdir}")
        following = [f"  lslm {verb} --workdir={shlex.quote(workdir)}" for verb in _NEXT.get(command, ())]
        lines += ["next:", *following] if following else []
    return "\n".join(lines)


def _flat(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, part in value.items():
        if isinstance(part, Mapping):
            yield from _flat(part, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", part


def _shown(value: Any) -> str:
    """A value on one line; control characters, which names of files and labels may hold, become U+FFFD."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, list):
        more = f", and {len(value) - _MAX_ITEMS} more" if len(value) > _MAX_ITEMS else ""
        return ", ".join(map(_shown, value[:_MAX_ITEMS])) + more
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in str(value))
