"""Checkpoints: what is in one, how it is written and found again. Orbax stays in this file.

WORKDIR/checkpoints/STEP/ holds the parts `model`, `optimizer`, `ema` (where there is one) and `counters`, each a flat
map from parameter name to array, so that evaluation reads the weights alone; Orbax's metadata carry the identity of
what made it; `manifest.json`, written last, lists every file with its size and sha256: without one, it was never
finished. A checkpoint restores on any mesh.
"""

import contextlib
import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from lslm_jax.checkpoint import metadata, run_lock
from lslm_jax.checkpoint import provenance as identities
from lslm_jax.checkpoint.integrity import check_manifest, has_manifest, list_steps, write_manifest
from lslm_jax.config import CheckpointConfig, validation
from lslm_jax.errors import CheckpointRefused, LslmError, NumericAbort, SaveError, first_line
from lslm_jax.parallel import heartbeat, multihost
from lslm_jax.runtime import atomic_io, pytree
from lslm_jax.runtime.progress import say
from lslm_jax.runtime.pytree import flatten, unflatten
from lslm_jax.train.train_state import State, survey

_READ_TRIES, _VANISH_POLLS = 5, 10
_HEAD = "top."  # of the names of what an encoder ends with
_PIECE = 16 << 20  # bytes that each of several devices with one array saves, or one saves all: a cut is compiled


