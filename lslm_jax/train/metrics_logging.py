"""What a run tells of itself: metrics on disk and in TensorBoard, use of the devices, traces, the table of parameters.

Nothing here changes what a run computes.
"""

import hashlib
import importlib
import json
import math
import os
import re
import socket
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import jax
from etils import epath

from lslm_jax.config import LogConfig
from lslm_jax.parallel import hardware_specs
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.lazy_imports import import_metric_writers, import_tensorflow
from lslm_jax.runtime.progress import say

LOSSES = ("train/loss", "eval/loss")  # tags that TensorBoard shows in one chart
FLUSH_SECONDS = 5.0  # after which TensorBoard is shown what is new
# Between two points of a curve in TensorBoard, which shows a thousand at most: tensorflow takes 1 ms of a core for each
# scalar, which small steps would wait for. metrics.jsonl has all.
SPACING_SECONDS = 0.5


class TensorBoard:
    """Events in a directory, written by clu in a thread of its own: no step waits for tensorflow's slow import.

    A missing package or a failed write turns it off with one line on stderr; a display never stops a run.
    """

    def __init__(self, directory: str):
        self._directory = directory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="tensorboard")
        self._held: list[tuple[str, int, dict[str, Any]]] = []
        self._writer: Any = None
        self._flushed = self._queued = -math.inf
        self._left_out: tuple[int, dict[str, float]] | None = None
        self._purge_from: int | None = None
        self._off = False

    def scalars(self, step: int, values: Mapping[str, float], *, often: bool = False) -> None:
        """Queues scalars, and the texts before them; those that come `often` only now and then, and the last."""
        if often and time.monotonic() - self._queued < SPACING_SECONDS:
            self._left_out = step, dict(values)
            return
        if often:
            self._queued, self._left_out = time.monotonic(), None
        self._held.append(("write_scalars", step, dict(values)))
        self._submit()

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text letter by letter; held until the first scalars, so that no import slows the first step."""
        verbatim = "".join(f"    {line}\n" for line in text.splitlines())
        self._held.append(("write_texts", step, {name: verbatim}))

    def purge(self, step: int) -> None:
        """Makes TensorBoard drop what an earlier start of the run wrote of this step and later ones."""
        self._purge_from = step

    def close(self) -> None:
        """Writes what is queued, and the last step, and ends."""
        if self._left_out:
            self.scalars(*self._left_out)
        self._submit()
        self._thread.shutdown(wait=True)
        if self._writer is not None and not self._off:
            self._writer.close()

    def _submit(self) -> None:
        held, self._held = self._held, []
        if held:
            self._thread.submit(self._write, held)

    def _write(self, calls: list[tuple[str, int, dict[str, Any]]]) -> None:
        if self._off:
            return
        try:
            if self._writer is None:
                epath.Path(self._directory).mkdir(parents=True, exist_ok=True)  # TensorFlow prints more where it fails
                if self._purge_from is not None:
                    _write_purge(self._directory, self._purge_from)
                    self._purge_from = None
                self._writer = import_metric_writers().SummaryWriter(self._directory)
                _write_layout(self._directory)
            for method, step, values in calls:
                getattr(self._writer, method)(step, values)
            if time.monotonic() - self._flushed > FLUSH_SECONDS:  # every time would take more of a core than all else
                self._writer.flush()
                self._flushed = time.monotonic()
        except Exception as error:
            self._off = True
            say(f"TensorBoard is off: {' '.join(str(error).split())}")


def _write_purge(directory: str, step: int) -> None:
    """Writes an events file with a session start at a step, which TensorBoard takes to replace later events."""
    tf = import_tensorflow()
    # TensorBoard reads files in the order of their names: behind those of earlier starts, before that of this one.
    name, tries = "", 0
    while not name or (tries < 20 and name <= max(tf.io.gfile.listdir(directory), default="")):
        time.sleep(0.1 * bool(name))  # the one before was begun in this very second
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.0.purge"
        tries += 1
    event, start = tf.compat.v1.Event, tf.compat.v1.SessionLog(status=tf.compat.v1.SessionLog.START)
    with tf.io.TFRecordWriter(f"{directory}/{name}") as writer:
        writer.write(event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
        for _ in range(2):  # TensorBoard takes the first start of all for no restart
            writer.write(event(wall_time=time.time(), step=step, session_log=start).SerializeToString())


def _write_layout(directory: str) -> None:
    """Writes the layout of TensorBoard's CUSTOM SCALARS page: training and validation loss in one chart."""
    tf = import_tensorflow()
    plugin = importlib.import_module("tensorboard.plugins.custom_scalar.summary")
    layouts = importlib.import_module("tensorboard.plugins.custom_scalar.layout_pb2")
    lines = layouts.MultilineChartContent(tag=[f"^{tag}$" for tag in LOSSES])
    chart = layouts.Chart(title="loss", multiline=lines)
    layout = layouts.Layout(category=[layouts.Category(title="training and validation", chart=[chart])])
    with tf.summary.create_file_writer(directory).as_default() as writer:
        tf.summary.experimental.write_raw_pb(plugin.pb(layout).SerializeToString(), step=0)
        writer.flush()


