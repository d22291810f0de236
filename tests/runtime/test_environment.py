"""Process environment: limits of the system, and options of JAX that are rejected or recorded."""

import contextlib
import os
import resource

import jax
import pytest

from lslm_jax.errors import ConfigError
from lslm_jax.runtime import environment


@pytest.fixture
def limits(monkeypatch):
    """A stand-in for the limit of open files, as (soft, hard)."""
    now = {}
    monkeypatch.setattr(resource, "getrlimit", lambda _: (now["soft"], now["hard"]))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: now.update(soft=new[0], hard=new[1]))
    return now


@pytest.mark.parametrize(("soft", "hard", "after"), [(40, 9999, 4096), (40, 1024, 1024), (5000, 9999, 5000)])
def test_the_limit_of_open_files_is_raised_where_it_may_be(limits, soft, hard, after):
    limits |= {"soft": soft, "hard": hard}
    environment.raise_open_file_limit()
    assert limits["soft"] == after


def test_a_limit_that_is_too_low_is_one_line(limits):
    limits |= {"soft": 40, "hard": 40}
    with pytest.raises(ConfigError, match=r"^the limit of open files is 40, too low for a run: raise it with `ulimit"):
        environment.raise_open_file_limit()


@contextlib.contextmanager
def option(name, value):
    before = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        yield
    finally:
        jax.config.update(name, before)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("jax_enable_x64", True, "JAX_ENABLE_X64 is set, but training is in 32 bits: unset JAX_ENABLE_X64"),
        ("jax_numpy_dtype_promotion", "strict", "JAX_NUMPY_DTYPE_PROMOTION=strict is not supported"),
    ],
)
def test_an_option_with_which_nothing_can_be_computed_is_named(name, value, message):
    environment.check_jax_options()
    with option(name, value), pytest.raises(ConfigError, match=message):
        environment.check_jax_options()


def test_what_changes_numbers_is_recorded_and_nothing_else():
    flags = "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    found = environment.numeric_settings({"XLA_FLAGS": flags, "NVIDIA_TF32_OVERRIDE": "0", "HOME": "/root"})
    assert found["XLA_FLAGS"] == "--xla_backend_optimization_level=0" and found["NVIDIA_TF32_OVERRIDE"] == "0"
    assert "HOME" not in found and found["device_count"] == jax.device_count()
    with option("jax_default_prng_impl", "rbg"):
        other = environment.numeric_settings({"XLA_FLAGS": flags})
    assert other["JAX_DEFAULT_PRNG_IMPL"] == "rbg" != found["JAX_DEFAULT_PRNG_IMPL"]


def test_variables_that_change_numbers_are_recorded_but_not_those_of_caches_and_logs():
    variables = {"JAX_RANDOM_SEED_OFFSET": "3", "ONEDNN_MAX_CPU_ISA": "SSE41", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}
    neutral = {
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": "/x",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        "JAX_COORDINATOR_ADDRESS": "a:1",
        "JAX_PROCESS_ID": "1",
        "JAX_LOG_COMPILES": "1",
        "JAX_LOGGING_LEVEL": "DEBUG",
        "ONEDNN_VERBOSE": "1",
    }
    found, before = environment.numeric_settings(variables | neutral), environment.numeric_settings({})
    assert {name: value for name, value in found.items() if name not in before} == variables


def test_the_machine_is_recorded_where_its_processor_computes(tmp_path):
    found = environment.numeric_settings({"PJRT_NPROC": "8"})
    assert found["cpu_threads"] == 8 and found["processor"] == environment.processor()
    assert environment.numeric_settings({})["cpu_threads"] == len(os.sched_getaffinity(0))
    (tmp_path / "flags").write_text("--xla_cpu_enable_fast_math=true --xla_dump_to=/x\n")
    assert environment.numeric_settings({"XLA_FLAGS": f"{tmp_path}/flags"})["XLA_FLAGS"].endswith("fast_math=true")
