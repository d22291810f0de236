"""Measures what the trainer adds to its own step: logging at every step, checkpoints, TensorBoard, the input pipeline.

    python benchmarks/loop.py

In one process, turn by turn: the trainer, and the same jitted step in a bare loop over the same batches, which are made
beforehand. Prints one line of JSON: `bare` and `trainer` are milliseconds a step, `median` and `mean` (saving included)
of all rounds; `overhead` is the median over the rounds of trainer / bare - 1, for either.
"""

import argparse
import itertools
import json
import os
import statistics
import tempfile
import time

import jax
import numpy as np
from etils import epath

from lslm_jax.checkpoint import provenance
from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data.batch import Batch
from lslm_jax.data.dataloader import SyntheticInput
from lslm_jax.models import attention
from lslm_jax.parallel.sharding import make_mesh, to_global
from lslm_jax.runtime import huge_pages
from lslm_jax.train.loop import train
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import init_state
from lslm_jax.train.train_step import make_train_step

Seconds = list[float]  # of each step, in order


class TimedInput(SyntheticInput):
    """Random tokens that note when the trainer asks for a step's epoch: once for each line of metrics.jsonl."""

    def __init__(self, config: Config):
        super().__init__(config, config.model.vocab_size)
        self.times: list[float] = []

    def epoch(self, step: int) -> float:
        self.times.append(time.perf_counter())
        return super().epoch(step)


def main() -> None:
    """Prints one line of JSON."""
    args = parse_args()
    config = configured(args)
    mesh = make_mesh(config)
    with jax.set_mesh(mesh):
        bare, batches = (
            Bare(config, mesh),
            [SyntheticInput(config, args.vocab_size).batch(n) for n in range(args.steps)],
        )
        rounds = [(bare.run(batches)[args.skip :], run_trainer(config, mesh)[args.skip :]) for _ in range(args.rounds)]
    print(json.dumps(vars(args) | {"cores": len(os.sched_getaffinity(0)), "jax": jax.__version__} | summary(rounds)))


def configured(args: argparse.Namespace) -> Config:
    """The run that is measured."""
    return validate(
        Config(
            model=ModelConfig(
                num_layers=args.num_layers,
                d_model=args.d_model,
                num_heads=args.d_model // 32,
                vocab_size=args.vocab_size,
                max_length=args.seq_len,
            ),
            data=DataConfig(source="synthetic", seq_len=args.seq_len, mask_documents=False),
            train=TrainConfig(steps=args.steps, batch_size=args.batch_size),
            checkpoint=CheckpointConfig(every=args.checkpoint_every),
            eval=EvalConfig(every=0),
            log=LogConfig(every=1),
        )
    )


class Bare:
    """The jitted step and nothing else; compiled once."""

    def __init__(self, config: Config, mesh: jax.sharding.Mesh):
        self._config, self._mesh = config, mesh
        self._optimizer = make_optimizer(config.optimizer, config.train.steps)
        self._step = jax.jit(make_train_step(config, self._optimizer, attention.XLA), donate_argnums=0)

    def run(self, batches: list[Batch]) -> Seconds:
        """Waits for each step one step late, as the trainer does."""
        state, last, times = init_state(self._config, self._optimizer, self._mesh), None, []
        for batch in batches:
            state, metrics = self._step(state, to_global(batch, self._mesh))
            jax.block_until_ready(last)
            times.append(time.perf_counter())
            last = metrics
        return seconds_between(times)


def run_trainer(config: Config, mesh: jax.sharding.Mesh) -> Seconds:
    """The whole trainer, in a new run directory."""
    data = TimedInput(config)
    with tempfile.TemporaryDirectory() as name:
        workdir = epath.Path(name)
        checkpoints = Checkpoints(workdir, config.checkpoint, provenance.make(config, "", "", mesh))
        train(config, workdir, mesh, data, attention.XLA, checkpoints, evaluate=None, sample=None)
    return seconds_between(data.times)


def seconds_between(times: list[float]) -> Seconds:
    """Time from each step to the next."""
    return [after - before for before, after in itertools.pairwise(times)]


def summary(rounds: list[tuple[Seconds, Seconds]]) -> dict[str, dict[str, float]]:
    """Medians over the rounds of what either side takes, and of their ratio within a round."""
    result: dict[str, dict[str, float]] = {"bare_ms": {}, "trainer_ms": {}, "overhead": {}}
    for name, of in (("median", statistics.median), ("mean", statistics.fmean)):
        bare, trainer = np.array([[of(side) for side in turn] for turn in rounds]).T
        result["bare_ms"][name] = round(1e3 * float(np.median(bare)), 2)
        result["trainer_ms"][name] = round(1e3 * float(np.median(trainer)), 2)
        result["overhead"][name] = round(float(np.median(trainer / bare)) - 1, 4)
    return result


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="turns of either side")
    parser.add_argument("--steps", type=int, default=160, help="steps of a turn")
    parser.add_argument("--skip", type=int, default=20, help="first steps of a turn that do not count")
    parser.add_argument("--checkpoint_every", type=int, default=50)
    parser.add_argument("--num_layers", type=int, default=4)
    parser.add_argument("--d_model", type=int, default=128)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    return parser.parse_args()


if __name__ == "__main__":
    huge_pages.ensure_large_pages()
    main()
