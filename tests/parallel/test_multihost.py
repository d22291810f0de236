"""How the processes of a run find each other: by flags, by variables, by what a scheduler says."""

import jax
import pytest

from lslm_jax.config import Config, MeshConfig
from lslm_jax.errors import ConfigError
from lslm_jax.parallel import multihost
from lslm_jax.parallel.multihost import Cluster, find_cluster
from lslm_jax.parallel.sharding import make_mesh

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        ({}, (), None),
        ({}, (None, 1, 0), None),
        ({}, ("a:1", 2, 1), Cluster("flags", "a:1", 2, 1)),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, (None, None, 0), Cluster("flags", "a:1", 2, 0)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"},
            (),
            Cluster("flags", "a:1", 4, 3),
        ),
        # A batch script, or a shell, of Slurm; a step of one task; of one task a host, which has all the GPUs there.
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, (), None),
        (SLURM | {"SLURM_NTASKS": "1"}, (), None),
        (SLURM | {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2"}, (), Cluster("slurm")),
        (
            SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_GPUS_ON_NODE": "4"},
            (),
            Cluster("slurm", devices=(0, 1, 2, 3)),
        ),
        (MPI | {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, (), None),
        (MPI | {"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:5"}, (), Cluster("openmpi")),
        (MPI, ("a:1", None, None), Cluster("flags", "a:1", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "a"}, (), None),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), Cluster("tpu")),
    ],
)
def test_a_cluster_is_found_by_flags_or_by_what_its_scheduler_sets(environ, flags, expected):
    assert find_cluster(environ, *(flags or (None, None, None))) == expected


@pytest.mark.parametrize(
    ("environ", "flags", "message"),
    [
        (SLURM | {"SLURM_NTASKS": "two"}, (None, None, None), "SLURM_NTASKS=two must be a number"),
        (SLURM | {"SLURM_NTASKS": "\u00b2"}, (None, None, None), "SLURM_NTASKS=\u00b2 must be a number"),
        (
            SLURM | {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_NODES": "?"},
            (None, None, None),
            "SLURM_STEP_NUM_NODES=? must be a number",
        ),
        (
            SLURM | {"SLURM_NTASKS": "1000000", "SLURM_STEP_NUM_NODES": "1000000", "SLURM_GPUS_ON_NODE": "9" * 30},
            (None, None, None),
            f"SLURM_GPUS_ON_NODE={'9' * 30} must be a number of at most",
        ),
        (SLURM | {"SLURM_NTASKS": "2"}, ("nowhere", None, None), "--coordinator=nowhere must be HOST:PORT"),
        ({}, ("a:99999", 2, 0), "--coordinator=a:99999 must be HOST:PORT, with a port below 65536"),
        ({}, ("a:1", 10**30, 0), "--processes=1000000000000000000000000000000 must be in [1, "),
        ({}, (None, 2, 0), "--coordinator is missing: a run of several processes needs --coordinator, --processes, "),
        ({}, ("a:1", None, 0), "--processes is missing"),
        ({}, ("a:1", 2, None), "--process is missing"),
        ({}, ("a", 2, 0), "--coordinator=a must be HOST:PORT"),
        ({}, ("a:1", 2, 2), "--process=2 must be at least 0 and below --processes=2"),
        ({"JAX_NUM_PROCESSES": "two"}, (None, None, None), "JAX_NUM_PROCESSES=two must be a number"),
        (MPI, (None, None, None), "Open MPI does not say where process 0 is: set --coordinator=HOST:PORT"),
    ],
)
def test_half_a_cluster_is_refused_in_one_line(environ, flags, message):
    with pytest.raises(ConfigError) as error:
        find_cluster(environ, *flags)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("coordinator", "expected"),
    [
        ("127.0.0.1:81", "127.0.0.1:81"),
        ("localhost:81", "localhost:81"),
        ("192.0.2.1:81", None),  # no address of this machine: a load balancer, say
        ("no-such-host.invalid:81", None),
        (None, None),
    ],
)
def test_the_service_listens_on_the_named_address_alone(coordinator, expected):
    assert multihost._bind_address(Cluster("flags", coordinator, 2, 0)) == expected


def test_alone_nothing_waits_and_wishes_are_known_at_once():
    assert multihost.by_primary("one", lambda: 1) == multihost.primary_first("two", lambda: 1) == 1
    agreement = multihost.Agreement(make_mesh(Config(mesh=MeshConfig(data=1)), jax.devices()[:1]))
    assert [agreement.reached(wanted) for wanted in (False, True, False)] == [False, True, False]
