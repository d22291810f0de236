"""The record of a run reads back equal, survives kills, and needs none of the optional packages."""

import json
import math
import pathlib
import re
import subprocess
import sys
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lslm_jax.config import LogConfig
from lslm_jax.errors import SaveError
from lslm_jax.runtime.lazy_imports import import_tensorflow
from lslm_jax.train import metrics_logging
from lslm_jax.train.metrics_logging import Metrics, Profiler, device_memory, mfu, parameter_table

PLAIN = LogConfig(tensorboard=False)
needs_tensorflow = pytest.mark.skipif(find_spec("tensorflow") is None, reason="tensorflow is not installed")


def lines(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_numbers_read_back_equal(tmp_path):
    metrics = Metrics(str(tmp_path), PLAIN)
    values = {
        "python": 0.1 + 0.2,
        "count": 2**53 + 1,
        "float32": np.float32(0.1),
        "float64": np.float64(1e-300),
        "jax": jnp.float32(1 / 3),
        "bfloat16": jnp.bfloat16(3.14),
    }
    metrics.write(7, values)
    metrics.close()
    (line,) = lines(tmp_path)
    assert line.pop("step") == 7
    assert line == {name: value.item() if hasattr(value, "item") else value for name, value in values.items()}
    assert np.float32(line["float32"]) == np.float32(0.1)


def test_what_is_not_finite_is_still_json(tmp_path):
    metrics = Metrics(str(tmp_path), PLAIN)
    metrics.write(1, {"loss": math.nan, "grad_norm": jnp.inf, "low": -np.inf})
    metrics.close()

    def refuse(word: str):
        raise AssertionError(f"{word} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert line == {"step": 1, "loss": "NaN", "grad_norm": "Infinity", "low": "-Infinity"}
    assert math.isnan(float(line["loss"])) and float(line["low"]) == -math.inf


def test_a_line_is_on_disk_as_soon_as_it_is_written(tmp_path):
    metrics = Metrics(str(tmp_path / "new" / "run"), PLAIN)
    metrics.write(1, {"loss": 2.0})
    assert lines(tmp_path / "new" / "run") == [{"step": 1, "loss": 2.0}]
    metrics.close()


@pytest.mark.parametrize("timing", [True, False])
def test_wall_clock_figures_are_written_only_if_wanted(tmp_path, timing):
    metrics = Metrics(str(tmp_path), LogConfig(tensorboard=False, timing=timing))
    metrics.write(1, {"loss": 2.0}, {"tokens_per_second": 10.0})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": 2.0} | ({"tokens_per_second": 10.0} if timing else {})]


def test_resuming_forgets_later_lines_and_a_torn_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with Metrics(str(tmp_path), PLAIN) as metrics:
        for step in range(1, 6):
            metrics.write(step, {"loss": 1 / step})
    whole = path.read_bytes()
    with path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    with Metrics(str(tmp_path), PLAIN) as metrics:
        assert metrics.truncate(3) == 3
        assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
        for step in (4, 5):
            metrics.write(step, {"loss": 1 / step})
    assert path.read_bytes() == whole
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncating_a_record_in_use_does_not_lose_what_follows(tmp_path):
    with Metrics(str(tmp_path), PLAIN) as metrics:
        assert metrics.truncate(0) == 0
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 1.0})
        assert metrics.truncate(1) == 1
        metrics.write(2, {"loss": 0.5})
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 0.5)]


def test_only_the_primary_process_writes(tmp_path):
    metrics = Metrics(str(tmp_path), LogConfig(), primary=False)
    metrics.write(1, {"loss": 1.0})
    metrics.text(1, "config", "seed: 0")
    metrics.close()
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match=r"^could not write .*metrics.jsonl: .+$"):
        Metrics(str(tmp_path / "file"), PLAIN).write(1, {"loss": 1.0})


