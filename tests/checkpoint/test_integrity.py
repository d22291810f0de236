"""Damaged checkpoints are set aside, never deleted, and never built upon."""

import errno
import json
import pathlib
import random
import shutil

import pytest
from etils import epath

from lslm_jax.checkpoint import integrity
from lslm_jax.checkpoint.integrity import check_manifest, discard, settle, write_manifest
from lslm_jax.errors import CheckpointRefused


@pytest.fixture
def checkpoints(tmp_path):
    """Steps 90, 100 and 110, each of one file and a manifest."""
    directory = epath.Path(tmp_path) / "checkpoints"
    for step in (90, 100, 110):
        part = directory / str(step) / "model"
        part.mkdir(parents=True)
        (part / "array").write_bytes(bytes(range(100)) + str(step).encode())
        write_manifest(directory / str(step))
    return directory


def damage(checkpoints, step):
    path = checkpoints / str(step) / "model" / "array"
    path.write_bytes(path.read_bytes()[:50] + b"\x00" + path.read_bytes()[51:])


def steps(checkpoints):
    return sorted(int(path.name) for path in checkpoints.iterdir())


def test_the_newest_whole_one_is_left_as_the_newest(checkpoints):
    lines = []
    for step in (90, 110):
        damage(checkpoints, step)
    settle(checkpoints, lines.append)
    assert steps(checkpoints) == [90, 100], "what lies behind a whole one is not looked at"
    (line,) = lines
    assert "110/model/array is damaged" in line and "going back to step 100" in line
    (aside,) = (checkpoints.parent / "damaged").iterdir()
    assert aside.name.startswith("110-") and (aside / "model" / "array").exists()
    settle(checkpoints, lines.append)
    assert len(lines) == 1


def test_if_none_is_whole_all_stay_and_the_run_is_refused_with_every_reason(checkpoints):
    for step in (90, 100, 110):
        damage(checkpoints, step)
    with pytest.raises(CheckpointRefused) as error:
        settle(checkpoints, print)
    assert all(f"{step}/model/array is damaged" in str(error.value) for step in (90, 100, 110))
    assert steps(checkpoints) == [90, 100, 110] and not (checkpoints.parent / "damaged").exists()


def unfinish(checkpoints, step):
    (checkpoints / str(step) / "manifest.json").unlink()


def test_one_without_a_manifest_was_never_finished(checkpoints):
    lines = []
    unfinish(checkpoints, 110)
    assert settle(checkpoints, lines.append) == 100
    assert steps(checkpoints) == [90, 100]
    assert "110 has no manifest.json: it was never finished; going back to step 100" in lines[0]


def test_the_newest_unfinished_one_is_taken_only_where_none_is_whole(checkpoints):
    lines = []
    damage(checkpoints, 90)
    damage(checkpoints, 110)
    unfinish(checkpoints, 100)
    assert settle(checkpoints, lines.append) == 100
    assert "it is taken as it is" in lines[0] and "going back to step 100" in lines[1]
    assert steps(checkpoints) == [90, 100]
    check_manifest(checkpoints / "100")
    assert settle(checkpoints, lines.append) == 100 and len(lines) == 2


def test_where_there_is_no_checkpoint_there_is_nothing_to_say(tmp_path):
    settle(epath.Path(tmp_path) / "checkpoints", print)


@pytest.mark.parametrize(
    ("kind", "flips"), [("d", 100), ("others", 100), pytest.param("d", 1000, marks=pytest.mark.exhaustive)]
)
def test_no_flipped_bit_of_a_real_checkpoint_goes_unseen(kind, flips, tmp_path):
    golden = pathlib.Path(__file__).parents[1] / "train" / "golden" / "0.1.0" / "checkpoints" / "4"
    saved = epath.Path(shutil.copytree(golden, tmp_path / "4"))
    check_manifest(saved)
    files = [
        path for path in (tmp_path / "4").rglob("*") if path.is_file() and (path.parent.name == "d") == (kind == "d")
    ]
    rng, unseen = random.Random(0), []
    for path in rng.choices(files, [path.stat().st_size for path in files], k=flips):
        whole = path.read_bytes()
        spoilt = bytearray(whole)
        place, bit = rng.randrange(len(whole)), rng.randrange(8)
        spoilt[place] ^= 1 << bit
        path.write_bytes(spoilt)
        try:
            check_manifest(saved)
            unseen.append((path, place, bit))
        except CheckpointRefused:
            pass
        path.write_bytes(whole)
    assert not unseen


