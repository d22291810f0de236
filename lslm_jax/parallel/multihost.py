"""Many processes as one run: how they find each other, wait for each other, and agree.

One process is a run too: then everything here returns at once. Process 0 is the primary, which alone writes.
"""

import itertools
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lslm_jax import errors
from lslm_jax.errors import ConfigError, LslmError, PeerLost, first_line
from lslm_jax.parallel import heartbeat
from lslm_jax.runtime import environment, progress

_JOIN_SECONDS = 600.0  # for the other processes to come
_ABORT_SECONDS = 100.0  # of silence until JAX aborts everyone: the last resort, where nobody watches
_POLL_SECONDS = 5.0  # a process waits in such slices, between which it can be stopped
_MOST = 1 << 20  # processes, or devices of one
_calls = itertools.count()  # every process asks the same questions in the same order


class Cluster(NamedTuple):
    """What the environment, or a user, says of the processes of a run.

    Attributes:
      kind: who started them: flags, slurm, openmpi, tpu.
      coordinator: HOST:PORT of process 0; None: jax asks the scheduler.
      processes: how many; None: the same.
      process: number of this one; None: the same.
      devices: local devices of this process; None: the scheduler's way, or all.
    """

    kind: str
    coordinator: str | None = None
    processes: int | None = None
    process: int | None = None
    devices: tuple[int, ...] | None = None


def find_cluster(
    environ: Mapping[str, str], coordinator: str | None, processes: int | None, process: int | None
) -> Cluster | None:
    """Who else is there, by flags, by JAX_COORDINATOR_ADDRESS and its kin, or by the scheduler's variables.

    Raises:
      ConfigError: what is said is incomplete or contradicts itself.
    """
    coordinator = coordinator or environ.get("JAX_COORDINATOR_ADDRESS")
    processes = processes if processes is not None else _number(environ, "JAX_NUM_PROCESSES")
    process = process if process is not None else _number(environ, "JAX_PROCESS_ID")
    if processes is None and "OMPI_COMM_WORLD_SIZE" in environ:
        processes, process = _number(environ, "OMPI_COMM_WORLD_SIZE"), _number(environ, "OMPI_COMM_WORLD_RANK")
        if processes and processes > 1 and not coordinator:
            if "OMPI_MCA_orte_hnp_uri" not in environ:
                raise ConfigError("Open MPI does not say where process 0 is: set --coordinator=HOST:PORT")
            return Cluster("openmpi")
    if coordinator is not None:
        _check_address(coordinator)
    if (coordinator, processes, process) != (None, None, None) and not _is_slurm(environ):
        return _told(coordinator, processes, process)
    if _is_slurm(environ):
        tasks = _number(environ, "SLURM_NTASKS")
        if tasks == 1:
            return None
        nodes = _number(environ, "SLURM_STEP_NUM_NODES")
        alone = (1 if nodes is None else nodes) == tasks  # one process a host, which has all its GPUs
        gpus = _number(environ, "SLURM_GPUS_ON_NODE") if alone else None
        return Cluster("slurm", coordinator, devices=tuple(range(gpus)) if gpus else None)
    if "," in environ.get("TPU_WORKER_HOSTNAMES", "") or environ.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return Cluster("tpu")
    return None


