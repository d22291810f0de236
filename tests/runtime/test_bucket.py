"""A run in a bucket: what is true of one on a disk is true of it. The bucket is an emulator's.

Its packages are no part of the project's: epath speaks to it through gcsfs, Orbax through tensorstore.
"""

import json
import pathlib
import signal
import subprocess
import sys

import pytest
from loopback import free_port

server = pytest.importorskip("gcp_storage_emulator.server")
objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
pytest.importorskip("gcsfs")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

CORPUS = pathlib.Path(json.__file__).parent  # some real text that is always there
CONFIG = {
    "model": {"num_layers": 2, "d_model": 32, "num_heads": 4, "max_length": 32, "dropout": 0.1},
    "data": {"files": [f"{CORPUS}/*.py"], "valid_fraction": 0.3, "seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": 60, "batch_size": 8, "ema": 0.9},
    "checkpoint": {"every": 10, "keep": 2, "export_every": 30},
    "eval": {"every": 30, "batches": 2},
    "log": {"every": 1, "timing": False, "tensorboard": False},
}


def _move(request, response, storage, *_):
    """What gcsfs renames by, and the emulator lacks."""
    request.params["dest_bucket_name"] = request.params["bucket_name"]
    objects.copy(request, response, storage)
    objects.delete(request, response, storage)


MOVE = r"^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.*[^/]+)/moveTo/o/(?P<dest_object_id>.*[^/]+)$"


@pytest.fixture
def bucket(monkeypatch):
    """Reads what lies in gs://mine; processes that are started find it there."""
    monkeypatch.setattr(server, "HANDLERS", ((MOVE, {"POST": _move}), *server.HANDLERS))
    port = free_port()
    started = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="mine")
    started.start()
    at = f"http://127.0.0.1:{port}"
    for name, value in {
        "EPATH_USE_TF": "false",
        "FSSPEC_GS": json.dumps({"token": "anon", "use_listings_cache": False}),
        "GCE_METADATA_ROOT": "127.0.0.1:1",  # there is none to ask for credentials
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        "GOOGLE_CLOUD_PROJECT": "mine",
        "STORAGE_EMULATOR_HOST": at,
        "TENSORSTORE_GCS_HTTP_URL": at,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }.items():
        monkeypatch.setenv(name, value)
    yield lambda name: started._storage.get_file("mine", name)
    started.stop()


def lslm(tmp_path, *arguments, code=0):
    command = [sys.executable, "-m", "lslm_jax.main", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stderr
    return done


def test_a_run_in_a_bucket_is_stopped_goes_on_and_is_the_one_on_a_disk(bucket, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    lslm(tmp_path, "--config=config.json", "--workdir=disk")

    command = [sys.executable, "-m", "lslm_jax.main", "--config=config.json", "--workdir=gs://mine/runs/one"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as first:
        for line in first.stderr:
            if line.startswith("step 1/"):
                first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 75
    again = lslm(tmp_path, *command[3:])
    assert "resumed from step" in again.stderr
    assert bucket("runs/one/metrics.jsonl") == (tmp_path / "disk" / "metrics.jsonl").read_bytes()
    assert not (tmp_path / "gs:").exists()

    where = "--workdir=gs://mine/runs/one"
    assert json.loads(lslm(tmp_path, "verify", where).stdout)["checkpoints"] == [50, 60]
    told = json.loads(lslm(tmp_path, "audit", where).stdout)
    assert (told["steps"], told["starts"]) == (60, 2)
    expected = lslm(tmp_path, "generate", "--workdir=disk", "--prompt=def", "--config.generate.temperature=0").stdout
    assert lslm(tmp_path, "generate", where, "--prompt=def", "--config.generate.temperature=0").stdout == expected
    exported = "--pretrained=gs://mine/runs/one/exports/60"
    assert lslm(tmp_path, "generate", exported, "--prompt=def", "--config.generate.temperature=0").stdout == expected


COPY = """
import pathlib, sys
from etils import epath
for path in pathlib.Path(sys.argv[1]).glob("*.py"):
    (epath.Path("gs://mine/text") / path.name).write_text(path.read_text())
"""


def test_two_processes_share_a_bucket(bucket, tmp_path):
    subprocess.run([sys.executable, "-c", COPY, str(CORPUS)], check=True, timeout=60)
    config = CONFIG | {"data": CONFIG["data"] | {"files": ["gs://mine/text/*.py"]}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for steps in (20, 40):
        command = [sys.executable, "-m", "lslm_jax.main", "--config=config.json", "--workdir=gs://mine/runs/two"]
        command += [f"--config.train.steps={steps}", f"--coordinator=127.0.0.1:{free_port()}", "--processes=2"]
        parts = [
            subprocess.Popen([*command, f"--process={number}"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
            for number in range(2)
        ]
        texts = [part.communicate(timeout=300)[1] for part in parts]
        assert [part.returncode for part in parts] == [0, 0], texts
    assert "resumed from step 20" in texts[0]
    where = "--workdir=gs://mine/runs/two"
    assert json.loads(lslm(tmp_path, "verify", where).stdout)["checkpoints"] == [30, 40]
    assert json.loads(lslm(tmp_path, "audit", where).stdout)["starts"] == 2


def test_a_bucket_that_is_not_there_is_told_in_one_line(bucket, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    told = lslm(tmp_path, "--config=config.json", "--workdir=gs://other/runs/one", code=74).stderr
    assert told.startswith("lslm: cannot create gs://other/runs/one: ") and told.count("\n") == 1, told
