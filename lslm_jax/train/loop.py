"""The training loop."""

import contextlib
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from lslm_jax import atomic, config_loading, distributed, malloc
from lslm_jax.batch import Batch
from lslm_jax.config import Config
from lslm_jax.data import detours, pipeline, prefetch
from lslm_jax.errors import Preempted
from lslm_jax.evaluate.evaluator import Evaluator
from lslm_jax.models.attention import Backend
from lslm_jax.models.presets import flops_per_token
from lslm_jax.observe import Metrics, Profiler, device_memory, mfu, parameter_table
from lslm_jax.progress import Progress, StepTimer
from lslm_jax.sharding import to_global, use
from lslm_jax.train import reproducible
from lslm_jax.train.begin import begin
from lslm_jax.train.checkpoint import Checkpoints
from lslm_jax.train.copies import Copies
from lslm_jax.train.exports import Exports
from lslm_jax.train.health import Health
from lslm_jax.train.ledger import Ledger, attempts
from lslm_jax.train.optim import make_optimizer
from lslm_jax.train.preemption import Preemption
from lslm_jax.train.spikes import Detector
from lslm_jax.train.state import State, abstract_state, divide, evaluated_model, num_parameters
from lslm_jax.train.step import LeavesStep, compile_for, lower, on_leaves, whole_batch
from lslm_jax.train.watchdog import Watchdog

_SHOWN = 12  # figures of an evaluation that a person is shown; metrics.jsonl has them all
METRICS = ("loss", "grad_norm", "learning_rate", "tokens", "skipped")  # of any train step, in this order on the record

Sample = Callable[[Any], str]


