"""Numeric health of a run: a budget for skipped updates, and detection of a loss that diverges with finite numbers."""

import collections
import math
from collections.abc import Mapping
from typing import Any

from lslm_jax.checkpoint import metadata
from lslm_jax.config import Config
from lslm_jax.errors import NumericAbort

MAX_SKIPPED = 5  # non-finite steps in a row that end the run
WINDOW, MAX_SKIPPED_IN_WINDOW = 100, 25  # non-finite steps among the last ones that end it, too
DIVERGED_STEPS = 20  # in a row with a loss far above that of a uniform guess
_FAR = 2.0  # times the loss of a uniform guess


class Health:
    """Judges the metrics of each step.

    Its memory goes into checkpoints, so that a run that goes on ends where one that was never stopped would.

    Attributes:
      skipped: updates left out since the run began, as the loss or gradient was not finite.
    """

    def __init__(self, config: Config):
        self.skipped = 0
        self._uniform = uniform_loss(config)
        self._recent: collections.deque[int] = collections.deque(maxlen=WINDOW)
        self._high, self._last = 0, 0

    @property
    def memory(self) -> dict[str, Any]:
        """State as JSON values."""
        return {"skipped": self.skipped, "recent": list(self._recent), "high": self._high, "last": self._last}

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restores what `memory` returned; nothing where a checkpoint has none; ValueError where it is damaged."""
        self._recent.extend(map(int, metadata.numbers(memory.get("recent", []))))
        counts = metadata.numbers([memory.get(name, 0) for name in ("skipped", "high", "last")])
        self.skipped, self._high, self._last = map(int, counts)

    def add(self, step: int, loss: float, skipped_in_a_row: int) -> str:
        """Takes the metrics of a step.

        Returns:
          A warning for the user, or "".

        Raises:
          NumericAbort: too many updates were skipped, in a row or among the last `WINDOW`.
        """
        self._last = step
        self._recent.append(int(skipped_in_a_row > 0))
        self.skipped += skipped_in_a_row > 0
        if skipped_in_a_row >= MAX_SKIPPED:
            raise NumericAbort(
                f"loss or gradient was not finite in {skipped_in_a_row} steps in a row, up to step {step}"
            )
        if sum(self._recent) > MAX_SKIPPED_IN_WINDOW:
            raise NumericAbort(
                f"loss or gradient was not finite in {sum(self._recent)} of the last {len(self._recent)} steps, up to "
                f"step {step}: lower optimizer.learning_rate, or set optimizer.clip"
            )
        if self._uniform is None or not math.isfinite(loss):
            return ""
        self._high = self._high + 1 if loss > _FAR * self._uniform + 1.0 else 0
        if self._high != DIVERGED_STEPS:
            return ""
        return (
            f"warning: the loss is {loss:.3g} at step {step}, and was far above that of a uniform guess "
            f"({self._uniform:.3g}) for {DIVERGED_STEPS} steps: training has diverged; lower optimizer.learning_rate"
        )

    def summary(self) -> dict[str, int]:
        """Entries of the run's result: how many steps were skipped; since which step the loss has diverged, if so."""
        diverged = {"diverged_since": self._last - self._high + 1} if self._high >= DIVERGED_STEPS else {}
        return {"skipped_steps": self.skipped} | diverged


def uniform_loss(config: Config) -> float | None:
    """Cross-entropy of a uniform guess in nats per target; None where the loss is none."""
    match config.task.objective:
        case "regression":
            return None
        case "classification" | "tagging":
            choices = config.model.num_labels
        case "qa":
            choices = config.data.seq_len
        case _:
            choices = config.model.vocab_size
    return math.log(choices) if choices > 1 else None
