"""Process environment: limits of the operating system, and the settings of JAX and XLA that change a run's numbers."""

import contextlib
import os
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
_VARIABLES = ("LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE", "XLA_PYTHON_CLIENT_ALLOCATOR")
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


def numeric_settings(environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Settings of JAX, XLA and the devices on which the bits of a result depend, as JSON values by name."""
    import jax

    flags = sorted(flag for flag in environ.get("XLA_FLAGS", "").split() if not _NEUTRAL_FLAGS.fullmatch(flag))
    options = {name.upper(): getattr(jax.config, name, None) for name in _OPTIONS}
    devices = jax.devices()
    return {
        # Some values are enumerations of texts.
        **{
            name: str(value) if isinstance(value, str) else value
            for name, value in options.items()
            if value is not None
        },
        **{name: environ[name] for name in _VARIABLES if environ.get(name)},
        "XLA_FLAGS": " ".join(flags),
        "device_kind": devices[0].device_kind,
        "device_count": len(devices),
    }