def train(
    config: Config,
    workdir: epath.Path,
    mesh: Mesh,
    data: pipeline.TrainInput | pipeline.SyntheticInput,
    backend: Backend,
    checkpoints: Checkpoints,
    *,
    evaluate: Evaluator | None,
    sample: Sample | None,
    exports: Exports | None = None,
) -> dict[str, Any]:
    """Trains to `train.steps` from wherever the run stands; metrics, samples and checkpoints go to `workdir`.

    The metrics of step n are read while step n + 1 runs; nothing else in the loop waits for the device.

    Args:
      config: resolved.
      workdir: the run directory.
      mesh: set by `jax.set_mesh` as well.
      data: batches by step.
      backend: attention kernel.
      checkpoints: of this run.
      evaluate: reports on a model; None where nothing is held out.
      sample: a text that shows what a model can do; None for no samples.
      exports: of this run, as Hugging Face directories; None for none.

    Returns:
      The summary that the run ends with: last metrics and evaluation, speed, size.

    Raises:
      NumericAbort: the loss or gradient was not finite too often, see `Health`.
      Spike: the loss stayed up, for a caller to go round (`train.spike`).
      Preempted: a signal came; the state is saved.
      CheckpointRefused, SaveError, DataError: as their texts say.
    """
    begun, steps = time.monotonic(), config.train.steps
    tokens_per_step = config.train.batch_size * config.data.seq_len
    example, around = data.batch(0), detours.read(workdir)
    flops = _flops(config, example)
    optimizer = make_optimizer(config.optimizer, steps)
    timer, speeds, last, results, facts = StepTimer(tokens_per_step), [], {}, {}, {}

    with contextlib.ExitStack() as stack:
        preemption, agreement = stack.enter_context(Preemption(armed=False)), distributed.Agreement(mesh)
        for saved in (checkpoints, exports) if exports else (checkpoints,):
            stack.enter_context(contextlib.closing(saved))  # however the run ends, what was saved is whole
        progress = stack.enter_context(Progress(steps))
        record = stack.enter_context(
            contextlib.closing(Metrics(str(workdir), config.log, primary=distributed.is_primary()))
        )
        profiler = stack.enter_context(contextlib.closing(Profiler(str(workdir), config.log.profile)))

        # XLA compiles the step while the weights are made or read; then tensorflow is imported for the first batch.
        aside = stack.enter_context(ThreadPoolExecutor(1))
        abstract = abstract_state(config, optimizer, mesh)
        compiling = aside.submit(_compile, config, optimizer, backend, abstract, example, mesh)
        state = begin(config, optimizer, mesh, checkpoints, progress.message)
        start = int(state.step)
        record.truncate(start)
        _introduce(config, state, mesh, backend, record, progress)
        if scarce := checkpoints.lack_of_room(state):
            progress.message(scarce)
        if exports:
            exports.make_up(state, progress.message)

        # Importing tensorflow takes seconds, which only TensorBoard needs; the batches are the same either way.
        through = "auto" if config.log.tensorboard else "threads"
        make_batch = lambda step: data.batch(detours.at(step, around))
        batches = stack.enter_context(contextlib.closing(prefetch.batches(make_batch, start, steps, through=through)))
        first = next(batches, None)
        train_step = compiling.result()
        malloc.give_back()
        attempt = distributed.by_primary("attempt", lambda: attempts(workdir))
        read = Ledger(workdir, jax.process_index(), attempt, start, data, data.slots, around)
        stack.enter_context(contextlib.closing(read))
        stacks = workdir / f"stacks-{jax.process_index()}.txt"
        copies = Copies(state, mesh) if config.train.check_copies else None
        spikes, health = Detector(config.train.spike, config.train.spike_steps), Health(config)
        if start:
            memory = checkpoints.memory(start)
            spikes.remember(memory)
            health.remember(memory.get("health", {}))
            if warning := record.difference(memory.get("metrics", {})):
                progress.message(warning)
        watchdog = stack.enter_context(Watchdog(config.train.watchdog, stacks))

        def report(step: int, metrics: dict[str, jax.Array]) -> None:
            """Reads the metrics of a finished step, and records them where they are due."""
            nonlocal last
            values = jax.device_get(metrics)
            timer.step()
            watchdog.step(step)
            last = {name: values[name].item() for name in (*METRICS, *sorted(values.keys() - set(METRICS)))}
            read.add(step, last["skipped"] > 0)
            if skipped := int(last["skipped"]):
                progress.message(f"step {step}: loss or gradient is not finite, update skipped ({skipped} in a row)")
            if step % config.log.every == 0 or step == steps or skipped:
                speed = timer.read()
                if speed:
                    speeds.append(speed["tokens_per_second"])
                    used = mfu(speeds[-1], flops, mesh.size, mesh.devices.flat[0].device_kind)
                    speed |= ({} if used is None else {"mfu": used}) | device_memory()
                record.write(step, last | {"epoch": data.epoch(detours.at(step, around))}, speed)
                read.write()
            progress.update(step, loss=last["loss"], tokens_per_second=speeds[-1] if speeds else None)
            if warning := health.add(step, last["loss"], skipped):
                progress.message(warning)
            spikes.add(step, last["loss"])

        pending, (leaves, form) = None, jax.tree.flatten(state)
        # Not before: until now there is nothing to save, and a signal ends the process at once.
        preemption.arm()
        for step in range(start + 1, steps + 1):
            profiler.step(step, leaves)
            with timer.data():
                batch = first or next(batches)
                first = None
            read.feed(step, batch)
            leaves, metrics = train_step(leaves, to_global(batch, mesh, config.train.batch_size))
            if pending:
                report(*pending)
            pending = (step, metrics)

            stopping = agreement.reached(preemption.requested is not None) or step == steps
            evaluating = step == steps or (config.eval.every and step % config.eval.every == 0)
            saving = stopping or step % config.checkpoint.every == 0
            if copies and (saving or step % config.train.check_copies == 0):
                copies.check(form.unflatten(leaves))
            if not (evaluating or saving):
                continue
            report(*pending)
            pending, state = None, form.unflatten(leaves)
            with timer.pause(), watchdog.pause():
                if evaluating:
                    results, facts = _evaluate(state, evaluate, sample, record, progress, workdir)
                if saving:
                    read.sync()  # what is on file goes as far as the checkpoint
                    record.sync()
                    memory = spikes.memory | {"health": health.memory, "metrics": record.memory}
                    checkpoints.save(state, results if evaluating else None, memory)
                    if exports:
                        exports.save(state, results if evaluating else None)
            if stopping and step < steps:
                cause = preemption.requested or "another process is to stop"
                raise Preempted(f"{cause}: step {step} is saved; the same command goes on from there")

        if start >= steps:  # killed after its last step was saved and recorded, before its result was written
            results, facts = _evaluate(state, evaluate, None, None, progress, workdir)

    speed = statistics.median(speeds) if speeds else None
    used = mfu(speed, flops, mesh.size, mesh.devices.flat[0].device_kind) if speed else None
    return {
        "step": int(state.step),
        **{name: last[name] for name in ("loss", "grad_norm", "learning_rate") if name in last},
        **results,
        **facts,
        **health.summary(),
        "tokens_per_second": speed,
        "mfu": used,
        "parameters": num_parameters(state.model),
        "attention": backend.name,
        "seconds": round(time.monotonic() - begun, 1),
    }


