"""Eight simulated devices, which every test sees; and NumPy-style rank promotion is an error."""

import faulthandler
import gc
import importlib.metadata
import os
import pathlib
import signal
from collections.abc import Iterator

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; children would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling takes most of the time of these tests: what is compiled is small and need not be fast. The last flag more
# than halves it; later versions, which do not know it, would end the process.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    + " --xla_cpu_use_fusion_emitters=false" * importlib.metadata.version("jaxlib").startswith("0.10."),
)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
# What one process of a test has compiled the next one finds: that of a run that goes on, say.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(__file__).resolve().parents[1] / ".cache" / "xla"))
os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(1 << 30))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest
import selection

jax.config.update("jax_numpy_rank_promotion", "raise")
# What is imported by now lives as long as the process: without it the garbage collector has a tenth less to do.
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 100)  # tracing allocates much and leaves few cycles: the default costs 4 % of the suite

SHARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "data"
CRASHES = pathlib.Path(__file__).resolve().parents[1] / ".cache" / "crashes"
MAPPINGS = pathlib.Path("/proc/self/maps")
SELECTED = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Where a process of the tests crashes, the stack goes to a file: on stderr it would drown in what others say."""
    CRASHES.mkdir(parents=True, exist_ok=True)
    if not hasattr(config, "workerinput"):
        for stack in CRASHES.iterdir():
            stack.unlink()
    faulthandler.enable((CRASHES / str(os.getpid())).open("w"), all_threads=False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Prints what was selected, and the end of the stack of each process that crashed."""
    if SELECTED in config.stash:
        terminalreporter.line(config.stash[SELECTED])
    for stack in sorted(path for path in CRASHES.iterdir() if path.stat().st_size):
        terminalreporter.section(f"process {stack.name} crashed")
        terminalreporter.line("\n".join(stack.read_text().splitlines()[:30]))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options that select tests by what has changed."""
    parser.addoption("--changed-since", metavar="REVISION", help="run all tests of files that depend on a changed file")
    parser.addoption("--share", default="0/1", metavar="K/N", help="of all other tests run the K-th of N shares")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Selects tests; files with slow tests come first, so that no process is left alone with one at the end."""
    if revision := config.getoption("--changed-since"):
        _select(config, items, revision)
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def _select(config: pytest.Config, items: list[pytest.Item], revision: str) -> None:
    changed = selection.changed_files(revision)
    dependent = {path for path in {item.path for item in items} if selection.depends(path, changed)}
    number, shares = map(int, config.getoption("--share").split("/"))
    chosen = selection.share((item.nodeid for item in items if item.path not in dependent), number, shares)
    kept = [item for item in items if item.path in dependent or item.nodeid in chosen]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    selected = (
        f"{len(kept)} of {len(items)} tests: all of {len(dependent)} files that depend on the {len(changed)} files "
        f"changed since {revision[:12]}, and share {number % shares} of {shares} of the others"
    )
    items[:] = kept
    config.stash[SELECTED] = selected
    if hasattr(config, "workeroutput"):
        config.workeroutput["selected"] = selected


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node) -> None:
    """Takes what a worker of pytest-xdist selected, to be printed once; all select the same."""
    if selected := getattr(node, "workeroutput", {}).get("selected"):
        node.config.stash[SELECTED] = selected


@pytest.fixture(scope="session")
def shared() -> pathlib.Path:
    """Small real data sets that lie beside a developer's checkout; users do not have them."""
    if not SHARED.is_dir():
        pytest.skip("no ../shared/data beside this checkout")
    return SHARED


@pytest.fixture(scope="module", autouse=True)
def few_mappings() -> Iterator[None]:
    """Drops what was compiled once it fills half of a process's memory mappings.

    A small program for eight CPU devices takes 24 of them, Linux allows 65,530, and XLA does not survive the next one.
    """
    yield
    if MAPPINGS.exists() and MAPPINGS.read_bytes().count(b"\n") > 1 << 15:
        jax.clear_caches()
        gc.collect()


@pytest.fixture(scope="module")
def one_device() -> Iterator[None]:
    """Lets commands in this process see one device of eight: programs for one compile in two thirds of the time."""
    devices = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "devices", lambda *backend: devices)
        yield
