"""Going back to a chosen checkpoint (`train.resume_from`): the later ones are set aside, once."""

from collections.abc import Callable

from etils import epath

from lslm_jax.checkpoint import integrity, metadata
from lslm_jax.errors import InputMissing


def is_pending(workdir: epath.Path, step: int) -> bool:
    """True if a run has yet to go back to the checkpoint of a step. 0: to none.

    A run that went back records `train.resume_from` in each checkpoint: one that is restarted does not go back again.

    Raises:
      InputMissing: there is no such checkpoint.
    """
    steps = integrity.list_steps(epath.Path(workdir) / "checkpoints")
    if not step or not steps or steps[-1] == step:
        return False
    newest = metadata.read(_path(workdir, steps[-1]))
    if newest["config"]["train"].get("resume_from") == step:
        return False
    if step not in steps:
        raise InputMissing(f"train.resume_from={step}: no such checkpoint in {workdir}/checkpoints; there are {steps}")
    return True


def go_back(workdir: epath.Path, step: int, log: Callable[[str], None]) -> None:
    """Sets aside the checkpoints after a step if `is_pending`; SaveError where one cannot be moved."""
    if not is_pending(workdir, step):
        return
    (workdir / "result.json").unlink(missing_ok=True)  # of the end that the run had come to
    for later in reversed([each for each in integrity.list_steps(workdir / "checkpoints") if each > step]):
        to = integrity.set_aside(_path(workdir, later), "set_aside")
        log(f"going back to step {step}: step {later} is set aside in {to}")


def _path(workdir: epath.Path, step: int) -> epath.Path:
    return epath.Path(workdir) / "checkpoints" / str(step)
