"""The whole way in real processes, as a user goes it: from raw text in files or TFDS to text that a model writes."""

import json
import math
import os
import pathlib
import re
import signal
import subprocess
import sys
import unittest.mock

import forked
import numpy as np
import pytest
from error_table import assert_told
from etils import epath

from lslm_jax.checkpoint import run_dir
from lslm_jax.config import loading
from lslm_jax.data import dataloader
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.main import main

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIBRARY = pathlib.Path(os.__file__).parent  # text that is always there
SUMMARY = {"step", "loss", "parameters", "attention", "tokens_per_second"}
EVALUATION = {"eval/loss", "eval/perplexity", "eval/bits_per_byte", "gzip_bits_per_byte"}
TINY = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 64},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": 20, "batch_size": 8},
    "log": {"tensorboard": False},
}
ABSENT = """
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
absent = lambda name, *rest: None if name.partition(".")[0] in {names} else find_spec(name, *rest)
PathFinder.find_spec = staticmethod(absent)
"""
OPTIONAL = {"tensorflow", "tensorflow_datasets", "clu", "tensorboard", "datasketch", "pyarrow", "array_record"}


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """One device, and every compiled program in the cache."""
    return os.environ | {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "XLA_FLAGS": forked.xla_flags()}


def checked(process: forked.Process | subprocess.CompletedProcess, code: int = 0):
    """A process that must have ended with this code, and without a traceback or warning."""
    assert process.returncode == code, process.stderr
    assert not any(word in process.stderr for word in ("Traceback", "Warning", "WARNING")), process.stderr
    return process


def lslm(environment: dict[str, str], *arguments: str, code: int = 0) -> forked.Process:
    """Runs a command in a forked process."""
    return checked(forked.run(*arguments, env=environment, cwd=ROOT, timeout=200), code)


def lslm_from_shell(environment: dict[str, str], *arguments: str, code: int = 0) -> subprocess.CompletedProcess:
    """Runs a command in a new process, as a user does: with imports of its own, and its own end."""
    command = [sys.executable, "-m", "lslm_jax.main", *arguments]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200)
    return checked(process, code)


@pytest.fixture
def lslm_here(capsys, monkeypatch):
    """lslm_here(argument, ...) runs a command in this process, which has eight devices and has imported TensorFlow."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: str) -> subprocess.CompletedProcess:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        return checked(subprocess.CompletedProcess(arguments, stop.value.code, *capsys.readouterr()))

    return run


def result_of(training: forked.Process | subprocess.CompletedProcess) -> dict:
    """The JSON that is all of a finished run's stdout."""
    assert training.stdout.count("\n") == 1
    result = json.loads(training.stdout)
    assert SUMMARY <= set(result)
    assert result["step"] == 20
    assert all(math.isfinite(value) for value in result.values() if isinstance(value, float))
    return result


# A small Llama on novels.


@pytest.fixture(scope="module")
def novels(shared, environment, tmp_path_factory) -> tuple[pathlib.Path, list[str], dict]:
    """A finished run: its directory, its flags, its result."""
    workdir, files = tmp_path_factory.mktemp("novels") / "run", shared / "lm" / "novels_en"
    arguments = [
        "--config=configs/novels.py:smoke",
        f"--config.data.files={files}/train.jsonl.gz",
        f"--config.data.valid_files={files}/valid.jsonl.gz",
        "--config.data.max_documents=20",
        "--config.eval.batches=0",
        "--config.log.tensorboard=false",  # importing TensorFlow takes 8 CPU seconds
    ]
    return workdir, arguments, result_of(lslm(environment, f"--workdir={workdir}", *arguments))


