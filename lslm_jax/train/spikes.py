"""Loss spikes: how they are told from noise, and how a run goes round what caused one.

A loss that shoots up does not always come down by itself. What helped PaLM (Chowdhery et al. 2022, section 5.1) was to
go back to a checkpoint from before and to leave out the batches up to the end of the spike; here the run does so alone.
"""

import collections
import math
import statistics
from collections.abc import Mapping
from typing import Any

from etils import epath

from lslm_jax.config import Config
from lslm_jax.data import detours
from lslm_jax.errors import NumericAbort
from lslm_jax.train import checkpoint, manifest

MAX_DETOURS = 5  # from one checkpoint, none of which helped
_USUAL = 10  # times as many losses as a spike is long tell what is usual


class Spike(NumericAbort):
    """The loss has been far above what it was for too long.

    Attributes:
      first, last: its steps.
    """

    def __init__(self, first: int, last: int, usual: float, loss: float):
        super().__init__(f"the loss was about {usual:.3f} and is {loss:.3f}, in step {last} as in all since {first}")
        self.first, self.last = first, last


class Detector:
    """Tells a spike from the losses of a run, one after the other.

    What it knows goes into checkpoints, so that a run that goes on tells the same as one that was never stopped.
    """

    def __init__(self, deviations: float, steps: int):
        """Watches for losses so many standard deviations above the usual, for so many steps. 0: never."""
        self._deviations, self._steps, self._high = deviations, steps, 0
        self._usual: collections.deque[float] = collections.deque(maxlen=_USUAL * steps)

    @property
    def memory(self) -> dict[str, Any]:
        """What it knows, as JSON values; nothing where it watches for nothing."""
        return {"usual": list(self._usual), "high": self._high} if self._deviations else {}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Takes up where `memory` was told."""
        self._usual.extend(memory.get("usual", ()))
        self._high = memory.get("high", 0)

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step, unless it is not finite; raises Spike where it is the last of one."""
        if not (self._deviations and math.isfinite(loss)):
            return
        mean, limit = 0.0, math.inf
        if len(self._usual) == self._usual.maxlen:
            mean = statistics.fmean(self._usual)
            limit = mean + self._deviations * statistics.pstdev(self._usual, mean)
        if loss <= limit:
            self._usual.append(loss)
            self._high = 0
            return
        self._high += 1
        if self._high == self._steps:
            raise Spike(step - self._steps + 1, step, mean, loss)


def go_round(workdir: epath.Path, config: Config, spike: Spike) -> str:
    """Takes a run back to a checkpoint from before a spike, and puts on file what it leaves out from there on.

    Best is one from `train.spike_steps` before, when nothing was to be seen yet. The later ones are deleted.

    Returns:
      What was done.

    Raises:
      NumericAbort: no such checkpoint is left, or the run went back to it too often.
    """
    before = [step for step in checkpoint.list_steps(workdir / "checkpoints") if step < spike.first]
    if spike.first <= config.checkpoint.every:
        before = [0, *before]  # where the run began
    if not before:
        raise NumericAbort(f"{spike}; no checkpoint from before is left to go back to: raise checkpoint.keep")
    step = max([step for step in before if step < spike.first - config.train.spike_steps] or before)
    found = detours.extend(detours.read(workdir), step, spike.last)
    if found[-1].times > MAX_DETOURS:
        raise NumericAbort(f"{spike}; leaving out batches after step {step} did not help, {MAX_DETOURS} times")
    detours.write(workdir, found, back_to=step)
    settle(workdir)
    return f"{spike}: going back to step {step}, without the {found[-1].batches} batches that came after it"


def settle(workdir: epath.Path) -> None:
    """Finishes going back, which a kill may have ended half-way: no checkpoint of a way that was left may be taken."""
    step = detours.back_to(workdir)
    if step is None:
        return
    for path in (workdir / "checkpoints").glob("*"):
        if path.name.isdigit() and int(path.name) > step:
            manifest.discard(path)
    detours.write(workdir, detours.read(workdir))
