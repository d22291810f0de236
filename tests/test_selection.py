"""Selection of tests by what has changed."""

import subprocess

import pytest
import selection

FILES = {
    "package/__init__.py": "",
    "package/low.py": "",
    "package/middle.py": "def f():\n  from package import low",
    "package/other.py": "import json",
    "tests/helper.py": "import package.other",
    "tests/part/test_middle.py": "from package.middle import f",
    "tests/part/test_other.py": "import helper",
    "tests/part/data.json": "{}",
    "README.md": "",
}


@pytest.fixture
def root(tmp_path):
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("changed", "selected"),
    [
        ("package/low.py", {"test_middle"}),
        ("package/other.py", {"test_other"}),
        ("tests/helper.py", {"test_other"}),
        ("package/__init__.py", {"test_middle", "test_other"}),
        ("tests/part/test_middle.py", {"test_middle"}),
        ("tests/part/data.json", {"test_middle", "test_other"}),
        ("README.md", set()),
        ("pyproject.toml", {"test_middle", "test_other"}),
        ("constraints/py311.txt", {"test_middle", "test_other"}),
    ],
)
def test_a_test_file_depends_on_what_it_imports_directly_or_through_others(root, changed, selected):
    tests = sorted((root / "tests" / "part").glob("test_*.py"))
    assert {test.stem for test in tests if selection.depends(test, [changed], root)} == selected


def test_changed_files_include_uncommitted_ones(root):
    def git(*arguments):
        subprocess.run(["git", "-c", "user.name=n", "-c", "user.email=e", *arguments], cwd=root, check=True)

    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    assert selection.changed_files("HEAD", root) == []
    (root / "package" / "low.py").write_text("x = 1")
    (root / "package" / "new.py").write_text("")
    assert selection.changed_files("HEAD", root) == ["package/low.py", "package/new.py"]
    git("add", ".")
    git("commit", "--quiet", "--message=second")
    assert selection.changed_files("HEAD~1", root) == ["package/low.py", "package/new.py"]


def test_shares_together_are_everything_and_none_overlaps():
    items = [f"test_{number}" for number in range(17)]
    shares = [selection.share(items, number, 4) for number in range(4)]
    assert set().union(*shares) == set(items) and sum(map(len, shares)) == 17
    assert selection.share(items, 6, 4) == shares[2]


def test_the_package_is_read_as_python_reads_it():
    files = {path.name for path in selection.imported_files(selection.ROOT / "tests" / "convert" / "test_parity.py")}
    assert {"test_parity.py", "pretrained.py", "layers.py", "attention.py"} <= files
