"""Hardware by name: `v5p:4x4x4`, `2xv5e:16x16`, `h200:4x8`, `cpu:8`; its devices, whether they are there or not.

Nothing here imports jax before `devices`: `prepare` says what jax has to know when it starts.
"""

import contextlib
import importlib.util
import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from lslm_jax.errors import ConfigError, first_line
from lslm_jax.parallel.hardware_specs import DEVICES, Device, find
from lslm_jax.runtime import lazy_imports

_TPUS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2}  # dimensions of their torus
_MOST_DEVICES = 1 << 17
_SAMPLES = "v5e:4x4, v5p:4x4x4, 2xv5p:4x4x4 (slices), h200:8, h200:4x8 (hosts x GPUs), cpu:8"
# Without these the TPU compiler complains at length that it does not know which machine of the cloud this is.
_QUIET = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0", "TPU_ACCELERATOR_TYPE": "v5p-8"}
_QUIET |= {"TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "2"}
_DESCRIPTION = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: {shared}
  shared_memory_per_block_optin: {shared_optin} threads_per_core_limit: 2048 core_count: {cores}
  fpus_per_core: {fpus} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {cache} clock_rate_ghz: {clock} device_memory_size: {memory}
  cuda_compute_capability {{ major: {major} minor: 0 }} registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }} device_description_str: "NVIDIA {name}"
"""


class _Gpu(NamedTuple):
    """What XLA's compiler asks of a GPU besides what `devices` has: memory close to the cores in bytes, GHz."""

    major: int
    cores: int
    fpus: int
    shared: int
    shared_optin: int
    cache: int
    clock: float


_GPUS = {
    "a100": _Gpu(8, 108, 64, 167_936, 166_912, 41_943_040, 1.41),
    "h100": _Gpu(9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
    "h200": _Gpu(9, 132, 128, 233_472, 232_448, 52_428_800, 1.98),
    "b200": _Gpu(10, 148, 128, 233_472, 232_448, 132_644_864, 1.965),
}


class Topology(NamedTuple):
    """Hardware that a run is planned for.

    Attributes:
      kind: `v5p`, `h200`, `cpu`, ...
      shape: chips of a slice along each dimension of the torus; of GPUs (GPUs of a host,).
      slices: of TPUs, or hosts of GPUs.
    """

    kind: str
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.shape) * self.slices


def parse(text: str) -> Topology:
    """Reads a topology's name.

    Raises:
      ConfigError: it is none; the line shows those that are.
    """
    match = re.fullmatch(r"(?:([0-9]{1,6})x)?([a-z]\w*):([0-9]{1,6}(?:x[0-9]{1,6}){0,4})", text)
    if match:
        slices, kind, shape = int(match[1] or 1), match[2], tuple(map(int, match[3].split("x")))
        if kind in _GPUS and len(shape) == 2 and slices == 1:
            slices, shape = shape[0], shape[1:]
        dimensions = _TPUS.get(kind, 1)
        known = kind in _TPUS or kind in _GPUS or kind == "cpu"
        if known and len(shape) == dimensions and min(slices, *shape) > 0:
            if math.prod(shape) * slices > _MOST_DEVICES:
                raise ConfigError(f"--topology={text} has more than {_MOST_DEVICES} devices")
            return Topology(kind, shape, slices)
    kinds = ", ".join((*_TPUS, *_GPUS, "cpu"))
    raise ConfigError(f"--topology={text} is none: write one like {_SAMPLES}; there are {kinds}")


def prepare(text: str | None) -> Topology | None:
    """The topology of this name, None for the devices that are there; sets the environment that jax then reads.

    Raises:
      ConfigError: there is none, or a package that compiles for it is missing.
    """
    if text is None:
        return None
    topology = parse(text)
    if topology.kind in _TPUS and not _installed("libtpu"):
        raise ConfigError(f"--topology={text} needs the TPU compiler: {lazy_imports.extra('tpu')}")
    if topology.kind in _GPUS and not (_installed("jax_plugins.xla_cuda13") or _installed("jax_plugins.xla_cuda12")):
        raise ConfigError(f"--topology={text} needs the GPU compiler: {lazy_imports.extra('plan-gpu')}")
    os.environ["JAX_PLATFORMS"] = "cpu"  # of this machine nothing else is used, whatever it has
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # which would ask a server of the cloud who we are
    os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # as a search does
    for name, value in _QUIET.items():
        os.environ.setdefault(name, value)
    if topology.kind == "cpu":
        flags = os.environ.get("XLA_FLAGS", "")
        if "host_platform_device_count" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={topology.size}".strip()
    return topology


def _installed(module: str) -> bool:
    with contextlib.suppress(ModuleNotFoundError):  # of the package around it
        return importlib.util.find_spec(module) is not None
    return False


def devices(topology: Topology | None) -> Sequence[Any]:
    """The devices of a topology, which can be compiled for; or those that are there.

    Raises:
      ConfigError: no hardware is built like this.
    """
    import jax
    from jax.experimental import topologies

    if topology is None:
        return jax.devices()
    if topology.kind == "cpu":
        if len(jax.devices()) < topology.size:
            raise ConfigError(f"XLA_FLAGS simulates {len(jax.devices())} CPU devices, fewer than {topology.size}")
        return jax.devices()[: topology.size]
    if topology.kind in _GPUS:
        layout = f"{topology.slices}x1x{topology.shape[0]}"  # slices, hosts of each, GPUs of each
        name = topology.kind.upper()
        described = _description(name, _GPUS[topology.kind], DEVICES[name])
        return topologies.get_topology_desc(name, "cuda", target_config=described, topology=layout).devices
    shape = "x".join(map(str, topology.shape))
    bounds = (1, 1, 1) if math.prod(topology.shape) == 1 else (2, 2, 1)
    kind: dict[str, Any] = {"chip_config_name": "megacore"} if topology.kind == "v4" else {}  # two cores as one device
    device = find(f"TPU {topology.kind}")
    assert device is not None
    # Unless told so, XLA takes no dimension for a ring; of a cube it then makes all-reduces of all collectives.
    wrap = (*device.rings(topology.shape), False)[:3]
    try:
        found = topologies.get_topology_desc(
            f"{topology.kind}:{shape}",
            "tpu",
            num_slices=topology.slices,
            chips_per_host_bounds=bounds,
            wrap=wrap,
            **kind,
        )
    except jax.errors.JaxRuntimeError as error:
        raise ConfigError(f"no {topology.kind} is built as {shape}: {first_line(error)}") from error
    return found.devices


def _description(name: str, gpu: _Gpu, device: Device) -> str:
    return _DESCRIPTION.format(name=name, memory=device.memory, bandwidth=int(device.bandwidth), **gpu._asdict())


@contextlib.contextmanager
def as_if_there(topology: Topology | None) -> Iterator[None]:
    """Answers what jax asks the GPU and its cuDNN before it lowers their attention, where neither is there."""
    if topology is None or topology.kind not in _GPUS:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax has no public way to be told

    major = _GPUS[topology.kind].major
    answers = {
        "check_cudnn_version": lambda: 91200,
        "check_compute_capability": lambda least: major >= float(least),
        "is_cuda_compute_capability_equal": lambda other: major == float(other),
    }
    asked = {name: getattr(cudnn, name) for name in answers}
    try:
        for name, answer in answers.items():
            setattr(cudnn, name, answer)
        yield
    finally:
        for name, question in asked.items():
            setattr(cudnn, name, question)