def test_a_run_ends_with_its_result_and_leaves_the_promised_files(novels):
    workdir, _, result = novels
    assert EVALUATION <= set(result)
    assert result["eval/loss"] < math.log(512)
    names = {path.name for path in workdir.iterdir()}
    texts = {"config.json", "metrics.jsonl", "result.json", "lock"}
    names -= {"evaluations"}  # of other tests
    assert names == texts | {"data", "checkpoints", "samples", "ledger"}
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"10", "20"}
    assert {path.name for path in (workdir / "samples").iterdir()} == {"10.txt", "20.txt"}
    assert (workdir / "checkpoints" / "20" / "manifest.json").exists()
    assert run_dir.read_result(epath.Path(workdir)) == result
    assert loading.load(f"{workdir}/config.json").model.vocab_size == 512


def test_a_finished_run_tells_its_result_again(novels, environment):
    workdir, arguments, result = novels
    again = lslm(environment, f"--workdir={workdir}", *arguments)
    assert json.loads(again.stdout) == result
    assert again.stderr == f"{workdir} is complete: all 20 steps are done (raise train.steps to go on)\n"
    changed = lslm(environment, f"--workdir={workdir}", *arguments, "--config.log.every=7")
    assert json.loads(changed.stdout) == result
    assert re.match(rf"settings changed since {workdir}: log.every \S+ -> 7\n", changed.stderr)
    assert_told("A setting that may change: the run says so, and goes on", 0, changed.stderr.splitlines()[0])
    other = lslm(environment, f"--workdir={workdir}", *arguments, "--config.seed=7", code=76)
    assert re.match(rf"lslm: {workdir} was made with seed=\d+, the config says 7\n", other.stderr)


def test_evaluation_of_a_checkpoint_gives_what_training_measured(novels, environment):
    workdir, _, result = novels
    now = json.loads(lslm(environment, "evaluate", f"--workdir={workdir}").stdout)
    measured = {name: now[name] for name in now if name not in ("split", "evaluation", "predictions")}
    assert measured == {name: result[name] for name in measured}
    assert set(measured) >= EVALUATION | {"step", "eval/examples"} and now["split"] == "valid"


@pytest.mark.parametrize(("dtype", "apart"), [("int8", 1e-3), pytest.param("int4", 5e-2, marks=pytest.mark.exhaustive)])
def test_weights_of_a_few_bits_say_nearly_what_training_measured(novels, environment, dtype, apart):
    workdir, _, result = novels
    now = json.loads(lslm(environment, "evaluate", f"--workdir={workdir}", f"--dtype={dtype}").stdout)
    assert 0 < abs(now["eval/loss"] / result["eval/loss"] - 1) < apart


def test_an_earlier_checkpoint_is_evaluated_by_its_step(novels, environment):
    workdir, _, _ = novels
    now = json.loads(lslm(environment, "evaluate", f"--workdir={workdir}", "--step=10").stdout)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    [then] = [line for line in lines if line["step"] == 10 and "eval/loss" in line]
    assert now == now | then


def test_a_streamed_text_and_one_of_a_batch_from_the_best_checkpoint_are_the_same(novels, environment, tmp_path):
    workdir, _, _ = novels
    prompts = ["It was a dark", "", "Caf\u00e9 \U0001f600"]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    batch = lslm(
        environment, "generate", f"--workdir={workdir}", f"--prompts={tmp_path}/prompts.jsonl", "--json", "--best"
    )
    lines = [json.loads(line) for line in batch.stdout.splitlines()]
    assert [line["prompt"] for line in lines] == prompts
    assert all(line["tokens"] <= 16 and line["step"] == 20 for line in lines)
    assert {line["ended"] for line in lines} <= {"eos", "length"}
    streamed = lslm(environment, "generate", f"--workdir={workdir}", f"--prompt={prompts[0]}")
    assert streamed.stdout == prompts[0] + lines[0]["text"] + "\n"


def test_a_prompt_longer_than_the_model_is_refused_before_it_is_echoed(novels, environment):
    process = lslm(environment, "generate", f"--workdir={novels[0]}", f"--prompt={'word ' * 200}", code=2)
    assert process.stdout == "" and process.stderr.count("\n") == 1
    assert "model.max_length=128 leaves room to continue at most 127" in process.stderr


