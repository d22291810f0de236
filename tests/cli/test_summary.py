"""Results on a terminal: a table with what to type next; JSON where stdout is not a terminal."""

import json
import sys

import pytest

from lslm_jax.cli import summary
from lslm_jax.main import main


def test_a_table_has_a_line_for_each_figure_and_the_next_commands():
    result = {
        "step": 12000,
        "eval/loss": 1.23456789,
        "mfu": None,
        "splits": {"train": {"tokens": 5}},
        "files": ["a", "b"],
    }
    assert summary.text(result, "train", "runs/a b").splitlines() == [
        "step                 12,000",
        "eval/loss            1.23457",
        "mfu                  -",
        "splits.train.tokens  5",
        "files                a, b",
        "run directory        runs/a b",
        "next:",
        "  lslm generate --workdir='runs/a b'",
        "  lslm evaluate --files=FILE --workdir='runs/a b'",
        "  lslm export --to=DIR --workdir='runs/a b'",
    ]
    assert summary.text({"bytes": 3}, "verify", "") == "bytes  3"


def test_long_lists_are_cut_and_names_cannot_drive_the_terminal():
    text = summary.text({"files": [f"f{i}" for i in range(10)], "label": "a\x1b[2J\nb", "ok": True}, "evaluate", None)
    assert "f7, and 2 more" in text and "f8" not in text
    assert text.count("\n") == 2 and "\x1b" not in text and text.endswith("ok     True")


def test_a_terminal_gets_the_table_and_a_pipe_the_json(tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("a text\n" * 50)
    data = {"files": [f"{tmp_path}/a.txt"], "seq_len": 32}
    (tmp_path / "c.json").write_text(json.dumps({"data": data, "tokenizer": {"kind": "bytes"}}))
    for command, figure in (["prepare", f"--config={tmp_path}/c.json"], "documents"), (["verify"], "data_bytes"):
        shown = []
        for is_terminal in (False, True):
            monkeypatch.setattr(sys.stdout, "isatty", lambda is_terminal=is_terminal: is_terminal)
            with pytest.raises(SystemExit) as stop:
                main([*command, f"--workdir={tmp_path}/run"])
            assert stop.value.code == 0
            shown.append(capsys.readouterr().out)
        assert figure in json.loads(shown[0]) and shown[1].splitlines()[-1].startswith("run directory ")
        assert any(line.startswith(f"{figure} ") for line in shown[1].splitlines())