def _is_slurm(environ: Mapping[str, str]) -> bool:
    """Whether srun started this process; in a batch script, or a shell, only some of these are set."""
    return all(f"SLURM_{name}" in environ for name in ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID"))


def _told(coordinator: str | None, processes: int | None, process: int | None) -> Cluster | None:
    if processes == 1:
        return None
    said = {"--coordinator": coordinator, "--processes": processes, "--process": process}
    if missing := [name for name, value in said.items() if value is None]:
        raise ConfigError(f"{missing[0]} is missing: a run of several processes needs {', '.join(said)}")
    assert coordinator and processes is not None and process is not None
    if not 0 < processes <= _MOST:
        raise ConfigError(f"--processes={processes} must be in [1, {_MOST}]")
    if not 0 <= process < processes:
        raise ConfigError(f"--process={process} must be at least 0 and below --processes={processes}")
    return Cluster("flags", coordinator, processes, process)


def _check_address(coordinator: str) -> None:
    match = re.fullmatch(r"(\S+):([0-9]{1,5})", coordinator)
    if not match or not 0 < int(match[2]) < 1 << 16:
        raise ConfigError(f"--coordinator={coordinator} must be HOST:PORT, with a port below 65536")


def _number(environ: Mapping[str, str], name: str) -> int | None:
    if name not in environ:
        return None
    if not re.fullmatch(r"[0-9]{1,7}", environ[name]) or int(environ[name]) > _MOST:
        raise ConfigError(f"{name}={environ[name]} must be a number of at most {_MOST}")
    return int(environ[name])


def start(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, patience: float = 0.0
) -> None:
    """Joins the other processes, if there are any; before anything else asks jax for devices.

    Args:
      coordinator, processes, process: as the flags say, if they do.
      patience: seconds after which a silent process counts as lost (`peers`); 0: nobody watches.

    Raises:
      ConfigError: flags or environment make no sense.
      PeerLost: the others did not come.
    """
    cluster = find_cluster(os.environ, coordinator, processes, process)
    if cluster is None:
        return
    # That service would swallow SIGTERM; here, signals are agreed upon by the loop (`Agreement`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator_address=cluster.coordinator,
            num_processes=cluster.processes,
            process_id=cluster.process,
            local_device_ids=cluster.devices,
            cluster_detection_method="deactivate" if cluster.kind == "flags" else None,
            initialization_timeout=int(_JOIN_SECONDS),
            heartbeat_timeout_seconds=int(max(_ABORT_SECONDS, 2 * patience)),
            coordinator_bind_address=_bind_address(cluster),
        )
    except Exception as error:  # jax looks at the scheduler's variables itself, and raises what it meets
        raise PeerLost(f"cannot join the other processes ({cluster.kind}): {first_line(error)}") from error
    _connect()
    if not is_primary():
        progress.be_quiet()
    if patience:
        heartbeat.begin(_client(), jax.process_index(), jax.process_count(), patience)


def _connect() -> None:
    """Lets the CPU devices of all processes meet once: gloo writes a line for each then, which nobody needs.

    Raises:
      PeerLost: they do not meet.
    """
    if jax.default_backend() != "cpu":
        return
    mesh = Mesh(np.array(jax.devices()), ("all",))
    spread = NamedSharding(mesh, PartitionSpec("all"))
    try:
        with environment.without_output():
            ones = jax.make_array_from_callback((mesh.size,), spread, lambda _: np.ones(1, np.int32))
            jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))(ones).block_until_ready()
    except RuntimeError as error:
        raise PeerLost(f"cannot reach the other processes: {first_line(error)}") from error


def _bind_address(cluster: Cluster) -> str | None:
    """Address that the service of process 0 listens on: the named one, and not all, if it is one of this machine.

    The service authenticates nobody: whoever reaches it can end the run. None leaves the choice to jax (all addresses),
    as where the name is that of a load balancer, or the scheduler chooses.
    """
    host = (cluster.coordinator or "").rpartition(":")[0]
    if host in ("", "0.0.0.0", "[::]"):
        return None
    if host == "localhost":
        return cluster.coordinator
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host.strip("[]"), 0, type=socket.SOCK_STREAM):
            with socket.socket(family, kind, protocol) as probe:
                probe.bind((address[0], 0))
    except OSError:
        return None
    return cluster.coordinator


def is_primary() -> bool:
    """Whether this is process 0, the one that writes and prints."""
    return jax.process_index() == 0


def by_primary(name: str, work: Callable[[], Any]) -> Any:
    """What work returns on the primary, a value that JSON can hold, on every process; the others only wait for it.

    Raises:
      LslmError: whatever work raises on the primary, everywhere.
    """
    if jax.process_count() == 1:
        return work()
    key = f"lslm/{name}-{next(_calls)}"
    if is_primary():
        try:
            value = work()
        except LslmError as error:
            _client().key_value_set(key, json.dumps({"error": type(error).__name__, "text": str(error)}))
            raise
        _client().key_value_set(key, json.dumps({"value": value}))
        return value
    answer = json.loads(_await(key))
    if "error" in answer:
        error = getattr(errors, answer["error"])(answer["text"])
        error.told = True
        raise error
    return answer["value"]


