"""The rules of the house, read off the source: who imports whom, how long things are, what is banned."""

import ast
import collections
import graphlib
import pathlib
import re
import statistics
from collections.abc import Iterator

import pytest
from import_layers import ARCHITECTURE, layer_of, may_import, section
from planted_faults import FAULTS

from lslm_jax.config.loading import describe

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "lslm_jax"

TENSORFLOW = {"tensorflow", "tensorflow_datasets", "sentencepiece", "clu"}
SLOW_OR_OPTIONAL = TENSORFLOW | {"tokenizers", "datasketch", "pyarrow", "sacrebleu", "sklearn", "scipy", "jinja2"}
SLOW_OR_OPTIONAL |= {"torch", "transformers", "gguf", "qwix"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
MAX_PACKAGE, MAX_FILE, MAX_FUNCTION, MAX_P90, MAX_MEDIAN, MAX_KEYS = 20, 600, 80, 50, 15, 210

FILES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}


def location(node: ast.AST, path: pathlib.Path) -> str:
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


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def lines_of(function: ast.FunctionDef) -> int:
    return function.end_lineno - function.lineno + 1


def internal_imports() -> Iterator[tuple[str, str, str]]:
    """Every import between modules of the package: importing module, imported module, and its position."""
    for path, tree in TREES.items():
        for node, target in imports(tree):
            other = target.removeprefix("lslm_jax").lstrip(".")
            if target.startswith("lslm_jax") and other:
                yield module_name(path), other, location(node, path)


def test_every_module_imports_only_from_the_layers_above_it():
    assert [name for name in sorted(MODULES - {""}) if layer_of(name) is None] == []
    wrong = [
        f"{where}: {name} must not import {other}"
        for name, other, where in internal_imports()
        if not may_import(name, other)
    ]
    assert not wrong, "\n".join(wrong)


def test_modules_do_not_import_each_other_in_a_circle():
    graph = {name: set() for name in MODULES}
    for name, other, _ in internal_imports():
        graph[name].add(other)
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises a CycleError


def test_the_architecture_page_shows_the_layers():
    assert section() in ARCHITECTURE.read_text(), "run: python tests/import_layers.py"


def test_packages_are_small_and_three_levels_deep_at_most():
    sizes = collections.Counter(path.parent.relative_to(PACKAGE) for path in FILES if path.name != "__init__.py")
    assert {str(path): size for path, size in sizes.items() if size > MAX_PACKAGE} == {}
    assert [path.name for path in FILES if path.parent == PACKAGE] == ["__init__.py", "errors.py", "main.py"]
    assert [path for path in sizes if len(path.parts) > 2] == []


def test_tensorflow_and_its_kin_stay_in_data_metrics_and_lazy_imports():
    wrong = [
        f"{location(node, path)}: imports {target}"
        for path, tree in TREES.items()
        for node, target in imports(tree)
        if target.split(".")[0] in TENSORFLOW
        and not module_name(path).startswith(("data", "train.metrics_logging", "runtime.lazy_imports"))
    ]
    assert not wrong, "\n".join(wrong)


def test_slow_and_optional_packages_are_imported_inside_functions_only():
    wrong = []
    for path, tree in TREES.items():
        inside = {id(node) for function in functions(tree) for node in ast.walk(function)}
        for node, target in imports(tree):
            if target.split(".")[0] in SLOW_OR_OPTIONAL and id(node) not in inside:
                wrong.append(f"{location(node, path)}: imports {target} at the top")
    assert not wrong, "\n".join(wrong)


def test_nothing_is_unpickled_or_evaluated_and_pjit_is_gone():
    wrong = []
    for path, tree in TREES.items():
        wrong += [location(n, path) for n, target in imports(tree) if UNSAFE_MODULES & {target.split(".")[0]}]
        for node in ast.walk(tree):
            match node:
                case ast.Call(func=ast.Name(id="eval" | "exec")):
                    wrong.append(location(node, path))
                case ast.keyword(arg="allow_pickle", value=ast.Constant(value=True)):
                    wrong.append(location(node, path))
                case ast.alias(name=name) if "pjit" in name:
                    wrong.append(location(node, path))
                case ast.Attribute(attr="pjit"):
                    wrong.append(location(node, path))
    assert not wrong, "\n".join(wrong)


def test_models_never_name_a_mesh_axis():
    wrong = [
        location(node, path)
        for path, tree in TREES.items()
        if module_name(path).startswith("models")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in ("fsdp", "tensor")
    ]
    assert not wrong, "\n".join(wrong)


def test_files_can_be_read_in_one_sitting():
    lengths = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in FILES}
    del lengths["config/schema.py"]  # a list, to be looked up rather than read
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