def _flops(config: Config, batch: Batch) -> float:
    """Of one step, per token of such a batch."""
    data, predictions = config.data, batch.targets_BT.shape[1]
    return flops_per_token(config.model, data.seq_len, data.source_len, config.task.objective, predictions)


def _introduce(config: Config, state: State, mesh: Mesh, backend: Backend, record: Metrics, progress: Progress) -> None:
    """Tells what is about to be trained, and on what."""
    record.text(int(state.step), "setup/config", config_loading.to_json(config))
    record.text(int(state.step), "setup/parameters", parameter_table(state.model))
    trained, frozen = divide(config, state.model)
    some = f", {num_parameters(trained):,} of them trained," * bool(num_parameters(frozen))
    progress.message(
        f"{num_parameters(state.model):,} parameters{some} on {mesh.size} {mesh.devices.flat[0].device_kind} "
        f"device(s), {backend.name} attention ({backend.reason})"
    )


def _compile(
    config: Config,
    optimizer: optax.GradientTransformation,
    backend: Backend,
    state: State,
    batch: Batch,
    mesh: Mesh,
) -> LeavesStep:
    """The step compiled for exactly these shapes, so that it can never be compiled again behind our back."""
    with use(mesh, config.mesh):  # which is set for each thread on its own
        if config.train.reproducible:
            return on_leaves(reproducible.make_step(config, optimizer, backend, mesh), jax.tree.structure(state))
        return compile_for(mesh, lower(config, optimizer, backend, state, whole_batch(config, batch, mesh), mesh))


def _evaluate(
    state: State,
    evaluate: Evaluator | None,
    sample: Sample | None,
    record: Metrics | None,
    progress: Progress,
    workdir: epath.Path,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Evaluates and samples one state; texts go to files, numbers on the record unless they are there already."""
    step, results, facts, files = int(state.step), {}, {}, {}
    if evaluate:
        report = evaluate(evaluated_model(state))
        results = {f"eval/{name}": value for name, value in report.metrics.items()}
        facts = {f"eval/{name}": value for name, value in report.facts.items()}
        files = {f"{step}-{name}": text for name, text in report.files.items()}
        shown = list(results.items())[:_SHOWN]
        progress.message(f"step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown))
    if record and results:
        record.write(step, results)
    if sample:
        files[f"{step}.txt"] = text = sample(evaluated_model(state))
        progress.message(text)
        if record:
            record.text(step, "samples", text)
    for name, text in files.items() if distributed.is_primary() else ():
        (workdir / "samples").mkdir(exist_ok=True)
        atomic.write(workdir / "samples" / name, text.encode())
    return results, facts