class _WithoutTracebacks(logging.Filter):
    """Drops what Orbax's threads log of an exception, page by page: it is raised as well, and reported in one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and f"{os.sep}orbax{os.sep}" in record.pathname)


logging.getLogger("absl").addFilter(_WithoutTracebacks())


class Checkpoints:
    """The checkpoints of one run; saving goes on in the background."""

    def __init__(
        self, workdir: epath.Path, config: CheckpointConfig, identity: Mapping[str, Any], whole: int | None = None
    ):
        """Opens or creates WORKDIR/checkpoints; what a killed save left behind is removed.

        Args:
          workdir: the run directory.
          config: how long they are kept.
          identity: of the run, from `identity.make`.
          whole: a step whose checkpoint was compared with its manifest just now.
        """
        self._directory = epath.Path(workdir) / "checkpoints"
        self.identity, self._whole = dict(identity), whole
        self._aside = ThreadPoolExecutor(1)
        self._saving: Future[None] | None = None
        policies: Any = ocp.training.save_decision_policies
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._orbax = _open(
                self._directory,
                preservation_policy=_preservation(config),
                save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides
                cleanup_tmp_directories=True,
            )
        except OSError as error:
            raise SaveError(f"cannot write {self._directory}: {error.strerror or error}") from error

    def latest_step(self) -> int | None:
        """The newest whole checkpoint's step; None if there is none."""
        latest = self._orbax.latest
        return None if latest is None else latest.step

    def save(
        self, state: State, metrics: Mapping[str, float] | None = None, memory: Mapping[str, Any] | None = None
    ) -> None:
        """Copies the state to the host and writes it in the background; the arrays may be donated afterwards.

        Args:
          state: what to save, under its own step.
          metrics: evaluation results by which `checkpoint.best` judges.
          memory: what the loop knows besides the state, as JSON values.

        Raises:
          SaveError: this or the save before failed, or the run directory's lock is gone; earlier checkpoints stay.
          NumericAbort: the state has values that are not finite, which nothing could go on from.
        """
        step = int(state.step)
        parts = {name: flatten(part) for name, part in _parts(state).items()}
        found = survey({f"{part}.{name}": leaf for part in parts for name, leaf in parts[part].items()})
        if bad := [name for name, (finite, _) in found.items() if not finite]:
            raise NumericAbort(f"{bad[0]} is not finite at step {step} ({len(bad)} arrays are not): nothing is saved")
        if odd := {name: count for name, (_, count) in found.items() if count and name.startswith("optimizer.")}:
            name, count = next(iter(odd.items()))
            say(f"warning: step {step}: {count} values of {name} are out of the range of moments: weights are stuck")
        self._wait()
        run_lock.check(self._directory.parent)
        with _as_save_error(self._directory / str(step)):
            saved = self._orbax.save_checkpointables_async(
                step, parts, metrics=dict(metrics or {}), custom_metadata=self.identity | {"memory": dict(memory or {})}
            )
        if saved is not None and multihost.is_primary():
            self._saving = self._aside.submit(_finish, saved, self._directory / str(step))

    def lack_of_room(self, state: State) -> str:
        """What is to be said of a disk that has no room for two more checkpoints of this size; "" where it has."""
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        if atomic_io.is_remote(self._directory) or (free := shutil.disk_usage(self._directory).free) >= 2 * size:
            return ""
        return f"{self._directory} has room for {free / 1e9:.1f} GB, and a checkpoint is {size / 1e9:.1f} GB"

    def memory(self, step: int) -> Mapping[str, Any]:
        """What the loop knew besides the state of a step; nothing where it was not saved."""
        return metadata.read(self._directory / str(step))["memory"]

    def restore(self, step: int, abstract: State, log: Callable[[str], None]) -> State:
        """Reads a whole state into the shapes, types and shardings of `abstract`.

        Raises:
          CheckpointRefused: it was made by another model, tokenizer or data, or it is damaged.
        """
        directory = self._directory / str(step)
        if step != self._whole:
            _check(directory)
        identities.check(directory, metadata.read(directory), self.identity, log)
        begins_average = abstract.ema is not None and not (directory / "ema").is_dir()
        wanted = _parts(abstract._replace(ema=None) if begins_average else abstract)
        loaded = _load(directory, {name: flatten(part) for name, part in wanted.items()})
        restored = {name: unflatten(part, loaded[name]) for name, part in wanted.items()}
        counters = restored.pop("counters")
        if int(counters["step"]) != step:
            raise CheckpointRefused(f"{directory} holds the state of step {int(counters['step'])}: it was renamed")
        if begins_average:
            log(f"{directory} has no averaged weights: the average (train.ema) begins with the weights of step {step}")
            restored["ema"] = jax.tree.map(jnp.copy, restored["model"])
        return State(**{"ema": None, **restored, **counters})

    def load_fitting(self, source: epath.Path, model: Any, log: Callable[[str], None], step: int | None = None) -> Any:
        """A model with the weights of another run where it has the same parameters; tells which those are.

        Args:
          source: the `checkpoints` directory of that run.
          model: fresh; what the other run lacks stays as it is.
          log: told what was taken, what is fresh, and what was left behind.
          step: of the checkpoint to read; None for the latest.

        Raises:
          CheckpointRefused: the other run had another tokenizer, or its body another shape.
        """
        directory = atomic_io.place(source) / str(latest_step(source) if step is None else step)
        part = "ema" if (directory / "ema").is_dir() else "model"
        _check(directory, part, "metrics")
        found: Any = ocp.metadata(directory, part)
        made_by, stored = metadata.read(directory), found.metadata
        theirs, mine = made_by["tokenizer_sha256"], self.identity["tokenizer_sha256"]
        if theirs != mine:
            raise CheckpointRefused(
                f"{directory} was made with another tokenizer ({theirs[:12]}, now {mine[:12]}): its embeddings mean "
                f"other tokens; set tokenizer.path to that run's"
            )
        wanted = flatten(model)
        if lost := [name for name in stored if ".lora." in name and name not in wanted]:
            raise CheckpointRefused(
                f"{directory} has adapters that this run lacks ({lost[0]}): set model.lora_rank as it was, or export "
                "that run and start from what it wrote"
            )
        heads_too = _same_task(made_by, self.identity)
        fits = lambda name: name in stored and (heads_too or not name.startswith(_HEAD))
        taken = {name: pytree.abstract(leaf) for name, leaf in wanted.items() if fits(name)}
        _compare(f"{directory}: {part}", {name: stored[name] for name in taken}, taken)
        context = ocp.Context()
        context.pytree.loading.partial_load = True
        with context:
            loaded = ocp.load_checkpointables(directory, {part: taken})[part]
        log(f"started from {len(taken)} of {len(wanted)} parameters in {directory}")
        for what, names in (("fresh", wanted.keys() - taken.keys()), ("left behind", stored.keys() - taken.keys())):
            if names:
                log(f"{what}: {', '.join(sorted(names))}")
        return unflatten(model, wanted | dict(loaded))

    def close(self) -> None:
        """Waits for saves in the background.

        Raises:
          SaveError: one of them failed.
        """
        self._aside.shutdown()
        self._wait()
        with _as_save_error(self._directory):
            self._orbax.close()

    def _wait(self) -> None:
        """Until the save before is done and its manifest written."""
        saving, self._saving = self._saving, None
        if saving is not None:
            with _as_save_error(self._directory):
                saving.result()


