"""Hardware by name: what is one, and what is said where it is none or cannot be compiled for."""

import importlib.util
import sys

import pytest

from lslm_jax.errors import ConfigError
from lslm_jax.parallel.hardware_specs import find
from lslm_jax.plan.topology import Topology, devices, parse, prepare


@pytest.mark.parametrize(
    ("text", "topology", "size"),
    [
        ("v5p:4x4x4", Topology("v5p", (4, 4, 4)), 64),
        ("v5e:4x4", Topology("v5e", (4, 4)), 16),
        ("2xv5p:4x4x4", Topology("v5p", (4, 4, 4), 2), 128),
        ("h200:8", Topology("h200", (8,)), 8),
        ("h200:4x8", Topology("h200", (8,), 4), 32),
        ("cpu:8", Topology("cpu", (8,)), 8),
    ],
)
def test_names_say_kind_shape_and_slices(text, topology, size):
    assert parse(text) == topology and parse(text).size == size


@pytest.mark.parametrize(
    "text",
    [
        "v5p",
        "v5p:4x4",
        "v5e:4x4x4",
        "v5x:4x4",
        "H200:8",
        "h200:0",
        "2xh200:4x8",
        "cpu:2x4",
        "v5p:4x4x4x2",
        "v5e:4x444444444",
        "",
    ],
)
def test_what_is_no_name_is_refused_in_one_line_that_shows_some(text):
    with pytest.raises(ConfigError) as refused:
        parse(text)
    message = str(refused.value)
    assert "\n" not in message
    assert all(name in message for name in ("v5p:4x4x4", "h200:4x8", "cpu:8", "v6e", "b200"))


@pytest.mark.parametrize("text", ["v5e:4x444444", "999999xv5e:4x4", "cpu:999999"])
def test_more_devices_than_anyone_has_are_refused_at_once(text):
    with pytest.raises(ConfigError, match=f"^--topology={text} has more than 131072 devices$"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "package", "extra"),
    [("v5p:4x4x4", "libtpu", "[tpu]'"), ("h200:8", "jax_cuda13_plugin", "[plan-gpu]'")],
)
def test_a_missing_compiler_is_told_by_what_installs_it(text, package, extra):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ConfigError) as refused:
        prepare(text)
    assert extra in str(refused.value) and "\n" not in str(refused.value)


def test_simulated_devices_are_those_of_this_process():
    assert len(devices(parse("cpu:4"))) == 4
    with pytest.raises(ConfigError, match="fewer than 64"):
        devices(parse("cpu:64"))


def test_names_are_read_without_jax():
    import subprocess

    code = (
        "import sys; from lslm_jax.plan import topology; topology.parse('v5p:4x4x4'); assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("kind", "shape", "rings"),
    [
        ("v5p", (4, 4, 4), (True, True, True)),
        ("v5p", (4, 4, 8), (True, True, True)),
        ("v5p", (2, 4, 4), (False, False, False)),  # less than a cube
        ("v5e", (16, 16), (True, True)),
        ("v6e", (8, 16), (False, True)),
        ("v5e", (4, 4), (False, False)),
    ],
)
def test_a_torus_closes_where_its_maker_says(kind, shape, rings):
    device = find(f"TPU {kind}")
    assert device is not None and device.rings(shape) == rings