@needs_tensorflow
def test_tensorboard_shows_scalars_and_texts_and_says_nothing(tmp_path, capfd, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar import layout_pb2
    from tensorboard.util.tensor_util import make_ndarray

    monkeypatch.setattr(metrics_logging, "SPACING_SECONDS", 3600)  # however long tensorflow's import stops this thread
    metrics = Metrics(str(tmp_path), LogConfig())
    metrics.text(0, "config", "seed: 0\nmodel: x")
    for step in range(1, 5):
        metrics.write(step, {"loss": 1 / step}, {"mfu": 0.5})
        metrics.write(step, {"eval/loss": jnp.float32(2)})
    metrics.close()
    assert capfd.readouterr() == ("", "")
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = {
        tag: [(event.step, make_ndarray(event.tensor_proto).item()) for event in events.Tensors(tag)]
        for tag in events.Tags()["tensors"]
    }
    layout = layout_pb2.Layout.FromString(found.pop("custom_scalars__config__")[0][1])
    (chart,) = layout.category[0].chart  # training and validation loss in one
    assert [[bool(re.match(tag, name)) for tag in chart.multiline.tag] for name in metrics_logging.LOSSES] == [
        [True, False],
        [False, True],
    ]
    assert found == {
        "config": [(0, b"    seed: 0\n    model: x\n")],
        "train/loss": [(1, 1.0), (4, 0.25)],  # of steps that follow each other so fast, the first and the last
        "perf/mfu": [(1, 0.5), (4, 0.5)],
        "eval/loss": [(step, 2.0) for step in range(1, 5)],
    }


def test_tags_of_tensorboard_are_grouped_and_class_names_made_safe():
    values = {"loss": 1, "eval/f1/so so": 2, "eval/f1/so?so": 3, "eval/f1/naïve.1": 4}
    expected = {"train/loss": 1, "eval/f1/so_so": 2, "eval/f1/so_so_2": 3, "eval/f1/naïve.1": 4}
    assert metrics_logging._tags(values, "train") == expected


@needs_tensorflow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda path: path.write_text(path.read_text().replace("1.5", "1.6")),
            "holds other lines than those that it had",
        ),
        (
            lambda path: path.write_text("".join(path.read_text().splitlines(True)[:2])),
            "lacks 2 of the 4 lines after step 2",
        ),
        (lambda path: path.unlink(), "lacks 4 of the 4 lines after step 0 that it had when the checkpoint was saved"),
        (lambda path: path.write_text(path.read_text() + '{"step": 5, "loss": 1.0}\n'), ""),  # which is done again
    ],
)
def test_a_record_is_compared_with_the_one_at_the_time_of_a_checkpoint(tmp_path, change, message):
    metrics = Metrics(str(tmp_path), PLAIN)
    for step in range(1, 5):
        metrics.write(step, {"loss": step + 0.5})
    memory = metrics.memory
    metrics.close()
    change(tmp_path / "metrics.jsonl")
    again = Metrics(str(tmp_path), PLAIN)
    again.truncate(4)
    assert message in again.difference(memory) and bool(again.difference(memory)) == bool(message)
    assert again.difference({}) == ""  # of a version that recorded none


@needs_tensorflow
def test_steps_that_a_killed_run_showed_are_shown_once_after_it_goes_on(tmp_path):
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    for start, stop in ((0, 9), (5, 8)):  # killed after step 9, resumed from the checkpoint of step 5
        metrics = Metrics(str(tmp_path), LogConfig())
        metrics.truncate(start)
        for step in range(start + 1, stop + 1):
            metrics.write(step, {"loss": float(step + 100 * start)})
        metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"), tensor_size_guidance={"scalars": 0}).Reload()
    shown = [event.step for event in events.Tensors("train/loss")]
    assert shown == list(range(1, 9))


def test_a_broken_display_does_not_stop_the_run(tmp_path, capfd):
    (tmp_path / "tensorboard").write_text("in the way")
    with Metrics(str(tmp_path), LogConfig()) as metrics:
        metrics.write(1, {"loss": 1.0})
        metrics.write(2, {"loss": 0.5})
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("TensorBoard is off: ") and err.count("\n") == 1
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]


@needs_tensorflow
def test_tensorflow_never_sees_a_gpu():
    assert import_tensorflow().config.get_visible_devices("GPU") == []


