"""The parts of a training run, built before its first step: state, compiled step, batches, record and monitors."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import optax
from etils import epath
from jax.sharding import Mesh

from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.checkpoint.periodic_export import Exports
from lslm_jax.config import Config, loading
from lslm_jax.data import dataloader, prefetch, skipped_batches
from lslm_jax.data.batch import Batch
from lslm_jax.data.skipped_batches import Detour
from lslm_jax.errors import CheckpointRefused
from lslm_jax.evaluate.types import Evaluator
from lslm_jax.models.attention import Backend
from lslm_jax.models.flops import flops_per_token
from lslm_jax.parallel import multihost
from lslm_jax.parallel.sharding import use
from lslm_jax.resilience import deterministic_step
from lslm_jax.resilience.data_ledger import Ledger, attempts
from lslm_jax.resilience.health import Health
from lslm_jax.resilience.loss_spikes import Detector
from lslm_jax.resilience.preemption import Preemption
from lslm_jax.resilience.replica_check import Copies
from lslm_jax.resilience.watchdog import Watchdog
from lslm_jax.runtime import huge_pages
from lslm_jax.runtime.progress import Progress, StepTimer
from lslm_jax.train.metrics_logging import Metrics, Profiler, parameter_table
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.restore_or_init import begin
from lslm_jax.train.train_state import State, abstract_state, divide, num_parameters
from lslm_jax.train.train_step import LeavesStep, compile_for, lower, on_leaves, whole_batch

Sample = Callable[[Any], str]


@dataclasses.dataclass
class Inputs:
    """Arguments of a training run.

    Attributes:
      config: resolved.
      workdir: the run directory.
      mesh: set by `jax.set_mesh` as well.
      data: batches by step.
      backend: attention kernel.
      checkpoints: of this run.
      evaluate: reports on a model; None where nothing is held out.
      sample: a text that shows what a model can do; None for no samples.
      exports: of this run, as Hugging Face directories; None for none.
    """

    config: Config
    workdir: epath.Path
    mesh: Mesh
    data: dataloader.TrainInput | dataloader.SyntheticInput
    backend: Backend
    checkpoints: Checkpoints
    evaluate: Evaluator | None
    sample: Sample | None
    exports: Exports | None


@dataclasses.dataclass
class Run:
    """A training run between its setup and its end.

    Attributes:
      inputs: its arguments.
      skipped: batches that are left out.
      state: the state at the last save or evaluation; at first the one to start from.
      start: steps done before.
      train_step: compiled, on the leaves of the state.
      batches: from step `start + 1` on; the first of them is made already.
      last: metrics of the last step that was read.
      results: metrics of the last evaluation.
      facts: further entries of the last evaluation.
      speeds: tokens per second, at each time they were recorded.
    """

    inputs: Inputs
    preemption: Preemption
    agreement: multihost.Agreement
    progress: Progress
    record: Metrics
    profiler: Profiler
    timer: StepTimer
    flops: float
    skipped_batches: Sequence[Detour]
    state: State
    start: int
    train_step: LeavesStep
    batches: Iterator[Batch]
    ledger: Ledger
    copies: Copies | None
    spikes: Detector
    health: Health
    watchdog: Watchdog
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    results: dict[str, float] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)
    speeds: list[float] = dataclasses.field(default_factory=list)


def set_up(inputs: Inputs, stack: contextlib.ExitStack) -> Run:
    """Restores or initializes the state, compiles the step and opens all that a run writes to.

    Args:
      inputs: arguments of the run.
      stack: closes what is opened here; however the run ends, what was saved is then complete.

    Raises:
      CheckpointRefused, SaveError, DataError: as `begin` and `Ledger`.
    """
    config, workdir, mesh, data = inputs.config, inputs.workdir, inputs.mesh, inputs.data
    steps, enter = config.train.steps, stack.enter_context
    example, around = data.batch(0), skipped_batches.read(workdir)
    optimizer = make_optimizer(config.optimizer, steps)
    preemption, agreement = enter(Preemption(armed=False)), multihost.Agreement(mesh)
    for saved in (inputs.checkpoints, inputs.exports) if inputs.exports else (inputs.checkpoints,):
        enter(contextlib.closing(saved))
    progress = enter(Progress(steps))
    record = enter(contextlib.closing(Metrics(str(workdir), config.log, primary=multihost.is_primary())))
    profiler = enter(contextlib.closing(Profiler(str(workdir), config.log.profile)))

    # XLA compiles the step while the weights are made or read; then tensorflow is imported for the first batch.
    aside = enter(ThreadPoolExecutor(1))
    abstract = abstract_state(config, optimizer, mesh)
    compiling = aside.submit(_compile, config, optimizer, inputs.backend, abstract, example, mesh)
    state = begin(config, optimizer, mesh, inputs.checkpoints, progress.message)
    start = int(state.step)
    record.truncate(start)
    _introduce(inputs, state, record, progress)

    batches = _batches(inputs, start, around, stack)
    train_step = compiling.result()
    huge_pages.give_back()
    attempt = multihost.by_primary("attempt", lambda: attempts(workdir))
    ledger = Ledger(workdir, jax.process_index(), attempt, start, data, data.slots, around)
    enter(contextlib.closing(ledger))
    copies = Copies(state, mesh) if config.train.check_copies else None
    spikes, health = Detector(config.train.spike, config.train.spike_steps), Health(config)
    if start:
        _remember(inputs, start, spikes, health, record, progress)
    return Run(
        inputs=inputs,
        preemption=preemption,
        agreement=agreement,
        progress=progress,
        record=record,
        profiler=profiler,
        timer=StepTimer(config.train.batch_size * config.data.seq_len),
        flops=_flops(config, example),
        skipped_batches=around,
        state=state,
        start=start,
        train_step=train_step,
        batches=batches,
        ledger=ledger,
        copies=copies,
        spikes=spikes,
        health=health,
        watchdog=enter(Watchdog(config.train.watchdog, workdir / f"stacks-{jax.process_index()}.txt")),
    )


def _remember(inputs: Inputs, step: int, spikes: Detector, health: Health, record: Metrics, progress: Progress) -> None:
    """Restores what the monitors remembered when a checkpoint was saved, and compares the record with it.

    Raises:
      CheckpointRefused: the memory in the checkpoint is damaged.
    """
    memory = inputs.checkpoints.memory(step)
    try:
        spikes.remember(memory)
        health.remember(memory.get("health", {}))
        warning = record.difference(memory.get("metrics", {}))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointRefused(
            f"the checkpoint of step {step} is damaged: its memory is unreadable: {error}"
        ) from error
    if warning:
        progress.message(warning)


def _batches(inputs: Inputs, start: int, around: Sequence[Detour], stack: contextlib.ExitStack) -> Iterator[Batch]:
    """Batches from a step on, made ahead by other threads; returns when the first is made."""
    # Importing tensorflow takes seconds, which only TensorBoard needs; the batches are the same either way.
    through = "auto" if inputs.config.log.tensorboard else "threads"
    make = lambda step: inputs.data.batch(skipped_batches.at(step, around))
    batches = prefetch.batches(make, start, inputs.config.train.steps, through=through)
    stack.enter_context(contextlib.closing(batches))
    first = next(batches, None)
    return iter(()) if first is None else itertools.chain((first,), batches)


def _flops(config: Config, batch: Batch) -> float:
    """Floating-point operations of one step, per token of such a batch."""
    data, predictions = config.data, batch.targets_BT.shape[1]
    return flops_per_token(config.model, data.seq_len, data.source_len, config.task.objective, predictions)


def _introduce(inputs: Inputs, state: State, record: Metrics, progress: Progress) -> None:
    """Logs what is about to be trained, and on which devices; exports what an earlier start did not."""
    config, mesh = inputs.config, inputs.mesh
    record.text(int(state.step), "setup/config", loading.to_json(config))
    record.text(int(state.step), "setup/parameters", parameter_table(state.model))
    trained, frozen = divide(config, state.model)
    some = f", {num_parameters(trained):,} of them trained," * bool(num_parameters(frozen))
    progress.message(
        f"{num_parameters(state.model):,} parameters{some} on {mesh.size} {mesh.devices.flat[0].device_kind} "
        f"device(s), {inputs.backend.name} attention ({inputs.backend.reason})"
    )
    if scarce := inputs.checkpoints.lack_of_room(state):
        progress.message(scarce)
    if inputs.exports:
        inputs.exports.make_up(state, progress.message)


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
            return on_leaves(deterministic_step.make_step(config, optimizer, backend, mesh), jax.tree.structure(state))
        return compile_for(mesh, lower(config, optimizer, backend, state, whole_batch(config, batch, mesh), mesh))
