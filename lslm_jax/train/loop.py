"""The training loop."""

import contextlib
import statistics
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.checkpoint.periodic_export import Exports
from lslm_jax.config import Config
from lslm_jax.data import dataloader, skipped_batches
from lslm_jax.errors import Preempted
from lslm_jax.evaluate.types import Evaluator
from lslm_jax.models.attention import Backend
from lslm_jax.parallel import multihost
from lslm_jax.parallel.sharding import to_global
from lslm_jax.runtime import atomic_io
from lslm_jax.train.metrics_logging import device_memory, mfu
from lslm_jax.train.setup import Inputs, Run, Sample, set_up
from lslm_jax.train.train_state import State, evaluated_model, num_parameters

_SHOWN = 12  # figures of an evaluation that a person is shown; metrics.jsonl has them all
METRICS = ("loss", "grad_norm", "learning_rate", "tokens", "skipped")  # of any train step, in this order on the record


def train(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    data: dataloader.TrainInput | dataloader.SyntheticInput,
    backend: Backend,
    checkpoints: Checkpoints,
    *,
    evaluate: Evaluator | None,
    sample: Sample | None,
    exports: Exports | None = None,
) -> dict[str, Any]:
    """Trains to `train.steps` from wherever the run stands; metrics, samples and checkpoints go to `workdir`.

    Args: see `setup.Inputs`.

    Returns:
      The summary that the run ends with: last metrics and evaluation, speed, size.

    Raises:
      NumericAbort: the loss or gradient was not finite too often, see `Health`.
      Spike: the loss stayed up, for a caller to go round (`train.spike`).
      Preempted: a signal came; the state is saved.
      CheckpointRefused, SaveError, DataError: as their texts say.
    """
    begun = time.monotonic()
    inputs = Inputs(config, workdir, mesh, data, backend, checkpoints, evaluate, sample, exports)
    with contextlib.ExitStack() as stack:
        run = set_up(inputs, stack)
        # Not before: until now there is nothing to save, and a signal ends the process at once.
        run.preemption.arm()
        _train(run)
        if run.start >= config.train.steps:  # killed after its last step was saved, before its result was written
            _evaluate(run, run.state, is_recorded=True)
    return _summary(run) | {"seconds": round(time.monotonic() - begun, 1)}


def _train(run: Run) -> None:
    """The loop: the metrics of step n are read while step n + 1 runs; nothing else in it waits for the device."""
    config, mesh, steps = run.inputs.config, run.inputs.mesh, run.inputs.config.train.steps
    pending, (leaves, form) = None, jax.tree.flatten(run.state)
    for step in range(run.start + 1, steps + 1):
        run.profiler.step(step, leaves)
        with run.timer.data():
            batch = next(run.batches)
        run.ledger.feed(step, batch)
        leaves, metrics = run.train_step(leaves, to_global(batch, mesh, config.train.batch_size))
        if pending:
            _report(run, *pending)
        pending = (step, metrics)

        stopping = run.agreement.reached(run.preemption.requested is not None) or step == steps
        evaluating = step == steps or (config.eval.every and step % config.eval.every == 0)
        saving = stopping or step % config.checkpoint.every == 0
        if run.copies and (saving or step % config.train.check_copies == 0):
            run.copies.check(form.unflatten(leaves))
        if not (evaluating or saving):
            continue
        _report(run, *pending)
        pending, run.state = None, form.unflatten(leaves)
        with run.timer.pause(), run.watchdog.pause():
            if evaluating:
                _evaluate(run, run.state)
            if saving:
                _save(run, run.state, run.results if evaluating else None)
        if stopping and step < steps:
            cause = run.preemption.requested or "another process is to stop"
            raise Preempted(f"{cause}: step {step} is saved; the same command goes on from there")


