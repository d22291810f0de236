"""The result of a complete run is believed only as it was written."""

import json

import pytest
from etils import epath

from lslm_jax.checkpoint import run_dir

RESULT = {"step": 4, "loss": 5.5, "eval/loss": 5.25, "mfu": None}


def test_a_result_is_read_as_it_was_written(tmp_path, capsys):
    workdir = epath.Path(tmp_path)
    assert run_dir.read_result(workdir) == {"step": 0}
    run_dir.write_result(workdir, RESULT)
    assert run_dir.read_result(workdir) == RESULT
    (tmp_path / "result.json").write_text(json.dumps(RESULT))  # of a version that wrote no sha256
    assert run_dir.read_result(workdir) == RESULT
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss": 0.001}, "was altered: its sha256 is not that of its values"),
        ({"eval/loss": None}, "was altered"),
        ({"step": 6}, "was altered"),
        ({"step": "4", "sha256": None}, "does not hold the step of a result"),
        ({"step": True, "sha256": None}, "does not hold the step of a result"),
        ({"step": -1, "sha256": None}, "does not hold the step of a result"),
        ({"step": 6, "sha256": None}, "is of step 6, but the newest checkpoint is of step 4"),
    ],
)
def test_one_that_was_altered_is_ignored_with_a_line(tmp_path, capsys, change, message):
    workdir = epath.Path(tmp_path)
    run_dir.write_result(workdir, RESULT)
    (tmp_path / "checkpoints" / "4").mkdir(parents=True)
    (tmp_path / "checkpoints" / "4" / "manifest.json").write_text("{}")
    altered = json.loads((tmp_path / "result.json").read_text()) | change
    if altered["sha256"] is None:  # as an earlier version writes it
        del altered["sha256"]
    (tmp_path / "result.json").write_text(json.dumps(altered))
    assert run_dir.read_result(workdir) == {"step": 0}
    error = capsys.readouterr().err
    assert message in error and error.endswith(": it is ignored\n")