def latest_step(directory: epath.Path) -> int:
    """The newest whole checkpoint below a `checkpoints` directory.

    Raises:
      CheckpointRefused: there is none.
    """
    steps = list_steps(directory)
    if not steps:
        raise CheckpointRefused(f"no checkpoint in {directory}")
    return steps[-1]


def best_step(directory: epath.Path, metric: str) -> int:
    """The step of the checkpoint with the best value of an evaluation metric.

    Raises:
      CheckpointRefused: no checkpoint was saved with that metric.
    """
    found = []
    for step in list_steps(directory):
        with contextlib.suppress(OSError, ValueError):  # saved without metrics, or being deleted
            metrics = json.loads((epath.Path(directory) / str(step) / "metrics" / "metrics").read_text())
            if metric in metrics:
                found.append((_rank(metrics, metric), step))
    if not found:
        raise CheckpointRefused(f"no checkpoint in {directory} was saved with {metric}")
    return min(found)[1]


def load_model(directory: epath.Path, abstract: Any, step: int) -> Any:
    """Reads only the weights that evaluation uses, the average where there is one, for the mesh and type of `abstract`.

    Raises:
      CheckpointRefused: the checkpoint is damaged, or its weights have other names or shapes.
    """
    path = atomic_io.place(directory) / str(step)
    name = "ema" if (path / "ema").is_dir() else "model"
    _check(path, name, "metrics")
    return unflatten(abstract, _load(path, {name: flatten(abstract)}, cast=True)[name])


def load_latest(directory: epath.Path, load: Callable[[int], Any]) -> tuple[Any, int]:
    """The result of `load` for the latest checkpoint's step, and that step.

    A run that goes on deletes checkpoints. If one vanishes while it is read, the latest is looked up anew.

    Args:
      directory: `checkpoints` of a run.
      load: reads the checkpoint of a step, for instance by `load_model`.

    Raises:
      CheckpointRefused: there is none, or the latest is damaged.
    """
    if jax.process_count() > 1:  # which have to read the same one, and cannot each try another
        step = multihost.by_primary("latest", lambda: latest_step(directory))
        return load(step), step
    for _ in range(_READ_TRIES):
        step = latest_step(directory)
        try:
            return load(step), step
        except (CheckpointRefused, OSError, ValueError) as error:
            for _ in range(_VANISH_POLLS):  # deletion goes file by file
                steps = list_steps(directory)
                if not steps or steps[-1] != step:
                    break
                time.sleep(0.1)
            else:
                if isinstance(error, LslmError):
                    raise
                raise CheckpointRefused(f"{directory / str(step)} cannot be read: {first_line(error)}") from error
    raise CheckpointRefused(f"the checkpoints in {directory} vanish faster than they can be read: name one by --step")