WITHOUT_KERAS = """
import sys
from lslm_jax.runtime import lazy_imports
from lslm_jax.config import LogConfig
from lslm_jax.train.metrics_logging import Metrics

tf = lazy_imports.import_tensorflow()
with Metrics(sys.argv[1], LogConfig()) as metrics:
    metrics.write(1, {"loss": 1.0})
assert "clu" in sys.modules and not {"keras", "torch"} & sys.modules.keys(), sys.modules.keys()
assert issubclass(tf.keras.layers.Dense, tf.keras.layers.Layer) and "keras.src.optimizers" in sys.modules
"""


@needs_tensorflow
def test_keras_stays_out_until_somebody_asks_for_it(tmp_path):
    """It takes a second and 80 MiB of every run, and torch's besides where there is torch."""
    child = subprocess.run([sys.executable, "-c", WITHOUT_KERAS, str(tmp_path)], capture_output=True, text=True)
    assert (child.returncode, child.stderr) == (0, "")
    assert list((tmp_path / "tensorboard").glob("events.*"))


WITHOUT = """
import importlib.machinery, sys

class Without(importlib.machinery.PathFinder):
    @classmethod
    def find_spec(cls, name, *args):
        absent = name.split(".")[0] in {"tensorflow", "clu", "tensorboard", "tensorflow_datasets"}
        return None if absent else super().find_spec(name, *args)

sys.meta_path[sys.meta_path.index(importlib.machinery.PathFinder)] = Without
import jax, jax.numpy as jnp
from lslm_jax.config import LogConfig
from lslm_jax.train.metrics_logging import Metrics, Profiler, device_memory, parameter_table

metrics, profiler = Metrics(sys.argv[1], LogConfig()), Profiler(sys.argv[1], (2, 3))
metrics.text(0, "parameters", parameter_table({"w": jnp.ones((2, 3))}))
for step in range(1, 5):
    profiler.step(step)
    metrics.write(step, {"loss": jnp.float32(step)}, device_memory())
metrics.close()
profiler.close()
assert not {"tensorflow", "clu", "tensorboard"} & set(sys.modules)
"""


def test_without_tensorflow_and_clu_there_is_one_line_and_the_record(tmp_path):
    done = subprocess.run([sys.executable, "-c", WITHOUT, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "TensorBoard" in line] == [
        "TensorBoard is off: tensorflow cannot be imported (No module named 'tensorflow'): pip install tensorflow-cpu"
    ]
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4]
    assert list(tmp_path.glob("profile/**/*.xplane.pb"))


def test_the_first_step_does_not_wait_for_tensorflow(tmp_path):
    program = """
import sys
from lslm_jax.config import LogConfig
from lslm_jax.train.metrics_logging import Metrics
metrics = Metrics(sys.argv[1], LogConfig())
metrics.text(0, "config", "seed: 0")
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program, tmp_path], check=True, timeout=60)


def test_the_profiler_traces_its_window_once_even_if_a_run_resumes_inside_it(tmp_path):
    profiler = Profiler(str(tmp_path), (10, 12))
    for step in range(11, 15):
        profiler.step(step, jnp.ones(8) * step)
    profiler.close()
    assert len(list(tmp_path.glob("profile/**/*.xplane.pb"))) == 1


def test_mfu_is_the_share_of_the_peak():
    assert mfu(1e5, 6e9, 2, "NVIDIA H100 80GB HBM3") == pytest.approx(6e14 / (2 * 989e12))
    assert mfu(1e5, 6e9, 1, "cpu") is None


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", 362e12),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
    ],
)
def test_the_peak_is_that_of_the_very_device(kind, peak):
    assert 1 / mfu(1.0, 1.0, 1, kind) == pytest.approx(peak)


def test_memory_of_a_cpu_is_not_counted():
    assert device_memory() == {}


def test_the_table_lists_every_parameter_and_the_total():
    from flax import nnx

    tree = {
        "embed": nnx.Param(jnp.ones((1000, 16)), axes=("vocab", "embed")),
        "bias": jax.ShapeDtypeStruct((16,), "f4"),
    }
    assert [row.split() for row in parameter_table(tree).splitlines()] == [
        ["name", "shape", "axes", "count"],
        ["bias", "16", "16"],
        ["embed", "1000", "16", "vocab", "embed", "16,000"],
        ["total", "16,016"],
    ]