def _tags(values: Mapping[str, float], group: str) -> dict[str, float]:
    """Values by their TensorBoard tags: GROUP/NAME, or eval/NAME as it is; characters that tags cannot hold are _."""
    found: dict[str, float] = {}
    for name, value in values.items():
        name = name if name.startswith("eval/") or "/" in name else f"{group}/{name}"
        tag = safe = re.sub(r"[^\w./-]+", "_", name)
        number = 1
        while tag in found:  # two classes whose names differ in such characters only
            number += 1
            tag = f"{safe}_{number}"
        found[tag] = value
    return found


class Metrics:
    """The record of a run: WORKDIR/metrics.jsonl and, if wanted, TensorBoard events in WORKDIR/tensorboard.

    A context manager, or close it.
    """

    def __init__(self, workdir: str, log: LogConfig, *, primary: bool = True):
        """Opens the record; of several processes only the primary one writes."""
        self._path = epath.Path(workdir) / "metrics.jsonl"
        self._log = log
        self._primary = primary
        self._file: atomic_io.Lines | None = None
        self._count, self._digest, self._last = 0, hashlib.sha256(), 0
        self._tensorboard = TensorBoard(f"{workdir}/tensorboard") if primary and log.tensorboard else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, Any], timing: Mapping[str, float] | None = None) -> None:
        """Records scalars (Python, NumPy or jax numbers) of one step as one line, at once on disk.

        Floats are written so that they read back equal. JSON has no word for the non-finite ones: they become the
        strings "NaN", "Infinity" and "-Infinity", which `float` understands.

        Args:
          step: optimizer steps done.
          values: what is the same in every equal run.
          timing: wall-clock figures of a train step, left out of metrics.jsonl where `log.timing` is False. None: of
            something rarer, an evaluation, which TensorBoard always shows.

        Raises:
          SaveError: metrics.jsonl cannot be written.
        """
        if not self._primary:
            return
        scalars = {name: _number(value) for name, value in values.items()}
        clock = {name: _number(value) for name, value in (timing or {}).items()}
        line = {"step": step, **scalars, **(clock if self._log.timing else {})}
        if self._file is None:
            self._file = atomic_io.Lines(self._path)
        text = json.dumps(json_values(line))
        self._file.add(text)
        self._account(text.encode() + b"\n", step)
        if self._tensorboard:
            self._tensorboard.scalars(step, _tags(scalars, "train") | _tags(clock, "perf"), often=timing is not None)

    def text(self, step: int, name: str, text: str) -> None:
        """Shows a text in TensorBoard: a sample, the config, the table of parameters."""
        if self._tensorboard:
            self._tensorboard.text(step, name, text)

    def truncate(self, step: int) -> int:
        """Forgets every line of a later step, and what a kill left of a line; a resumed run writes them again.

        Returns:
          How many lines were dropped from metrics.jsonl.

        Raises:
          SaveError: metrics.jsonl cannot be written.
        """
        if self._tensorboard and step:
            self._tensorboard.purge(step + 1)
        if not self._primary or not self._path.exists():
            return 0
        with atomic_io.saving(self._path):
            lines = self._path.read_bytes().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= step]
            if len(kept) < len(lines):
                self._close_file()
                atomic_io.write(self._path, b"".join(kept))
        self._count, self._digest, self._last = 0, hashlib.sha256(), 0
        for line in kept:
            self._account(line, int(_step_of(line)))
        return len(lines) - len(kept)

    def _account(self, line: bytes, step: int) -> None:
        self._count, self._last = self._count + 1, step
        self._digest.update(line)

    @property
    def memory(self) -> dict[str, Any]:
        """Number and sha256 of the lines of metrics.jsonl so far, for a checkpoint; nothing on other processes."""
        if not self._primary:
            return {}
        return {"lines": self._count, "sha256": self._digest.hexdigest(), "last": self._last}

    def difference(self, memory: Mapping[str, Any]) -> str:
        """A warning where metrics.jsonl, truncated, is not what it was when `memory` was taken; "" where it is."""
        if not self._primary or not memory or memory["sha256"] == self._digest.hexdigest():
            return ""
        missing = memory["lines"] - self._count
        if missing > 0:
            after = f" after step {self._last}" if self._last < memory["last"] else ""
            what = f"lacks {missing} of the {memory['lines']} lines{after}"
        else:
            what = "holds other lines than those"
        return f"warning: {self._path} {what} that it had when the checkpoint was saved: it was altered since"

    def sync(self) -> None:
        """Puts metrics.jsonl where a later run will look for it, as far as it goes; SaveError if that fails."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Ends the record; waits for TensorBoard's queue."""
        self._close_file()
        if self._tensorboard:
            self._tensorboard.close()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


