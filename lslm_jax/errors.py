"""What can go wrong for a user: one exception per exit code. The message is the one line the user reads.

Raise one of these wherever the cause is known; `main` prints its message on stderr and exits with its code.
Any other exception is a bug of ours and ends with a traceback.
"""


class LslmError(Exception):
    """A failure with a known cause, its message one line long.

    Attributes:
      told: whether another process of the run tells the user.
    """

    exit_code = 1
    told = False


class ConfigError(LslmError):
    """An unknown key, a wrong type, an impossible combination."""

    exit_code = 2


class DataError(LslmError):
    """The data are there but bad: undecodable text, a truncated shard, a token outside the vocabulary."""

    exit_code = 65


class InputMissing(LslmError):
    """A file or data set is missing, or holds nothing that could be trained on."""

    exit_code = 66


class NumericAbort(LslmError):
    """The loss or the gradient was not finite too many times in a row, or the weights are not."""

    exit_code = 70


class SaveError(LslmError):
    """A file could not be written: permissions, a full disk."""

    exit_code = 74


class Preempted(LslmError):
    """A signal asked the run to stop; its state is saved, and the same command goes on from there."""

    exit_code = 75


class CheckpointRefused(LslmError):
    """A checkpoint does not belong to this run, or cannot be read."""

    exit_code = 76


class DeviceFault(LslmError):
    """A device holds other numbers than it was given; what was saved before is still good."""

    exit_code = 77


class PeerLost(LslmError):
    """Another process of the run did not come, or is gone; or steps have stopped coming."""

    exit_code = 77


def first_line(error: Exception) -> str:
    """What an error of a library says, without the lines that follow, for a message of ours."""
    return str(error).partition("\n")[0]