def check_equal(
    name: str, values: Mapping[str, Any], error: type[LslmError] = ConfigError, remedy: str = "give all the same"
) -> None:
    """Compares JSON values, by name, of all processes with those of process 0.

    Args:
      name: of the comparison.
      values: of this process.
      error: raised on a difference.
      remedy: end of its message.

    Raises:
      LslmError: `error`, on every process, where one has another value; its message names both.
    """
    if jax.process_count() == 1:
        return
    key = f"lslm/equal/{name}-{next(_calls)}"
    mine = {"host": socket.gethostname(), "values": json.loads(json.dumps(dict(values)))}
    _client().key_value_set(f"{key}/{jax.process_index()}", json.dumps(mine))

    def compare() -> None:
        for process in range(1, jax.process_count()):
            theirs = json.loads(_await(f"{key}/{process}"))
            for field in dict(mine["values"]) | theirs["values"]:
                ours, other = mine["values"].get(field), theirs["values"].get(field)
                if ours != other:
                    where = f"process {process} on {theirs['host']}"
                    raise error(f"{where} has {field}={other}, process 0 has {ours}: {remedy}")

    by_primary(name, compare)


def on_each(name: str, work: Callable[[], Any], key: str) -> None:
    """Does work on one process of each key; if it fails on any, all raise its error.

    Args:
      name: of the work.
      work: raises an LslmError where it fails.
      key: of this process; the first process of each key works, the others wait.
    """
    if jax.process_count() == 1:
        work()
        return
    prefix, processes, me = f"lslm/each/{name}-{next(_calls)}", range(jax.process_count()), jax.process_index()
    _client().key_value_set(f"{prefix}/key/{me}", key)
    workers = by_primary(name, lambda: _first_of_each([_await(f"{prefix}/key/{process}") for process in processes]))
    if me in workers:
        failure = {}
        try:
            work()
        except LslmError as error:
            failure = {"error": type(error).__name__, "text": str(error)}
        _client().key_value_set(f"{prefix}/done/{me}", json.dumps(failure))

    def collect() -> None:
        for process in workers:
            if failure := json.loads(_await(f"{prefix}/done/{process}")):
                raise getattr(errors, failure["error"])(
                    f"process {process}: {failure['text']}" if process else failure["text"]
                )

    by_primary(name, collect)


def _first_of_each(keys: list[str]) -> list[int]:
    return sorted({key: process for process, key in reversed(list(enumerate(keys)))}.values())


def primary_first(name: str, work: Callable[[], Any]) -> Any:
    """What work returns, done by the primary, and then by the others, who find what it has written."""
    if jax.process_count() == 1:
        return work()
    done: list[Any] = []
    by_primary(name, lambda: done.append(work()))
    return done[0] if done else work()


def _await(key: str) -> str:
    """The value of a key, however long its making takes; a primary that is lost ends the wait."""
    while True:
        try:
            return _client().blocking_key_value_get(key, int(_POLL_SECONDS * 1000))
        except RuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise PeerLost(f"the primary process is gone: {first_line(error)}") from error


def _client() -> Any:
    from jax._src import distributed  # jax has no public way to its key-value store and barriers

    return distributed.global_state.client


class Agreement:
    """Whether any process wants something, asked of all at every step and known a step later.

    What the devices add up is the same everywhere, and so all stop at the same step, although a signal reaches each
    process at another moment, or only one of them.
    """

    def __init__(self, mesh: Mesh):
        self._asked: Any = None
        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count = jax.jit(jnp.sum, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._several = jax.process_count() > 1

    def reached(self, wanted: bool) -> bool:
        """Tells what this process wants now, and whether any wanted it when this was last called."""
        if not self._several:
            return wanted
        flag, shape = np.full(1, wanted, np.int32), (self._sharding.mesh.size,)
        now = self._count(jax.make_array_from_callback(shape, self._sharding, lambda _: flag))
        asked, self._asked = self._asked, now
        return asked is not None and int(asked) > 0