class Profiler:
    """A jax.profiler trace of the steps first..last, in WORKDIR/profile; without steps, nothing."""

    def __init__(self, workdir: str, steps: tuple[int, ...]):
        """Takes `log.profile`: empty, or the first and the last step."""
        self._directory = f"{workdir}/profile"
        self._window = range(steps[0], steps[1] + 1) if steps else range(0)
        self._active = False

    def step(self, step: int, in_flight: Any = None) -> None:
        """Starts or stops the trace; called before step number `step` is dispatched.

        `in_flight` are arrays of the step before, awaited so that the trace ends with a whole step.
        """
        if step in self._window and not self._active:
            jax.profiler.start_trace(self._directory)
            self._active = True
        elif step not in self._window and self._active:
            jax.block_until_ready(in_flight)
            self.close()

    def close(self) -> None:
        """Writes a trace that is still open."""
        if self._active:
            self._active = False
            jax.profiler.stop_trace()


def mfu(tokens_per_second: float, flops_per_token: float, num_devices: int, device_kind: str) -> float | None:
    """Model FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B): the share of the devices' peak put to use.

    Args:
      tokens_per_second: of all devices together.
      flops_per_token: that the model needs, forward and backward; what is computed twice to save memory counts once.
      num_devices: jax devices in the mesh.
      device_kind: `jax.Device.device_kind`.

    Returns:
      0 to 1, or None where the peak is unknown, as on CPUs.
    """
    device = hardware_specs.find(device_kind)
    return None if device is None else tokens_per_second * flops_per_token / (num_devices * device.flops)


def device_memory() -> dict[str, int]:
    """Bytes in use on the first local device, now and at their peak; empty where devices do not count, as on CPUs."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return {name: stats[name] for name in ("bytes_in_use", "peak_bytes_in_use") if name in stats}


def parameter_table(tree: Any) -> str:
    """Lists the parameters of a model, or any pytree of arrays or shapes: name, shape, logical axes, count; a total."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "axes"))  # an nnx.Param of ours
    rows = [("name", "shape", "axes", "count")]
    for path, leaf in leaves:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        shape, axes = (" ".join(map(str, items)) for items in (leaf.shape, getattr(leaf, "axes", ())))
        rows.append((name, shape, axes, f"{math.prod(leaf.shape):,}"))
    rows.append(("total", "", "", f"{sum(math.prod(leaf.shape) for _, leaf in leaves):,}"))
    a, b, c, d = (max(map(len, column)) for column in zip(*rows, strict=True))
    return "\n".join(f"{name:<{a}}  {shape:<{b}}  {axes:<{c}}  {count:>{d}}" for name, shape, axes, count in rows)


def _number(value: Any) -> int | float:
    return value.item() if hasattr(value, "item") else value


def json_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The same values as JSON can hold them: non-finite numbers become "NaN", "Infinity" and "-Infinity"."""
    return {name: _json_value(value) for name, value in values.items()}


def _json_value(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: bytes) -> float:
    """The step of a line of metrics.jsonl; infinite if the line is torn."""
    try:
        return float(json.loads(line)["step"]) if line.endswith(b"\n") else math.inf
    except (ValueError, KeyError, TypeError, OverflowError):
        return math.inf