def edit(checkpoints, step, change):
    path = checkpoints / str(step) / "manifest.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.clear(), "manifest.json is damaged"),
        (lambda content: content.update(files={}), "manifest.json is damaged"),
        (lambda content: content.update(step=90), "own sha256 does not match"),
        (lambda content: content["files"]["model/array"].update(bytes=5), "own sha256 does not match"),
        (
            lambda content: content["files"].update({"/dev/zero": {"bytes": 0, "sha256": "0" * 64}}),
            "no file of a check",
        ),
        (lambda content: content["files"].update({"../x": {"bytes": 0, "sha256": "0" * 64}}), "no file of a check"),
    ],
)
def test_an_altered_manifest_is_refused(checkpoints, change, message):
    check_manifest(checkpoints / "110")
    edit(checkpoints, 110, change)
    with pytest.raises(CheckpointRefused, match=message):
        check_manifest(checkpoints / "110")


def test_a_manifest_of_an_older_version_without_step_and_sha256_is_read(checkpoints):
    def age(content):
        del content["step"], content["sha256"]

    edit(checkpoints, 110, age)
    check_manifest(checkpoints / "110")


def test_a_file_that_is_not_listed_and_a_renamed_step_are_refused(checkpoints):
    planted = checkpoints / "110" / "ema" / "array"
    planted.parent.mkdir()
    planted.write_bytes(b"x")
    for parts in ((), ("model",), ("ema",)):
        with pytest.raises(CheckpointRefused, match=r"110/ema/array is not listed"):
            check_manifest(checkpoints / "110", parts)
    (checkpoints / "100").rename(checkpoints / "120")
    with pytest.raises(CheckpointRefused, match=r"120 holds the checkpoint of step 100: it was renamed"):
        check_manifest(checkpoints / "120")


def test_a_listed_file_that_is_a_device_is_refused_before_it_is_read(checkpoints):
    path = checkpoints / "110" / "model" / "array"
    path.unlink()
    pathlib.Path(path).symlink_to("/dev/zero")
    with pytest.raises(CheckpointRefused, match="is not a regular file"):
        check_manifest(checkpoints / "110")


def test_where_checkpoints_lie_on_another_disk_a_damaged_one_is_set_aside_there(checkpoints, monkeypatch):
    damage(checkpoints, 110)
    rename = type(checkpoints).rename

    def refuse_elsewhere(path, to):
        if checkpoints not in epath.Path(to).parents:
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        return rename(path, to)

    monkeypatch.setattr(type(checkpoints), "rename", refuse_elsewhere)
    assert settle(checkpoints, print) == 100
    (aside,) = (checkpoints / "damaged").iterdir()
    assert aside.name.startswith("110-") and settle(checkpoints, print) == 100


def test_of_a_link_to_an_archive_a_rollback_removes_the_link_alone(checkpoints, tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    shutil.move(checkpoints / "110", archive / "110")
    pathlib.Path(checkpoints / "110").symlink_to(archive / "110")
    discard(checkpoints / "110")
    assert steps(checkpoints) == [90, 100] and (archive / "110" / "manifest.json").exists()


def test_what_is_set_aside_twice_in_a_second_keeps_both(checkpoints, monkeypatch):
    monkeypatch.setattr(integrity.time, "time", lambda: 315532800.0)  # a clock that stands in 1980
    found = []
    for _ in range(3):
        path = checkpoints / "30"
        path.mkdir(exist_ok=True)
        (path / "a").write_text(str(len(found)))
        found.append(integrity.set_aside(path, "damaged"))
    assert [path.name for path in found] == ["30-315532800", "30-315532800-2", "30-315532800-3"]
    assert [(path / "a").read_text() for path in found] == ["0", "1", "2"]


@pytest.mark.parametrize("name", ["04", "٤", "²", "4 ", "+4", "9" * 200])
def test_a_name_that_is_no_step_is_no_checkpoint(checkpoints, name):
    before = integrity.list_steps(checkpoints)
    (checkpoints / name).mkdir()
    (checkpoints / name / "manifest.json").write_text("{}")
    assert integrity.list_steps(checkpoints) == before
