"""Several real processes on one machine make the run that one makes: its batches, its losses, its checkpoints."""

import json
import os
import random
import shutil
import signal
import time

import forked
import numpy as np
import pytest
from error_table import assert_told
from loopback import free_port

from lslm_jax.data.prepare import data_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CONFIG = """
from lslm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=2, d_model=32, num_heads=4, max_length=32),
        data=DataConfig(files=("train.jsonl",), valid_files=("valid.jsonl",), seq_len=32, packing="bins"),
        tokenizer=TokenizerConfig(kind="bytes"),
        train=TrainConfig(steps=12, batch_size=8, loss_chunk=32),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5),
        mesh=MeshConfig(fsdp=2),
        checkpoint=CheckpointConfig(every=100),
        eval=EvalConfig(every=0),
        log=LogConfig(every=1, tensorboard=False, timing=False),
    )
"""
DOCUMENTS = {"train": 300, "valid": 203}
STEPS_READ = (0, 7, 1_000_000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    directory, rng = tmp_path_factory.mktemp("corpus"), random.Random(1)
    for name, count in DOCUMENTS.items():
        texts = [" ".join(rng.choices(["alpha", "beta", "gamma"], k=rng.randint(2, 8))) + f" {i}" for i in range(count)]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (directory / "config.py").write_text(CONFIG)
    return directory


class Job:
    """Processes that share some devices among them: `start(process, coordinator, env)` starts one."""

    def __init__(self, processes, start, devices=4):
        coordinator = f"127.0.0.1:{free_port()}"
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": forked.xla_flags(devices // processes)}
        self.parts = [start(process, coordinator, env) for process in range(processes)]

    def end(self):
        """Exit codes, stdouts and stderrs."""
        try:
            texts = [part.communicate(timeout=400) for part in self.parts]
        finally:
            for part in self.parts:
                part.kill()
                part.wait()
        return [part.returncode for part in self.parts], *zip(*texts, strict=True)


def lslm(corpus, processes, workdir, *flags, devices=4):
    command = ["--config=config.py", f"--workdir={workdir}", *flags]

    def start(process, coordinator, env):
        join = [f"--coordinator={coordinator}", f"--processes={processes}", f"--process={process}"]
        return forked.lslm(*command, *(join if processes > 1 else []), env=env, cwd=corpus)

    return Job(processes, start, devices)


def read_batches(coordinator, processes, process, data, to):
    """Writes the rows that a process reads of some batches, which must be those that its devices hold."""
    from etils import epath

    from lslm_jax.config import loading, validation
    from lslm_jax.data import dataloader
    from lslm_jax.parallel import multihost
    from lslm_jax.parallel.sharding import local_rows, make_mesh, to_global

    multihost.start(coordinator, processes, process)
    config = validation.validate(loading.load("config.py"))
    mesh = make_mesh(config)
    rows = local_rows(mesh, 8)
    train = dataloader.open_train(config, epath.Path(data), 259, rows)
    for step in STEPS_READ:
        batch = train.batch(step)
        placed = to_global(batch, mesh, 8)
        for shard in placed.tokens_BT.addressable_shards:
            here = np.searchsorted(rows, np.arange(8)[shard.index[0]])
            np.testing.assert_array_equal(shard.data, batch.tokens_BT[here])
        arrays = {name: array for name, array in batch._asdict().items() if array is not None}
        np.savez(f"{to}-{step}-{process}.npz", rows=rows, **arrays)


def record(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_close(found, expected):
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(list(one.values()), list(other.values()), rtol=1e-5)


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):
    """A run of one process with four devices."""
    workdir = tmp_path_factory.mktemp("alone")
    codes, _, texts = lslm(corpus, 1, workdir).end()
    assert codes == [0], texts
    return workdir


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_losses_and_the_evaluation_of_every_example_are_those_of_one_process(corpus, alone, tmp_path, processes):
    codes, outs, texts = lslm(corpus, processes, tmp_path / "run").end()
    assert codes == [0] * processes, texts
    assert_close(record(tmp_path / "run"), record(alone))
    summary = json.loads(outs[0].splitlines()[-1])
    texts_of = map(json.loads, (corpus / "valid.jsonl").read_text().splitlines())
    assert summary["eval/tokens"] == sum(len(line["text"].encode()) + 1 for line in texts_of)
    assert not any("{" in out for out in outs[1:]) and not any(texts[1:]), "only the first process speaks"


@pytest.mark.exhaustive  # devices of one process: tests/train/test_train_step.py
def test_a_reproducible_run_is_the_same_to_the_last_bit_for_any_number_of_devices_and_processes(corpus, tmp_path):
    flags = ["--config.train.reproducible=true", "--config.mesh.fsdp=1", "--config.model.dropout=0.1"]
    flags += ["--config.model.d_model=128", "--config.optimizer.clip=0.1", "--config.train.steps=6"]
    curves = []
    for processes, devices in ((2, 2), (1, 1)):
        workdir = tmp_path / f"{processes}-{devices}"
        codes, _, texts = lslm(corpus, processes, workdir, *flags, devices=devices).end()
        assert codes == [0] * processes, texts
        curves.append(record(workdir))
    for curve in curves:
        assert curve[:6] == curves[0][:6] and [line["step"] for line in curve[:6]] == [1, 2, 3, 4, 5, 6]
        assert all(line["grad_norm"] > 0.1 for line in curve[:6]), "clipping carries the norm's bits into the weights"
        assert_close(curve[6:], curves[0][6:])  # an evaluation is split as the mesh says


def test_batches_hold_the_same_rows_for_any_number_of_processes(corpus, alone, tmp_path):
    for processes in (1, 2, 4):

        def start(process, coordinator, env, processes=processes):
            arguments = coordinator, processes, process, str(alone / "data"), str(tmp_path / str(processes))
            return forked.Process(read_batches, *arguments, env=env, cwd=corpus)

        codes, _, texts = Job(processes, start).end()
        assert codes == [0] * processes, texts
    for step in STEPS_READ:
        whole = np.load(tmp_path / f"1-{step}-0.npz")
        for processes in (2, 4):
            parts = [np.load(tmp_path / f"{processes}-{step}-{process}.npz") for process in range(processes)]
            np.testing.assert_array_equal(np.concatenate([part["rows"] for part in parts]), np.arange(8))
            for name in whole.files:
                np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("numbers", [(1,), pytest.param((1, 2, 4), marks=pytest.mark.exhaustive)])
def test_a_signal_to_one_stops_all_and_any_number_of_processes_goes_on(corpus, tmp_path, numbers):
    job = lslm(corpus, 2, tmp_path / "stopped", "--config.train.steps=2000")
    metrics = tmp_path / "stopped" / "metrics.jsonl"
    deadline = time.monotonic() + 400
    while not (metrics.exists() and metrics.read_text().count("\n") >= 3):
        assert time.monotonic() < deadline and job.parts[0].poll() is None
        time.sleep(0.05)
    job.parts[1].send_signal(signal.SIGTERM)
    codes, _, texts = job.end()
    assert_told("A signal to another process of the run", codes[0], texts[0])
    assert codes[1] == 75, texts
    (step,) = [int(path.name) for path in (tmp_path / "stopped" / "checkpoints").iterdir()]
    assert f"SIGTERM: step {step} is saved" in texts[1] and f"another process is to stop: step {step}" in texts[0]
    for processes in numbers:
        workdir = tmp_path / f"goes-on-{processes}"
        shutil.copytree(tmp_path / "stopped", workdir)
        steps = f"--config.train.steps={step + 5}"
        codes, _, texts = lslm(corpus, processes, workdir, steps).end()
        assert codes == [0] * processes and f"resumed from step {step}" in texts[0], texts
        assert [line["step"] for line in record(workdir)[: step + 5]] == list(range(1, step + 6))
    for processes in numbers[1:]:
        assert_close(*(record(tmp_path / f"goes-on-{count}") for count in (numbers[0], processes)))
    audited = json.loads(lslm(corpus, 1, workdir, "audit").end()[1][0])
    assert (audited["steps"], audited["starts"], audited["repeated_steps"]) == (step + 5, 2, 0)


def test_what_fails_at_the_primary_ends_all_and_is_told_once(corpus, tmp_path):
    codes, _, texts = lslm(corpus, 2, tmp_path / "run", "--config.data.files=nowhere.jsonl").end()
    assert codes == [66, 66]
    assert "nowhere.jsonl" in texts[0] and texts[0].count("\n") == 1 and texts[1] == ""


def started(corpus, workdirs, flags, environs=({}, {})):
    """Two processes, each with a run directory, flags and an environment of its own."""

    def start(process, coordinator, env):
        join = [f"--coordinator={coordinator}", "--processes=2", f"--process={process}"]
        command = ["--config=config.py", f"--workdir={workdirs[process]}", *flags[process]]
        return forked.lslm(*command, *join, env=env | environs[process], cwd=corpus)

    return Job(2, start)


@pytest.mark.parametrize(
    ("setting", "environ", "message"),
    [
        ("--config.optimizer.learning_rate=0.5", {}, "has optimizer.learning_rate=0.5, process 0 has 0.01"),
        pytest.param("--config.seed=1", {}, "has seed=1, process 0 has 0", marks=pytest.mark.exhaustive),
        pytest.param(
            "--config.log.every=1",
            {"JAX_DEFAULT_PRNG_IMPL": "rbg"},
            "has JAX_DEFAULT_PRNG_IMPL=rbg, process 0 has threefry2x32",
            marks=pytest.mark.exhaustive,
        ),
        ("--workdir=elsewhere", {}, "has --workdir="),
    ],
)
def test_processes_with_different_settings_end_before_the_first_step(corpus, tmp_path, setting, environ, message):
    codes, _, texts = started(corpus, [tmp_path, tmp_path], [[], [setting]], ({}, environ)).end()
    assert codes == [2, 2], texts
    assert message in texts[0] and "start all processes with the same settings" in texts[0] and not texts[1].strip()
    assert not (tmp_path / "checkpoints").exists()


def test_a_process_with_other_data_is_named_before_the_first_step(corpus, alone, tmp_path):
    """Of the same directory's name, but with content of its own, as on a disk that hosts do not share."""
    own = [shutil.copytree(alone / "data", tmp_path / name) for name in ("one", "two")]
    flags = [[f"--config.data.dir={directory}"] for directory in own]
    manifest = json.loads((own[1] / "manifest.json").read_text())
    manifest["tokenizer"]["eos_id"] = 5
    manifest["content_sha256"] = data_manifest.content_sha256(manifest)
    (own[1] / "manifest.json").write_text(json.dumps(manifest))
    codes, _, texts = started(corpus, [tmp_path / "run"] * 2, flags).end()
    assert codes == [65, 65] and "give all processes the same prepared data" in texts[0], texts
    (own[1] / "manifest.json").write_bytes((own[0] / "manifest.json").read_bytes())
    shard = own[1] / "train" / "tokens-00000.bin"
    content = bytearray(shard.read_bytes())
    content[10] ^= 1
    shard.write_bytes(content)
    codes, _, texts = started(corpus, [tmp_path / "run"] * 2, flags).end()
    assert codes == [65, 65] and "process 1: " in texts[0] + texts[1] and "was altered" in texts[0] + texts[1], texts
