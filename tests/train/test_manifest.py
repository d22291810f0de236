"""Damaged checkpoints are set aside, never deleted, and never built upon."""

import pathlib
import random
import shutil

import pytest
from etils import epath

from lslm_jax.errors import CheckpointRefused
from lslm_jax.train.manifest import check_manifest, settle, write_manifest


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
    golden = pathlib.Path(__file__).parent / "golden" / "0.1.0" / "checkpoints" / "4"
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
