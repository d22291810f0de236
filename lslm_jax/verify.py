"""`verify`: whether the files of a run are those that were written, byte for byte."""

from typing import Any

from etils import epath

from lslm_jax import atomic, config_loading, resolving, run_consistency
from lslm_jax.config import Config
from lslm_jax.data import records
from lslm_jax.errors import CheckpointRefused, DataError, InputMissing
from lslm_jax.progress import say
from lslm_jax.train import metadata
from lslm_jax.train.manifest import check_manifest


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
    found = [path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    checkpoints = sorted(found, key=lambda path: int(path.name))
    own = workdir / "config.json"
    config = config_loading.load(str(own)) if own.exists() else Config()
    data_dir = resolving.data_dir(config, workdir)
    if not checkpoints and not (data_dir / "manifest.json").exists():
        raise InputMissing(f"{workdir} holds neither checkpoints nor data")
    damaged = []
    for path in checkpoints:
        try:
            check_manifest(path)
            say(f"{path} is whole")
        except CheckpointRefused as error:
            damaged.append(str(error))
            say(str(error))
    try:
        size = records.verify(data_dir)
        _check_data_of(checkpoints, data_dir)
        say(f"{data_dir} is whole: {size:,} bytes")
        for name in records.changed_inputs(records.read(data_dir / "manifest.json") or {}):
            say(f"warning: {name} has changed since {data_dir} was prepared from it")
    except DataError as error:
        if not damaged:
            raise
        damaged.append(str(error))
    if damaged:
        raise CheckpointRefused("; ".join(damaged))
    run_consistency.check_files(workdir, config)
    return {"checkpoints": [int(path.name) for path in checkpoints], "data_bytes": size}


def _check_data_of(checkpoints: list[epath.Path], data_dir: epath.Path) -> None:
    """Compares labels, token ids and counts of the data manifest with those that each checkpoint was trained with."""
    path = data_dir / "manifest.json"
    if not path.exists():
        return
    now = metadata.manifest_sha256(atomic.read_json(path))
    for checkpoint in checkpoints:
        try:
            saved = metadata.read(checkpoint)
        except CheckpointRefused:  # already named
            continue
        metadata.check_manifest_sha256(checkpoint, saved, now)
