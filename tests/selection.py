"""Selection of tests by what has changed: those that depend on a changed file, and a rotating share of the others.

`pytest --changed-since=REVISION --share=K/N` runs every test of a file that imports a changed file, directly or through
others, and of all other tests the K-th of N shares. N runs with K from 0 to N - 1 run everything.
"""

import ast
import functools
import pathlib
import subprocess
from collections.abc import Collection, Iterable, Iterator

ROOT = pathlib.Path(__file__).resolve().parents[1]
EVERYTHING = ("pyproject.toml", "constraints/", "tests/conftest.py", "tests/selection.py")
"""Files, and directories, on which every test depends."""


def changed_files(revision: str, root: pathlib.Path = ROOT) -> list[str]:
    """Paths of the files that differ from `revision`, uncommitted ones included, relative to the root."""
    tracked = _git(root, "diff", "--name-only", revision)
    untracked = _git(root, "ls-files", "--others", "--exclude-standard")
    return sorted({*tracked, *untracked})


def depends(test: pathlib.Path, changed: Collection[str], root: pathlib.Path = ROOT) -> bool:
    """True if a test file imports a changed file, directly or through others, or lies beside changed data."""
    if any(path.startswith(EVERYTHING) for path in changed):
        return True
    files = {str(path.relative_to(root)) for path in imported_files(test, root)}
    beside = str(test.parent.relative_to(root)) + "/"
    data = [path for path in changed if not path.endswith(".py")]
    return bool(files & set(changed)) or any(path.startswith(beside) for path in data)


@functools.cache
def imported_files(path: pathlib.Path, root: pathlib.Path = ROOT) -> frozenset[pathlib.Path]:
    """The file itself and all files of this repository that it imports, directly or through others."""
    found, pending = set(), [path]
    while pending:
        file = pending.pop()
        if file not in found:
            found.add(file)
            pending += _imports(file, root)
    return frozenset(found)


@functools.cache
def _imports(path: pathlib.Path, root: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Files that one file imports anywhere, within functions too."""
    tree = ast.parse(path.read_text())
    names = [name for node in ast.walk(tree) for name in _modules(node)]
    return tuple(file for name in names for file in _files(name, path, root))


def _modules(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _files(module: str, importer: pathlib.Path, root: pathlib.Path) -> Iterator[pathlib.Path]:
    """Files that importing a module executes: its own and its packages' `__init__.py`."""
    *packages, name = module.split(".")
    for directory in (root, root / "tests", importer.parent):
        steps = [directory.joinpath(*packages[: depth + 1]) / "__init__.py" for depth in range(len(packages))]
        place = directory.joinpath(*packages, name)
        candidates = [*steps, place.with_suffix(".py"), place / "__init__.py"]
        yield from (file for file in candidates if file.is_file() and file.is_relative_to(root))


def share(items: Iterable[str], number: int, shares: int) -> set[str]:
    """Every `shares`-th of the items, from the `number`-th on."""
    return set(sorted(items)[number % shares :: shares])


def _git(root: pathlib.Path, *arguments: str) -> list[str]:
    listing = subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True)
    return listing.stdout.splitlines()
