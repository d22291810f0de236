"""`verify`: whether the files of a run are those that were written, byte for byte."""

import contextlib
import hashlib
import os
import time
from typing import Any

from etils import epath

from lslm_jax.checkpoint import metadata, run_consistency, run_dir
from lslm_jax.checkpoint.integrity import check_manifest, checkpoints_in, has_manifest
from lslm_jax.config import Config, loading
from lslm_jax.data.prepare import data_manifest
from lslm_jax.errors import CheckpointRefused, DataError, InputMissing, LslmError
from lslm_jax.runtime import atomic_io, file_lock
from lslm_jax.runtime.progress import say

_RECENT = 60.0  # seconds without a write after which nobody is writing to a checkpoint


def verify(workdir: epath.Path) -> dict[str, Any]:
    """Compares every checkpoint, and the prepared data, with their manifests, and says of each what was found.

    It needs no sound config: the directory may be a copy, on another machine.

    Args:
      workdir: a run directory, or a copy of one.

    Returns:
      The steps of its `checkpoints`, and the number of `data_bytes`.

    Raises:
      InputMissing: there is neither.
      CheckpointRefused, DataError: something is damaged; the line names it all.
    """
    checkpoints = checkpoints_in(workdir / "checkpoints")
    own = workdir / "config.json"
    config = loading.load(str(own)) if own.exists() else Config()
    data_dir = run_dir.data_dir(config, workdir)
    if not checkpoints and not (data_dir / "manifest.json").exists():
        raise InputMissing(f"{workdir} holds neither checkpoints nor data")
    damage: dict[epath.Path, LslmError] = {}
    for path in checkpoints:
        try:
            check_manifest(path)
            say(f"{path} is whole")
        except CheckpointRefused as error:
            if _is_in_progress(workdir, path):
                say(f"{path} is being saved or deleted by a running training: it is not verified")
                continue
            damage[path] = error
            say(str(error))
    checkpoints, size = [path for path in checkpoints if path in damage or has_manifest(path)], 0
    try:
        size = _verify_data(data_dir, needs_data=config.data.source != "synthetic" or bool(config.data.mixture))
        run_consistency.check_files(workdir, config, [path for path in checkpoints if path not in damage])
    except (DataError, CheckpointRefused) as error:
        damage[data_dir] = error
    if len(damage) == 1:
        raise next(iter(damage.values()))
    if damage:
        raise CheckpointRefused("; ".join(map(str, damage.values())))
    for path in checkpoints[-1:] if checkpoints and has_manifest(checkpoints[-1]) else ():
        _check_record(workdir / "metrics.jsonl", path)
    return {"checkpoints": [int(path.name) for path in checkpoints], "data_bytes": size}


def _is_in_progress(workdir: epath.Path, checkpoint: epath.Path) -> bool:
    """True for a checkpoint without a manifest that a running training works on; a manifest is written last."""
    if has_manifest(checkpoint) or atomic_io.is_remote(workdir) or not file_lock.may_be_held(workdir / "lock"):
        return False
    times = [time.time()]  # of one that is gone
    with contextlib.suppress(OSError):
        paths = [os.path.join(parent, name) for parent, _, names in os.walk(checkpoint) for name in ("", *names)]
        times = [os.stat(path).st_mtime for path in paths] or times
    return time.time() - max(times) < _RECENT


def _check_record(path: epath.Path, checkpoint: epath.Path) -> None:
    """Warns where the metrics up to a checkpoint are not those that were on the record when it was saved."""
    memory = metadata.read(checkpoint)["memory"].get("metrics")
    if not isinstance(memory, dict) or not isinstance(count := memory.get("lines"), int):  # of an earlier version
        return
    lines = path.read_bytes().splitlines(keepends=True)[:count] if path.is_file() else []
    if hashlib.sha256(b"".join(lines)).hexdigest() != memory.get("sha256"):
        say(f"warning: {path} is not the record that {checkpoint} was saved with: lines of it were altered or removed")


def _verify_data(data_dir: epath.Path, *, needs_data: bool) -> int:
    """Verifies the prepared data; returns their size in bytes, 0 where a copy of a run was made without them.

    Raises:
      DataError: they are damaged, or only their manifest is gone.
    """
    record = data_manifest.read(data_dir / "manifest.json")
    if record is None:
        is_unfinished = (data_dir / "unfinished.json").exists()
        splits = [path.parent for pattern in ("train", "*/train") for path in data_dir.glob(f"{pattern}/manifest.json")]
        if splits and not is_unfinished:
            raise DataError(f"{data_dir}/manifest.json is missing, but there is {splits[0]}: restore it")
        if needs_data:
            say(f"{data_dir} holds {'half' if is_unfinished else 'no'} prepared data: they are not verified")
        return 0
    size = data_manifest.verify(data_dir)
    say(f"{data_dir} is whole: {size:,} bytes")
    for name in data_manifest.changed_inputs(record):
        say(f"warning: {name} has changed since {data_dir} was prepared from it")
    return size