def test_ctrl_c_before_there_is_anything_to_save_ends_without_a_traceback(environment, tmp_path):
    command = [sys.executable, "-m", "lslm_jax.main", "prepare", "--config=configs/quickstart.py:smoke"]
    process = subprocess.Popen(
        [*command, f"--workdir={tmp_path}"], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    assert any(line.startswith("prepare: training a vocabulary") for line in iter(process.stderr.readline, ""))
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=100)[1].splitlines()[-1] == "lslm: interrupted"
    assert process.returncode == 130


# TFDS, prepared offline.


@pytest.fixture(scope="module")
def lm1b(tmp_path_factory) -> dict[str, pathlib.Path]:
    """The real lm1b builder on a few files in the layout of the real archive: a data_dir of each file format."""
    tfds = pytest.importorskip("tensorflow_datasets")
    raw = tmp_path_factory.mktemp("raw")
    root = raw / "1-billion-word-language-modeling-benchmark-r13output"
    for part, name, module in [
        ("training", "news.en-00001-of-00100", "argparse.py"),
        ("heldout", "news.en.heldout-00001-of-00050", "textwrap.py"),
    ]:
        folder = root / f"{part}-monolingual.tokenized.shuffled"
        folder.mkdir(parents=True)
        (folder / name).write_bytes((LIBRARY / module).read_bytes())
    data_dirs = {name: tmp_path_factory.mktemp(name) for name in ("tfrecord", "array_record")}
    download = unittest.mock.patch.object(
        tfds.download.DownloadManager, "download_and_extract", lambda self, url: str(raw)
    )
    with download:
        for file_format, data_dir in data_dirs.items():
            builder = tfds.builder("lm1b", data_dir=data_dir, file_format=file_format)
            builder.download_and_prepare(file_format=file_format)
    return data_dirs


@pytest.mark.slow
def test_a_tfds_benchmark_is_prepared_from_either_file_format_and_trained_on(lm1b, lslm_here, tmp_path):
    config, key = "--config=configs/lm1b.py:smoke", "--config.data.data_dir"
    for name, data_dir in lm1b.items():
        prepared = lslm_here("prepare", config, f"--workdir={tmp_path}/{name}", f"{key}={data_dir}")
        counts = json.loads(prepared.stdout)
        assert counts["vocab_size"] == 512 and not counts["skipped"]
        # The smoke config reads 300 documents of each split; empty and repeated ones are dropped.
        assert counts["documents"] + sum(counts["dropped"].values()) == 600
        assert set(counts["splits"]) == {"train", "valid"}
    flags = [f"--workdir={tmp_path}/tfrecord", f"{key}={lm1b['tfrecord']}", "--config.generate.prompts="]
    result = result_of(lslm_here(config, *flags))
    assert list((tmp_path / "tfrecord" / "tensorboard").glob("events.*"))
    assert EVALUATION <= set(result)


