"""The rules of the house, read off the source: who imports whom, how long things are, what is banned."""

import ast
import pathlib
import re
import statistics
from collections.abc import Iterator

import pytest
from planted_faults import FAULTS

from lslm_jax.config.loading import describe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lslm_jax"

# Each row may import from the rows above it, and a room from itself. Rooms that share a row are strangers.
ROWS = [
    ["config", "batch", "errors"],
    ["atomic"],
    [
        "config_loading",
        "config_mesh",
        "devices",
        "progress",
        "file_lock",
        "imports",
        "peers",
        "environment",
    ],
    ["config_checks", "malloc", "command_flags", "setting_flags"],
    ["sharding", "distributed", "observe", "trees", "compile_cache"],
    ["data", "models"],
    [
        "generate",
        "convert",
        "train.losses",
        "train.optim",
        "train.state",
        "train.step",
        "train.preemption",
        "train.manifest",
        "train.lock",
        "train.watchdog",
        "train.ledger",
        "train.health",
        "train.metadata",
        "train.copies",
        "train.reproducible",
    ],
    ["evaluate"],
    [
        "train.identity",
        "train.rewind",
        "train.checkpoint",
        "train.begin",
        "train.exports",
        "train.spikes",
        "train.setup",
        "train.loop",
        "plan",
    ],
    ["prompt_files"],
    ["respond", "adopt", "resolving"],
    ["run_consistency", "run_length", "interactive"],
    ["evaluate_command"],
    ["verbs", "verify"],
    ["main", "supervise", "chaos"],
]
ROW = {name: number for number, row in enumerate(ROWS) for name in row}

TENSORFLOW = {"tensorflow", "tensorflow_datasets", "sentencepiece", "clu"}
SLOW_OR_OPTIONAL = TENSORFLOW | {"tokenizers", "datasketch", "pyarrow", "sacrebleu", "sklearn", "scipy", "jinja2"}
SLOW_OR_OPTIONAL |= {"torch", "transformers", "gguf", "qwix"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MAX_FILE, MAX_FUNCTION, MAX_P90, MAX_MEDIAN, MAX_KEYS = 600, 80, 50, 15, 210

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def place(node: ast.AST, path: pathlib.Path) -> str:
    return f"{path.relative_to(ROOT)}:{node.lineno}"


def module_name(path: pathlib.Path) -> str:
    """`lslm_jax/data/shards.py` -> `data.shards`; a package's `__init__.py` is the package."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").strip(".")


MODULES = {module_name(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[tuple[ast.stmt, str]]:
    """Every module imported, anywhere in a file; of `from a import b` it is `a.b` where our `a` has such a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in line {node.lineno}"
            for alias in node.names:
                longer = f"{node.module}.{alias.name}"
                yield node, longer if longer.removeprefix("lslm_jax.") in MODULES else str(node.module)


def row(module: str) -> int:
    room = module.split(".")[0]
    assert module in ROW or room in ROW, f"lslm_jax.{module} has no row: give it one in {pathlib.Path(__file__).name}"
    return ROW.get(module, ROW.get(room, -1))


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def test_every_module_imports_only_from_the_rows_above_it():
    wrong = []
    for path, tree in TREES.items():
        name = module_name(path)
        for node, target in imports(tree):
            other = target.removeprefix("lslm_jax").lstrip(".")
            if not target.startswith("lslm_jax") or other == "":
                continue
            same_room = "." in name and name.split(".")[0] == other.split(".")[0]
            if not (row(other) < row(name) or (same_room and row(other) == row(name))):
                wrong.append(f"{place(node, path)}: {name} must not import {other}")
    assert not wrong, "\n".join(wrong)


def test_a_room_does_not_hold_a_room():
    deep = [str(path) for path in FILES if len(path.relative_to(PACKAGE).parts) > 2]
    assert not deep


def test_tensorflow_and_its_kin_stay_in_data_observe_and_imports():
    wrong = [
        f"{place(node, path)}: imports {target}"
        for path, tree in TREES.items()
        for node, target in imports(tree)
        if target.split(".")[0] in TENSORFLOW and not module_name(path).startswith(("data", "observe", "imports"))
    ]
    assert not wrong, "\n".join(wrong)


def test_slow_and_optional_packages_are_imported_inside_functions_only():
    wrong = []
    for path, tree in TREES.items():
        inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
        for node, target in imports(tree):
            if target.split(".")[0] in SLOW_OR_OPTIONAL and id(node) not in inside:
                wrong.append(f"{place(node, path)}: imports {target} at the top")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled_or_evaluated_and_pjit_is_gone():
    wrong = []
    for path, tree in TREES.items():
        wrong += [place(n, path) for n, target in imports(tree) if UNSAFE_MODULES & {target.split(".")[0]}]
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec")):
                    wrong.append(place(node, path))
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    wrong.append(place(node, path))
                case ast.alias(name=name) if "pjit" in name:
                    wrong.append(place(node, path))
                case ast.Attribute(attr="pjit"):
                    wrong.append(place(node, path))
    assert not wrong, "\n".join(wrong)


def test_models_never_name_a_mesh_axis():
    wrong = [
        place(node, path)
        for path, tree in TREES.items()
        if module_name(path).startswith("models")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    del lengths["config.py"]  # a list, to be looked up rather than read
    long = {path: length for path, length in lengths.items() if length > MAX_FILE}
    assert not long


def test_functions_are_short_but_for_the_loop(record_property):
    sizes = {
        (module_name(path), function.name, function.lineno): lines_of(function)
        for path, tree in TREES.items()
        for function in functions(tree)
    }
    median, p90 = statistics.median(sizes.values()), statistics.quantiles(sizes.values(), n=10)[-1]
    record_property("function_lines", {"count": len(sizes), "median": median, "p90": p90, "max": max(sizes.values())})
    long = {where: size for where, size in sizes.items() if size > MAX_FUNCTION}
    loops = [where for where in long if where[0] == "train.loop"]
    assert len(loops) <= 1 and long.keys() == set(loops), long
    assert median <= MAX_MEDIAN and p90 < MAX_P90, f"median {median}, 90th percentile {p90}"


@pytest.mark.parametrize("path", [path for path in FILES if path.name != "__init__.py"], ids=module_name)
def test_a_module_and_its_public_names_are_documented(path):
    tree = TREES[path]
    bare = [] if ast.get_docstring(tree) else ["the module itself"]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            bare += [] if ast.get_docstring(node) else [node.name]
    assert not bare


def test_the_readers_tour_names_five_files_that_exist():
    tour = re.findall(r"^\d\. \[`(lslm_jax/[\w/]+\.py)`\]\(\1\)", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(tour) == 5 == len(set(tour)), f"README.md lists {tour}"
    assert [path for path in tour if not (ROOT / path).is_file()] == []


def test_settings_are_few_and_documented():
    entries = list(describe())
    assert len(entries) <= MAX_KEYS
    assert [entry.key for entry in entries if not entry.doc.strip()] == []


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_planted_and_its_tests_exist(fault):
    assert (PACKAGE / fault.file).read_text().count(fault.line) == 1
    assert all((ROOT / "tests" / name).is_file() for name in fault.tests.split())