def _report(run: Run, step: int, metrics: dict[str, jax.Array]) -> None:
    """Reads the metrics of a finished step, records them where they are due, and judges them."""
    config, progress = run.inputs.config, run.progress
    values = jax.device_get(metrics)
    run.timer.step()
    run.watchdog.step(step)
    run.last = {name: values[name].item() for name in (*METRICS, *sorted(values.keys() - set(METRICS)))}
    loss, skipped = run.last["loss"], int(run.last["skipped"])
    run.ledger.add(step, skipped > 0)
    if skipped:
        progress.message(f"step {step}: loss or gradient is not finite, update skipped ({skipped} in a row)")
    if step % config.log.every == 0 or step == config.train.steps or skipped:
        _record(run, step)
    speed = run.speeds[-1] if run.speeds else None
    progress.update(
        step,
        loss=loss,
        tokens_per_second=speed,
        epoch=_epoch(run, step) or None,
        eval_loss=run.results.get("eval/loss"),
    )
    if warning := run.health.add(step, loss, skipped):
        progress.message(warning)
    run.spikes.add(step, loss)


def _epoch(run: Run, step: int) -> float:
    """Passes over the training rows after a step, skipped batches included."""
    return run.inputs.data.epoch(skipped_batches.at(step, run.skipped_batches))


def _record(run: Run, step: int) -> None:
    """Puts the last metrics, speed and place in the data on the record."""
    speed = run.timer.read()
    if speed:
        run.speeds.append(speed["tokens_per_second"])
        used = _mfu(run, run.speeds[-1])
        speed |= ({} if used is None else {"mfu": used}) | device_memory()
    run.record.write(step, run.last | {"epoch": _epoch(run, step)}, speed)
    run.ledger.write()


def _save(run: Run, state: State, results: dict[str, float] | None) -> None:
    """Saves a checkpoint with the results of its evaluation, after the files beside it were synced that far."""
    run.ledger.sync()
    run.record.sync()
    memory = run.spikes.memory | {"health": run.health.memory, "metrics": run.record.memory}
    run.inputs.checkpoints.save(state, results, memory)
    if run.inputs.exports:
        run.inputs.exports.save(state, results)


def _evaluate(run: Run, state: State, *, is_recorded: bool = False) -> None:
    """Evaluates and samples one state; texts go to files, numbers on the record unless they are there already."""
    step, files, inputs = int(state.step), {}, run.inputs
    run.results, run.facts = {}, {}
    if inputs.evaluate:
        report = inputs.evaluate(evaluated_model(state))
        run.results = {f"eval/{name}": value for name, value in report.metrics.items()}
        run.facts = {f"eval/{name}": value for name, value in report.facts.items()}
        files = {f"{step}-{name}": text for name, text in report.files.items()}
        shown = [f"{name} {value:.4g}" for name, value in list(run.results.items())[:_SHOWN]]
        more = [f"and {len(run.results) - _SHOWN} more in metrics.jsonl"] if len(run.results) > _SHOWN else []
        run.progress.message(f"step {step}: " + "  ".join(shown + more))
    if run.results and not is_recorded:
        run.record.write(step, run.results)
    if inputs.sample and not is_recorded:
        files[f"{step}.txt"] = text = inputs.sample(evaluated_model(state))
        run.progress.message(text)
        run.record.text(step, "samples", text)
    for name, text in files.items() if multihost.is_primary() else ():
        (inputs.workdir / "samples").mkdir(exist_ok=True)
        atomic_io.write(inputs.workdir / "samples" / name, text.encode())


def _mfu(run: Run, speed: float) -> float | None:
    """Model FLOPs utilization at a speed in tokens per second."""
    mesh = run.inputs.mesh
    return mfu(speed, run.flops, mesh.size, mesh.devices.flat[0].device_kind)


def _summary(run: Run) -> dict[str, Any]:
    """The result that the run ends with."""
    speed = statistics.median(run.speeds) if run.speeds else None
    return {
        "step": int(run.state.step),
        **{name: run.last[name] for name in ("loss", "grad_norm", "learning_rate") if name in run.last},
        **run.results,
        **run.facts,
        **run.health.summary(),
        "tokens_per_second": speed,
        "mfu": _mfu(run, speed) if speed else None,
        "parameters": num_parameters(run.state.model),
        "attention": run.inputs.backend.name,
    }
