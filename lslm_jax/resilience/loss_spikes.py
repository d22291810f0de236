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

from lslm_jax.checkpoint import checkpoint, integrity, metadata
from lslm_jax.config import Config
from lslm_jax.data import skipped_batches
from lslm_jax.errors import NumericAbort

MAX_DETOURS = 5  # from one checkpoint, none of which helped
_USUAL = 10  # times as many losses as a spike is long tell what is usual
_FEWEST = 2  # times as many tell it at the beginning of a run, when they spread widely
_LEAST_SPREAD = 0.01  # of the mean
_DRIFT = 2.0  # times as many deviations above the lowest mean as above the last one


class Spike(NumericAbort):
    """The loss has been far above what it was for too long.

    Attributes:
      first, last: its steps.
    """

    def __init__(self, first: int, last: int, usual: float, loss: float, share: str = "all"):
        super().__init__(
            f"the loss was about {usual:.3f} and is {loss:.3f}, in step {last} as in {share} since {first}"
        )
        self.first, self.last = first, last


class Detector:
    """Tells a spike from the losses of a run, one after the other.

    A loss is high if it is many standard deviations above the mean of the usual ones, or far above the lowest mean so
    far, which a slow drift does not move. As many high losses as a spike is long, among twice as many steps, are a
    spike: also those of every second step.

    Its memory goes into checkpoints, so that a run that goes on decides as one that was never stopped.
    """

    def __init__(self, deviations: float, steps: int):
        """Watches for losses so many standard deviations above the usual, for so many steps. 0: never."""
        self._deviations, self._steps = deviations, steps
        self._high: collections.deque[int] = collections.deque(maxlen=2 * steps)  # steps with high losses, or 0
        self._usual: collections.deque[float] = collections.deque(maxlen=_USUAL * steps)
        self._best, self._best_spread = math.inf, 0.0

    @property
    def memory(self) -> dict[str, Any]:
        """State as JSON values; nothing where it watches for nothing."""
        if not self._deviations:
            return {}
        best = {} if math.isinf(self._best) else {"best": self._best, "best_spread": self._best_spread}
        return {"usual": list(self._usual), "high_steps": list(self._high)} | best

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restores what `memory` returned; ValueError where it is damaged."""
        self._usual.extend(metadata.numbers(memory.get("usual", [])))
        self._high.extend(map(int, metadata.numbers(memory.get("high_steps", []))))
        if "best" in memory:
            self._best, self._best_spread = metadata.numbers([memory["best"], memory.get("best_spread", 0.0)])

    def add(self, step: int, loss: float) -> None:
        """Takes the loss of a step, unless it is not finite; raises Spike where it is the last of one."""
        if not (self._deviations and math.isfinite(loss)):
            return
        mean, limit = 0.0, math.inf
        if len(self._usual) >= _FEWEST * self._steps:
            mean = statistics.fmean(self._usual)
            # Losses that are all equal deviate by nothing: then any other would be a spike.
            spread = max(statistics.pstdev(self._usual, mean), _LEAST_SPREAD * abs(mean))
            if len(self._usual) == self._usual.maxlen and mean < self._best:
                self._best, self._best_spread = mean, spread
            limit = min(mean + self._deviations * spread, self._best + _DRIFT * self._deviations * self._best_spread)
        is_high = loss > limit
        self._high.append(step if is_high else 0)
        if not is_high:
            self._usual.append(loss)
        high = [number for number in self._high if number]
        if is_high and len(high) == self._steps:
            share = "all" if high[0] == step - self._steps + 1 else "most"
            raise Spike(high[0], step, min(mean, self._best) if share == "most" else mean, loss, share)


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
    found = skipped_batches.extend(skipped_batches.read(workdir), step, spike.last)
    if found[-1].times > MAX_DETOURS:
        raise NumericAbort(f"{spike}; leaving out batches after step {step} did not help, {MAX_DETOURS} times")
    skipped_batches.write(workdir, found, back_to=step)
    settle(workdir)
    return f"{spike}: going back to step {step}, without the {found[-1].batches} batches that came after it"


def settle(workdir: epath.Path) -> None:
    """Finishes going back, which a kill may have ended half-way: no checkpoint of a way that was left may be taken."""
    step = skipped_batches.back_to(workdir)
    if step is None:
        return
    for path in integrity.checkpoints_in(workdir / "checkpoints"):
        if int(path.name) > step:
            integrity.discard(path)
    skipped_batches.write(workdir, skipped_batches.read(workdir))
