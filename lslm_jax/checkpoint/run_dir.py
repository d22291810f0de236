"""Where a run and its data are, and what its config leaves to them: vocabulary, special tokens and labels."""

import contextlib
import functools
import hashlib
import json
import os
from typing import Any

from etils import epath

from lslm_jax.checkpoint import integrity
from lslm_jax.config import Config
from lslm_jax.data import synthetic_data
from lslm_jax.data.prepare import data_manifest
from lslm_jax.data.tokenizers import special_tokens
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, DataError, InputMissing, SaveError, first_line
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io, lazy_imports
from lslm_jax.runtime.progress import say


def workdir(path: str, *, reads: bool = False) -> epath.Path:
    """The run directory, made if it is missing; a bucket is tried once.

    Args:
      path: as the user wrote it.
      reads: for a command that reads a run: nothing is made or tried, and it need not be writable.

    Raises:
      ConfigError: it is in a bucket, and a package is missing.
      InputMissing: it is to be read, and is not there.
      SaveError: it cannot be written.
    """
    directory = atomic_io.place(path)
    if reads and not atomic_io.is_remote(directory):
        if not directory.is_dir():
            raise InputMissing(f"{directory} is no run directory")
        return directory
    if atomic_io.is_remote(directory):
        if path.startswith("gs://"):
            lazy_imports.require_google_cloud(path)
        if multihost.is_primary() and not reads:
            _try(directory)
        return directory
    _check_no_pretrained(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SaveError(f"cannot create {directory}: {error.strerror}") from error
    if not os.access(directory, os.W_OK):
        raise SaveError(f"cannot write in {directory}: permission denied for user id {os.getuid()}")
    return directory


def _check_no_pretrained(directory: epath.Path) -> None:
    """Raises a ConfigError for the directory of a Hugging Face model, whose config.json a run would overwrite."""
    with contextlib.suppress(DataError, OSError):  # no config.json, or none that can be read
        if atomic_io.read_json(directory / "config.json").keys() & {"model_type", "architectures"}:
            raise ConfigError(f"{directory} holds a Hugging Face model: choose another --workdir for the run")


@functools.cache
def _try(directory: epath.Path) -> None:
    """Writes to a bucket, where directories are nothing and all can be made, and takes it back."""
    probe = directory / ".probe"
    try:
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # whatever those raise that speak to it
        reason = first_line(error) or type(error).__name__
        raise SaveError(f"cannot create {directory}: {reason}") from error


def write_result(workdir: epath.Path, result: dict[str, Any]) -> None:
    """Writes the result that a run ended with, with the sha256 of its values; SaveError where the disk refuses."""
    atomic_io.write(workdir / "result.json", json.dumps(result | {"sha256": _digest(result)}).encode() + b"\n")


def _digest(result: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(result, sort_keys=True).encode()).hexdigest()


def read_result(workdir: epath.Path) -> dict[str, Any]:
    """The result that a run ended with; {"step": 0} where there is none, or none that can be believed."""
    path = workdir / "result.json"
    if not path.exists():
        return {"step": 0}
    try:
        result = atomic_io.read_json(path)
        sha256, step = result.pop("sha256", None), result.get("step")
        if not isinstance(step, int) or isinstance(step, bool) or step < 0:
            raise DataError(f"{path} does not hold the step of a result")
        if sha256 is not None and sha256 != _digest(result):  # versions before had none
            raise DataError(f"{path} was altered: its sha256 is not that of its values")
        steps = integrity.list_steps(workdir / "checkpoints")
        if steps and steps[-1] < step:
            raise DataError(f"{path} is of step {step}, but the newest checkpoint is of step {steps[-1]}")
    except (DataError, OSError) as error:
        say(f"{first_line(error)}: it is ignored")
        return {"step": 0}
    return result


def data_dir(config: Config, workdir: epath.Path) -> epath.Path:
    """Where the prepared data of a run are."""
    return atomic_io.place(config.data.dir) if config.data.dir else workdir / "data"


def by_data(config: Config, data_dir: epath.Path) -> tuple[Config, dict[str, Any]]:
    """The config with the vocabulary and labels of the prepared data, and that data's manifest with its sha256.

    Raises:
      InputMissing: nothing is prepared.
    """
    return special_tokens.resolve(config, read_manifest(config, data_dir))


def read_manifest(config: Config, data_dir: epath.Path) -> dict[str, Any]:
    """The manifest of prepared data, with the sha256 of their content; of synthetic data what stands for it.

    Raises:
      InputMissing: nothing is prepared.
      DataError: the manifest is damaged or was altered.
    """
    if config.data.source == "synthetic" and not config.data.mixture:
        return synthetic_data.facts(config)
    facts = data_manifest.read(data_dir / "manifest.json")
    if facts is None:
        raise InputMissing(f"{data_dir} holds no prepared data (no manifest.json): run prepare or train first")
    data_manifest.check_content(facts, data_dir)
    facts["sha256"] = data_manifest.content_sha256(facts)
    facts.setdefault("labels", [])  # written by earlier versions
    return facts


def by_tokenizer(config: Config) -> tuple[Config, dict[str, Any]]:
    """A config with the vocabulary and labels that it names itself, and what a manifest would say of them."""
    path = epath.Path(config.tokenizer.path)
    facts = {"tokenizer": load_tokenizer(path).facts() | {"file": path.name}, "labels": list(config.data.labels)}
    return special_tokens.resolve(config, facts)