@pytest.mark.slow
def test_ones_own_tfds_data_set_is_trained_on(lslm_here, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")

    class TidyLines(tfds.core.GeneratorBasedBuilder):
        """Lines of a module."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict({"line": tfds.features.Text()})
            )

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield from enumerate({"line": line} for line in (LIBRARY / "textwrap.py").read_text().splitlines())

    TidyLines(data_dir=tmp_path / "tfds").download_and_prepare()
    data = {"source": "tfds", "tfds": "tidy_lines", "data_dir": str(tmp_path / "tfds"), "text_key": "line"}
    splits = {"split": "train[:90%]", "valid_split": "train[90%:]", "seq_len": 64}
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"data": data | splits}))
    result = result_of(lslm_here(f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"))
    assert EVALUATION <= set(result)


# Several sources; few packages.


def test_a_mixture_draws_from_each_source_by_its_weight(lslm_here, tmp_path):
    for name, letters in [("low", "abcdef"), ("high", "UVWXYZ")]:
        draw = np.random.default_rng(0).choice(list(letters), size=(300, 200))
        (tmp_path / f"{name}.txt").write_text("".join("".join(row) + "\n" for row in draw))
    sources = [
        {"name": name, "weight": weight, "files": [f"{tmp_path}/{name}.txt"], "document": "line", "valid_fraction": 0.1}
        for name, weight in [("low", 3.0), ("high", 1.0)]
    ]
    (tmp_path / "config.json").write_text(json.dumps(TINY | {"data": {"mixture": sources, "seq_len": 64}}))
    result = result_of(lslm_here(f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"))
    assert EVALUATION <= set(result)

    data_dir, config = tmp_path / "run" / "data", loading.load(f"{tmp_path}/run/config.json")
    words = load_tokenizer(data_dir / json.loads((data_dir / "manifest.json").read_text())["tokenizer"]["file"])
    data = dataloader.open_train(config, data_dir, config.model.vocab_size)
    rows = [words.decode(ids).strip() for step in range(20) for ids in data.batch(step).tokens_BT]
    low, high = (sum(set(row) <= set(letters) for row in rows) for letters in ("abcdef", "UVWXYZ"))
    assert low + high == len(rows) == 160
    assert low == pytest.approx(120, abs=2)


@pytest.fixture
def bare(environment, tmp_path) -> dict[str, str]:
    """An environment where the packages that only reading and displaying need are not installed."""
    (tmp_path / "sitecustomize.py").write_text(ABSENT.format(names=OPTIONAL))
    return environment | {"PYTHONPATH": str(tmp_path)}


def test_prepared_data_are_trained_on_without_tensorflow(novels, bare, tmp_path):
    workdir, arguments, result = novels
    shards = ["--config.data.source=shards", f"--config.data.dir={workdir}/data", "--config.data.valid_files="]
    shards += ["--config.log.tensorboard=true"]
    again = result_of(lslm_from_shell(bare, f"--workdir={tmp_path}/run", *arguments, *shards))
    assert again["loss"] == result["loss"]
    assert again["eval/loss"] == result["eval/loss"]


@pytest.mark.parametrize("optimized", [False, pytest.param(True, marks=pytest.mark.exhaustive)])
def test_random_tokens_are_trained_on_without_tensorflow(bare, tmp_path, optimized):
    """In the long form at XLA's own optimization level, as a user trains."""
    environment = bare | ({"XLA_FLAGS": ""} if optimized else {})
    training = lslm_from_shell(environment, f"--workdir={tmp_path}/run", "--config=configs/llama_1b.py:smoke")
    result = result_of(training)
    assert "eval/loss" not in result


@pytest.mark.slow
@pytest.mark.parametrize("forking", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
def test_the_script_for_a_laptop_goes_the_whole_way(environment, tmp_path, forking):
    """In the short form its commands run in forked processes, with a smaller model and without a trained vocabulary."""
    python, record = tmp_path / "python", tmp_path / "commands"
    if forking:
        python.write_text(f"#!/bin/sh\nprintf '%s\\0' \"$@\" >> {record}\nprintf '\\n' >> {record}\n")
    else:
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    script = checked(
        subprocess.run(
            [ROOT / "launch" / "cpu.sh", "run"],
            cwd=tmp_path,
            env=environment | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=280,
        )
    )
    outputs = script.stdout
    if forking:
        small = ["--config.log.tensorboard=false", "--config.tokenizer.kind=bytes"]
        small += ["--config.model.num_layers=1", "--config.model.d_model=32", "--config.model.num_heads=2"]
        for line in record.read_text().splitlines():
            module, name, *arguments = line.split("\0")[:-1]
            assert (module, name) == ("-m", "lslm_jax.main")
            first = arguments[0] in ("prepare", "train")
            outputs += lslm(environment, *arguments, *(small if first else [])).stdout
    prepared, result, evaluated, *text = outputs.removesuffix("\n").split("\n")
    assert json.loads(prepared)["documents"] > 100
    assert json.loads(result)["step"] == json.loads(evaluated)["step"] == 20
    assert text[0].startswith("import os")
    assert [json.loads(line)["prompt"] for line in text[-2:]] == ["def main():", "class Stack:"]