def _open(directory: epath.Path, **options: Any) -> ocp.training.Checkpointer:
    """Orbax's view of a directory; it reads the metrics of every checkpoint at once."""
    context = ocp.Context()
    context.array.saving.min_slice_bytes_for_replica_parallel = _PIECE
    try:
        return ocp.training.Checkpointer(directory, context=context, **options)
    except ValueError as error:
        for path in filter(has_manifest, directory.iterdir()):
            check_manifest(path)  # which names the file
        raise CheckpointRefused(f"{directory} cannot be read: {first_line(error)}") from error


def _check(directory: epath.Path, *parts: str) -> None:
    """Compares a checkpoint, or parts of it, with its manifest; of several processes one does so for all."""
    multihost.by_primary(f"check {directory.name}", lambda: check_manifest(directory, parts))


def _parts(state: State) -> dict[str, Any]:
    parts = {"model": state.model, "optimizer": state.optimizer, "ema": state.ema}
    counters = {"step": state.step, "skipped": state.skipped}
    return {name: part for name, part in parts.items() if part is not None} | {"counters": counters}


def _load(
    directory: epath.Path, parts: Mapping[str, Mapping[str, jax.ShapeDtypeStruct]], *, cast: bool = False
) -> Mapping[str, Any]:
    """Reads arrays after comparing names and shapes; Orbax's own complaint would be a page long."""
    for part, wanted in parts.items():
        if not (directory / part).is_dir():
            there = sorted(path.name for path in directory.iterdir() if path.is_dir())
            raise CheckpointRefused(f"{directory} has no {part}; it has {', '.join(there)}")
        _compare(f"{directory}: {part}", ocp.metadata(directory, part).metadata, wanted, cast=cast)
    return ocp.load_checkpointables(directory, dict(parts))


def _compare(where: str, stored: Mapping[str, Any], wanted: Mapping[str, Any], *, cast: bool = False) -> None:
    missing, extra = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    if missing or extra:
        raise CheckpointRefused(
            f"{where} has other parameters: {len(missing)} missing ({', '.join(missing[:3])}), "
            f"{len(extra)} unexpected ({', '.join(extra[:3])})"
        )
    for name, leaf in wanted.items():
        if tuple(stored[name].shape) != leaf.shape or not (cast or stored[name].dtype == leaf.dtype):
            raise CheckpointRefused(
                f"{where} has {name} as {stored[name].dtype}{list(stored[name].shape)}, "
                f"the config wants {leaf.dtype}{list(leaf.shape)}"
            )


def _preservation(config: CheckpointConfig) -> Any:
    policies = ocp.training.preservation_policies
    kept: list[Any] = [policies.LatestN(config.keep)]
    if config.keep_every:
        kept.append(policies.EveryNSteps(config.keep_every))
    if config.best:
        rank = lambda metrics: _rank(metrics, config.best)
        kept.append(policies.BestN(get_metric_fn=rank, reverse=True, n=1, keep_checkpoints_without_metrics=False))
    return policies.AnyPreservationPolicy(kept)


def _same_task(theirs: Mapping[str, Any], mine: Mapping[str, Any]) -> bool:
    """Whether heads of both say the same, of the same labels."""
    mean = lambda config: (config["task"]["objective"], config["model"]["num_labels"])
    return mean(theirs["config"]) == mean(mine["config"])


def _rank(metrics: Mapping[str, float], name: str) -> float:
    """Lowest is best. Last is what was not a number, or saved without evaluation, as a preempted run does."""
    value = metrics.get(name, math.nan)
    sign = -1.0 if validation.highest_is_best(name) else 1.0
    return math.inf if math.isnan(value) else sign * value


@contextlib.contextmanager
def _as_save_error(path: epath.Path) -> Iterator[None]:
    """Turns what a failing disk raises, here or in Orbax's threads, into a SaveError."""
    try:
        yield
    except (OSError, ValueError) as error:  # tensorstore's failures are ValueErrors,
        heartbeat.explain(error)  # and so are those of collectives where a process is gone
        raise SaveError(f"cannot save {path}: {first_line(error)}") from error


def _finish(saved: Any, directory: epath.Path) -> None:
    if saved.result():
        write_manifest(directory)
