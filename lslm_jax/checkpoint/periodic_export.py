"""Hugging Face directories that a run leaves behind while it trains: WORKDIR/exports/STEP.

One that is there is whole: it is written under another name first. One that a kill prevented is made up from the
checkpoint of its step when the run goes on.
"""

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
from etils import epath

from lslm_jax.checkpoint import checkpoint
from lslm_jax.config import CheckpointConfig
from lslm_jax.convert.export import Exporter
from lslm_jax.parallel import multihost
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.pytree import abstract
from lslm_jax.train.train_state import State, evaluated_model


class Exports:
    """The exported models of one run; they are fetched at once and written in the background."""

    def __init__(self, workdir: epath.Path, config: CheckpointConfig, exporter: Exporter):
        """Args: the run directory; `export_every` is read; what writes."""
        self._directory = epath.Path(workdir) / "exports"
        self._checkpoints = epath.Path(workdir) / "checkpoints"
        self._every, self._exporter = config.export_every, exporter
        self._aside = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

    def save(self, state: State, metrics: Mapping[str, float] | None = None) -> None:
        """Exports a state if its step is due; its arrays may be donated afterwards.

        Args:
          state: whose weights evaluation uses are exported.
          metrics: results of its evaluation, for the model card.

        Raises:
          SaveError: the one before could not be written.
        """
        step = int(state.step)
        if step % self._every == 0:
            self._save(step, evaluated_model(state), metrics or {})

    def make_up(self, state: State, log: Callable[[str], None]) -> None:
        """Exports what was due up to a state that a run goes on from and is not there, as far as checkpoints are.

        Raises:
          CheckpointRefused: such a checkpoint is damaged.
          SaveError: as `save`.
        """
        for step in checkpoint.list_steps(self._checkpoints):
            is_due = step and step % self._every == 0 and step <= int(state.step)
            if not is_due or (self._directory / str(step) / "config.json").exists():
                continue
            model = evaluated_model(state)
            if step < int(state.step):
                model = checkpoint.load_model(self._checkpoints, jax.tree.map(abstract, model), step)
            log(f"step {step}: exported now, what ended the run before had prevented it")
            self._save(step, model, {})

    def close(self) -> None:
        """Waits for what is written in the background.

        Raises:
          SaveError: it could not be.
        """
        self._aside.shutdown()
        self._wait()

    def _save(self, step: int, model: Any, metrics: Mapping[str, float]) -> None:
        self._wait()
        sources = self._exporter.fetch(model)
        if multihost.is_primary():
            self._writing = self._aside.submit(self._write, step, sources, metrics)

    def _wait(self) -> None:
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, step: int, sources: Any, metrics: Mapping[str, float]) -> None:
        final = self._directory / str(step)
        # What renames a directory at once does so on local disks alone; elsewhere config.json, written last, must do.
        part = final if atomic_io.is_remote(final) else self._directory / f"{step}.tmp"
        with atomic_io.saving(final):
            for left in {part, final}:
                if left.exists():
                    left.rmtree()
        self._exporter.write(part, sources, metrics)
        if part != final:
            with atomic_io.saving(final):
                part.rename(final)
