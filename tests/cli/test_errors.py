"""Every row of tests/error_table.py ends as it says, in one line; docs/errors.md is made of it.

`python tests/cli/test_errors.py` writes that page.
"""

import inspect
import json
import os
import pathlib
import shutil
import sys

import error_table
import pytest
from error_table import CONFIG, ELSEWHERE, TABLE, TEXT, Case, matches

from lslm_jax.errors import LslmError
from lslm_jax.main import main

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "errors.md"
CASES = [case for cases in TABLE.values() for case in cases]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A directory with a config, a corpus, and a run of four steps, saved at 2 and 4."""
    root = tmp_path_factory.mktemp("run")
    (root / "corpus.txt").write_text(TEXT)
    (root / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(SystemExit) as stop:
        main(command(root, Case("", 0, "")))
    assert stop.value.code == 0
    return root


def command(root: pathlib.Path, case: Case) -> list[str]:
    given = case.arguments.replace("DIR", str(root)).split()
    usual = {
        "--config": f"{root}/config.json",
        "--workdir": f"{root}/work",
        "--config.data.files": f"{root}/corpus.txt",
    }
    if case.verb == "verify":
        usual = {"--workdir": usual["--workdir"]}
    missing = [f"{name}={value}" for name, value in usual.items() if not any(f"{name}=" in flag for flag in given)]
    return [case.verb, *missing, *given]


@pytest.mark.parametrize("case", CASES, ids=[f"{case.verb}: {case.what}".lower() for case in CASES])
def test_it_ends_with_its_code_and_its_line(case, finished, tmp_path, capsys):
    root = pathlib.Path(shutil.copytree(finished, tmp_path / "copy"))
    # What the run remembers of where its text was goes with it.
    for path in root.rglob("*.json"):
        path.write_text(path.read_text().replace(str(finished), str(root)))
    if case.verb == "train":
        (root / "work/result.json").unlink()  # else the run would be complete, and its checkpoints of no matter
    case.arrange(root)
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(command(root, case))
    output = capsys.readouterr()
    last = output.err.strip().splitlines()[-1]
    assert stop.value.code == case.code, output.err
    assert "Traceback" not in output.err and output.out == ""
    message = f"lslm: {case.message}".replace("DIR", str(root))
    assert matches(message, last), f"{last}\n{message}"


def page() -> str:
    """The page of all errors."""
    codes = "".join(
        f"| {error.exit_code} | {inspect.getdoc(error)} |\n"
        for error in sorted(LslmError.__subclasses__(), key=lambda error: error.exit_code)
    )
    text = f"""# What can go wrong, and what it says

A command that fails prints one line on stderr, `lslm: ` and the cause, and ends with a code that tells what kind of
cause it is; `--debug` shows where it arose. This page is made from `tests/error_table.py`, whose every row is tested.
DIR stands for a directory, * for what differs from case to case.

| exit code | |
|---|---|
| 0 | Done. |
{codes}| 130 | Interrupted before there was anything to save. |
| 141 | Nobody reads what is written to stdout, as after `head`. |
| 1 | A bug of ours, with its traceback; or memory that ran out. |
"""
    head = "\n\n| what | exit code | message |\n|---|---|---|\n"
    for title, cases in error_table.TABLE.items():
        text += f"\n## {title}{head}"
        for case in cases:
            given = f" (`{case.arguments}`)" if case.arguments else ""
            verb = f", `{case.verb}`" if case.verb != "train" else ""
            text += f"| {case.what}{verb}{given} | {case.code} | `{case.message}` |\n".replace("\\", "\\\\")
    rows = [f"| {row.what} | {row.code} | `{row.message}` |\n" for row in ELSEWHERE]
    return f"{text}\n## While a run goes on{head}{''.join(rows)}"


@pytest.mark.parametrize("row", ELSEWHERE, ids=[row.what for row in ELSEWHERE])
def test_what_a_command_alone_does_not_bring_about_is_tested_elsewhere(row):
    assert f'assert_told("{row.what}"' in (pathlib.Path(__file__).parents[1] / row.test).read_text()


def test_the_page_is_that_of_the_table():
    assert PAGE.read_text() == page(), f"run: {os.path.basename(sys.executable)} {pathlib.Path(__file__).name}"


if __name__ == "__main__":
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page())
