"""Process environment: limits of the operating system, and the settings of JAX and XLA that change a run's numbers."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from lslm_jax.errors import ConfigError

_OPEN_FILES = 4096  # wanted; Orbax opens hundreds at once
_MIN_OPEN_FILES = 256
# XLA flags without influence on numbers. The device count is recorded by itself.
_NEUTRAL_FLAGS = re.compile(r"--xla_(dump_\S*|force_host_platform_device_count\S*|hlo_profile\S*)")
_VARIABLES = re.compile(
    r"LIBTPU_INIT_ARGS|NVIDIA_TF32_OVERRIDE|XLA_PYTHON_CLIENT_ALLOCATOR|(JAX|ONEDNN|DNNL|CUBLAS|CUBLASLT|CUDNN)_\w+"
)
# Variables of JAX without influence on numbers, or whose effect is recorded otherwise.
_NEUTRAL_VARIABLES = re.compile(
    r"JAX_(\w*CACHE\w*|PLATFORMS?|PLATFORM_NAME|COORDINATOR\w*|PROCESS_ID|NUM_PROCESSES|LOCAL_DEVICE\w*|\w*LOG\w*|"
    r"TRACEBACK\w*|DUMP\w*|DEBUG\w*|CHECK\w*|\w*PREEMPTION\w*|NUMPY_RANK_PROMOTION|CUDA_VISIBLE_DEVICES)|\w+_VERBOSE|\w+_LOG\w*"
)
_OPTIONS = (
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_default_matmul_precision",
    "jax_enable_x64",
    "jax_numpy_dtype_promotion",
    "jax_disable_most_optimizations",
)


def raise_open_file_limit() -> None:
    """Raises the soft limit of open files as far as the hard limit allows.

    Raises:
      ConfigError: the hard limit is too low for a run.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OPEN_FILES if hard == resource.RLIM_INFINITY else min(_OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft != resource.RLIM_INFINITY and soft < _MIN_OPEN_FILES:
        raise ConfigError(f"the limit of open files is {soft}, too low for a run: raise it with `ulimit -n 4096`")


def quiet_libraries(environ: Any = os.environ) -> None:
    """Sets the log level of libtpu, which otherwise writes pages to stderr where no TPU is; before jax is imported."""
    for name in ("TPU_STDERR_LOG_LEVEL", "TPU_MIN_LOG_LEVEL"):
        environ.setdefault(name, "3")


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    """Sends what is written to the process's own stdout and stderr, by C++ libraries too, nowhere."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def check_jax_options() -> None:
    """Rejects options of JAX with which the models here cannot be computed.

    Raises:
      ConfigError: names the variable and how to unset it.
    """
    import jax

    if jax.config.jax_enable_x64:  # type: ignore[attr-defined]
        raise ConfigError("JAX_ENABLE_X64 is set, but training is in 32 bits: unset JAX_ENABLE_X64")
    if (mode := jax.config.jax_numpy_dtype_promotion) != "standard":  # type: ignore[attr-defined]
        raise ConfigError(f"JAX_NUMPY_DTYPE_PROMOTION={mode} is not supported: unset JAX_NUMPY_DTYPE_PROMOTION")


# Settings that may differ between the processes of a run.
LOCAL = ("processor", "cpu_threads")


def numeric_settings(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Settings of JAX, XLA and the devices on which the bits of a result depend, as JSON values by name.

    On CPUs the libraries below XLA cut products and sums by the number of threads, and use the instructions at hand.
    """
    import jax

    options = {name.upper(): getattr(jax.config, name, None) for name in _OPTIONS}
    devices = jax.devices()
    is_cpu = devices[0].platform == "cpu"
    return {
        **{name: value for name, value in sorted(environ.items()) if value and _changes_numbers(name)},
        # Some values are enumerations of texts.
        **{
            name: str(value) if isinstance(value, str) else value
            for name, value in options.items()
            if value is not None
        },
        "XLA_FLAGS": " ".join(_xla_flags(environ)),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
        **({"processor": processor(), "cpu_threads": _cpu_threads(environ)} if is_cpu else {}),
    }


def _changes_numbers(name: str) -> bool:
    return bool(_VARIABLES.fullmatch(name)) and not _NEUTRAL_VARIABLES.fullmatch(name)


def _xla_flags(environ: Mapping[str, str]) -> list[str]:
    """Flags of XLA without neutral ones, sorted; XLA_FLAGS may also name a file that holds them."""
    text = environ.get("XLA_FLAGS", "").strip()
    if text and not text.startswith("-"):
        with contextlib.suppress(OSError, UnicodeDecodeError):
            text = pathlib.Path(text).read_text()
    return sorted(flag for flag in text.split() if not _NEUTRAL_FLAGS.fullmatch(flag))


def _cpu_threads(environ: Mapping[str, str]) -> int:
    """Threads of XLA's CPU back end."""
    text = environ.get("PJRT_NPROC") or environ.get("NPROC") or ""
    return int(text) if text.isdecimal() else len(os.sched_getaffinity(0))


def processor() -> str:
    """Kind of this machine's processor: its instruction set, with all extensions."""
    path = pathlib.Path("/proc/cpuinfo")
    features = re.search(r"^(flags|Features)\s*:.*$", path.read_text(), re.MULTILINE) if path.exists() else None
    extensions = features[0] if features else platform.processor()
    return f"{platform.machine()}-{hashlib.sha256(extensions.encode()).hexdigest()[:8]}"
