"""The loop: what a run leaves behind, what it waits for, when it compiles, and how it ends."""

import contextlib
import errno
import io
import json
import os
import pathlib
import shutil
import signal
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from jax._src.array import ArrayImpl

from lslm_jax.checkpoint import checkpoint, provenance, run_dir
from lslm_jax.checkpoint.checkpoint import Checkpoints
from lslm_jax.config import CheckpointConfig, Config, DataConfig, EvalConfig, LogConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data import prefetch
from lslm_jax.data.dataloader import SyntheticInput
from lslm_jax.errors import DataError, NumericAbort, Preempted
from lslm_jax.evaluate.types import Report
from lslm_jax.main import main
from lslm_jax.models import attention
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.resilience import data_ledger
from lslm_jax.runtime import atomic_io
from lslm_jax.train import loop, setup
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state, init_state

pytestmark = pytest.mark.usefixtures("one_device")

STEPS, EVERY = 12, 4
RUN = {
    "model": {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 32},
    "data": {"document": "line", "valid_fraction": 0.1, "seq_len": 32},
    "tokenizer": {"kind": "bytes"},
    "train": {"steps": STEPS, "batch_size": 8, "ema": 0.9},
    "optimizer": {"learning_rate": 0.01, "warmup_steps": 2},
    "checkpoint": {"every": EVERY, "best": "eval/loss"},
    "eval": {"every": EVERY, "batches": 2},
    "generate": {"prompts": ["Line", "of a"], "max_tokens": 4},
    "log": {"every": 1},
}
COMPILATION = "/jax/core/compile/backend_compile_duration"


def command(root: pathlib.Path, verb: str, *more: str) -> dict:
    """Runs a command in this process, which must succeed; returns the JSON that it ends with."""
    flags = [f"--config={root}/config.json", f"--workdir={root}/work"]
    stdout = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stdout(stdout):
        main([verb, *flags, *more])
    assert stop.value.code == 0
    return json.loads(stdout.getvalue().splitlines()[-1])


def lines_of(workdir: pathlib.Path) -> list[dict]:
    path = workdir / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def compilations(workdir: pathlib.Path):
    """A list of what was the last line of metrics.jsonl at each compilation."""
    seen = []

    def listen(event: str, *_: object, **__: object) -> None:
        if event == COMPILATION:
            seen.append(lines_of(workdir)[-1:])

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run: its directory, its result, and when it compiled."""
    root = tmp_path_factory.mktemp("run")
    text = "".join(f"Line {n} of a corpus that is long enough to train on for a few steps.\n" for n in range(400))
    (root / "corpus.txt").write_text(text)
    data = RUN["data"] | {"files": [f"{root}/corpus.txt"]}
    (root / "config.json").write_text(json.dumps(RUN | {"data": data}))
    with compilations(root / "work") as compiled:
        result = command(root, "train")
    return root, result, compiled


@pytest.fixture
def run(finished, tmp_path) -> pathlib.Path:
    """A copy of the finished run."""
    return pathlib.Path(shutil.copytree(finished[0], tmp_path / "run"))


def test_a_run_leaves_the_files_of_the_contract(finished):
    work = finished[0] / "work"
    names = {
        "checkpoints",
        "config.json",
        "data",
        "lock",
        "ledger",
        "metrics.jsonl",
        "result.json",
        "samples",
        "tensorboard",
    }
    assert {path.name for path in work.iterdir()} == names
    assert json.loads((work / "config.json").read_text())["model"]["vocab_size"] == 259
    assert checkpoint.list_steps(work / "checkpoints") == [STEPS - EVERY, STEPS]
    samples = [f"{step}.txt" for step in range(EVERY, STEPS + 1, EVERY)]
    assert {path.name for path in (work / "samples").iterdir()} == set(samples)
    assert all((work / "samples" / name).read_text().startswith("--- Line") for name in samples)
    assert list((work / "tensorboard").glob("events.out.tfevents.*"))
    assert not list(work.rglob("*.tmp"))


def test_metrics_hold_a_line_for_each_step_and_each_evaluation(finished):
    lines = lines_of(finished[0] / "work")
    train, evaluation = ([line for line in lines if ("eval/loss" in line) == held_out] for held_out in (False, True))
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    assert [line["step"] for line in evaluation] == list(range(EVERY, STEPS + 1, EVERY))
    assert train[-1]["loss"] < train[0]["loss"]
    always = {"step", "loss", "grad_norm", "learning_rate", "tokens", "skipped", "epoch"}
    assert all(line.keys() == always | {"tokens_per_second", "step_seconds", "data_wait"} for line in train[1:])
    assert train[0].keys() == always  # most of that step's time is compilation
    names = {"step", *(f"eval/{name}" for name in ("loss", "perplexity", "bits_per_byte", "accuracy", "tokens"))}
    assert all(line.keys() == names for line in evaluation)


def test_the_result_is_that_of_the_last_line(finished):
    root, result, _ = finished
    train, evaluation = lines_of(root / "work")[-2:]
    assert result["step"] == STEPS and result["parameters"] > 10_000
    assert result.items() >= {name: train[name] for name in ("loss", "grad_norm", "learning_rate")}.items()
    assert result.items() >= {name: value for name, value in evaluation.items() if name != "step"}.items()
    assert result["tokens_per_second"] > 0 and result["gzip_bits_per_byte"] > 0 and result["mfu"] is None
    assert run_dir.read_result(epath.Path(root / "work")) == result


def test_nothing_is_compiled_after_the_first_evaluation(finished):
    later = {line[0]["step"] for line in finished[2] if line}
    assert later <= {1, EVERY}, "steps whose metrics were the last to be recorded when something was compiled"


def test_evaluation_uses_the_averaged_weights(finished, run):
    result = finished[1]
    again = command(run, "evaluate", f"--config.eval.batches={RUN['eval']['batches']}")
    assert again["step"] == STEPS and again["eval/loss"] == result["eval/loss"]
    directory = run / f"work/checkpoints/{STEPS}"
    (directory / "manifest.json").unlink()
    shutil.rmtree(directory / "ema")  # what is left are the weights themselves
    assert abs(command(run, "evaluate")["eval/loss"] - result["eval/loss"]) > 1e-3


def test_a_finished_run_costs_no_training_and_ends_with_the_same_line(finished, run):
    before = (run / "work/metrics.jsonl").read_bytes()
    with compilations(run / "work") as compiled:
        assert command(run, "train") == finished[1]
    assert compiled == [] and (run / "work/metrics.jsonl").read_bytes() == before


def test_a_run_killed_between_its_last_save_and_its_result_records_nothing_twice(finished, run):
    before = (run / "work/metrics.jsonl").read_bytes()
    (run / "work/result.json").unlink()
    result = command(run, "train")
    assert {name: result[name] for name in result if name.startswith("eval/")}.items() <= finished[1].items()
    assert result["step"] == STEPS and (run / "work/metrics.jsonl").read_bytes() == before


def test_more_steps_go_on_from_the_end(finished, run):
    before, old = (run / "work/metrics.jsonl").read_text(), (run / "work/result.json").read_text()
    more = f"--config.train.steps={STEPS + 2}"
    result = command(run, "train", more, "--config.log.tensorboard=false")
    after = (run / "work/metrics.jsonl").read_text()
    assert result["step"] == STEPS + 2 and after.startswith(before)
    assert [line["step"] for line in lines_of(run / "work")][-3:] == [STEPS + 1, STEPS + 2, STEPS + 2]
    (run / "work/result.json").write_text(old)  # killed before the new one was written
    again = command(run, "train", more, "--config.log.tensorboard=false")
    assert again["step"] == STEPS + 2 and again["eval/loss"] == result["eval/loss"]


def failing(root: pathlib.Path, verb: str, *more: str) -> tuple[int, str]:
    """Runs a command that must fail; returns its exit code and the last line on stderr."""
    flags = [f"--config={root}/config.json"] * (verb != "verify") + [f"--workdir={root}/work"]
    stderr = io.StringIO()
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(stderr):
        main([verb, *flags, *more])
    assert stop.value.code and "Traceback" not in stderr.getvalue()
    return stop.value.code, stderr.getvalue().strip().splitlines()[-1]


def test_a_record_that_was_altered_is_named_and_an_empty_result_is_none(run, capsys):
    path = run / "work/metrics.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-2]))
    (run / "work/result.json").write_text("")
    assert command(run, "train")["step"] == STEPS
    text = capsys.readouterr().err
    assert "result.json is not JSON" in text and "lacks 2 of the 15 lines after step 11 that it had" in text


def test_a_data_manifest_whose_meaning_was_altered_is_refused_by_every_command(run):
    path = run / "work/data/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["tokenizer"]["eos_id"] = 7
    path.write_text(json.dumps(manifest))
    (run / "work/result.json").unlink()
    for verb in ("train", "verify", "evaluate", "generate", "audit"):
        code, line = failing(run, verb, *["--prompt=a"] * (verb == "generate"))
        assert code == 65 and "manifest" in line, (verb, line)


def test_a_tokenizer_file_that_was_altered_is_refused(run):
    data = run / "work/data"
    path = data / json.loads((data / "manifest.json").read_text())["tokenizer"]["file"]
    path.write_text(path.read_text() + " ")
    (run / "work/result.json").unlink()
    for verb in ("train", "verify"):
        code, line = failing(run, verb)
        assert code == 65 and "altered: its sha256 is not the one in" in line, (verb, line)


def test_a_setting_of_the_model_that_is_not_the_checkpoints_is_refused(run):
    for verb in ("evaluate", "generate"):
        more = ["--prompt=a"] * (verb == "generate")
        code, line = failing(run, verb, "--config.model.activation=relu", *more)
        assert code == 76 and "made with model.activation=gelu, the config says relu" in line


def test_a_run_goes_back_to_a_chosen_step_once_and_comes_to_the_same_end(finished, run, capsys):
    code, line = failing(run, "train", "--config.train.resume_from=3")
    assert code == 66 and f"no such checkpoint in {run}/work/checkpoints; there are [8, 12]" in line
    back = f"--config.train.resume_from={STEPS - EVERY}"
    result = command(run, "train", back)
    assert "going back to step 8: step 12 is set aside in" in capsys.readouterr().err
    assert [path.name.split("-")[0] for path in (run / "work/set_aside").iterdir()] == ["12"]
    assert (result["loss"], result["eval/loss"]) == (finished[1]["loss"], finished[1]["eval/loss"])
    assert command(run, "train", back) == result and "is complete" in capsys.readouterr().err
    assert command(run, "audit")["repeated_steps"] == EVERY


def test_another_batch_size_goes_on_at_the_next_row(run, capsys):
    more = [f"--config.train.steps={STEPS + 2}", "--config.train.batch_size=16"]
    assert command(run, "train", *more)["step"] == STEPS + 2
    rows = STEPS * RUN["train"]["batch_size"]
    assert (
        f"train.batch_size 8 -> 16: step {STEPS + 1} continues at row {rows} of the data order"
        in capsys.readouterr().err
    )
    audited = command(run, "audit", *more)
    assert audited["steps"] == STEPS + 2
    last = lines_of(run / "work")[-2]
    assert last["epoch"] == pytest.approx(audited["epochs"][0], abs=1e-5)


def test_a_run_on_a_read_only_disk_is_evaluated(finished, run, monkeypatch, capsys):
    open_plain, access = atomic_io.open_plain, os.access
    is_read_only = lambda path: epath.Path(path).is_relative_to(run)

    def open_elsewhere(path, *rest):
        if is_read_only(path):
            raise OSError(errno.EROFS, "Read-only file system")
        return open_plain(path, *rest)

    refuses = lambda path, mode: mode == os.W_OK and is_read_only(path)
    monkeypatch.setattr(os, "access", lambda path, mode: not refuses(path, mode) and access(path, mode))
    monkeypatch.setattr(atomic_io, "open_plain", open_elsewhere)
    again = command(run, "evaluate", f"--config.eval.batches={RUN['eval']['batches']}")
    assert again["eval/loss"] == finished[1]["eval/loss"]


SYNTHETIC = Config(
    model=ModelConfig(num_layers=1, d_model=32, num_heads=2, vocab_size=61, max_length=16),
    data=DataConfig(source="synthetic", seq_len=16),
    train=TrainConfig(steps=20, batch_size=8),
    checkpoint=CheckpointConfig(every=1000, keep=10),
    eval=EvalConfig(every=0),
    log=LogConfig(every=1000, tensorboard=False, timing=False),
)


def configured(**sections) -> Config:
    return validate(
        replace(SYNTHETIC, **{name: replace(getattr(SYNTHETIC, name), **keys) for name, keys in sections.items()})
    )


class Poisoned(SyntheticInput):
    """Random tokens, some of whose weights are not a number at the training steps `bad`."""

    bad = ()

    def batch(self, step):
        batch = super().batch(step)
        if step + 1 in self.bad:
            batch.weights_BT[3, 4] = np.nan
        return batch


def train(config, workdir, bad=(), evaluate=None):
    """The loop itself, on random tokens and one device."""
    mesh = make_mesh(config, jax.devices()[:1])
    data = Poisoned(config, config.model.vocab_size)
    data.bad = bad
    with jax.set_mesh(mesh):
        checkpoints = Checkpoints(epath.Path(workdir), config.checkpoint, provenance.make(config, "", "", mesh))
        arguments = (config, epath.Path(workdir), mesh, data, attention.XLA, checkpoints)
        return loop.train(*arguments, evaluate=evaluate, sample=None)


def restored(config, workdir, step):
    mesh = make_mesh(config, jax.devices()[:1])
    run = Checkpoints(epath.Path(workdir), config.checkpoint, provenance.make(config, "", "", mesh))
    optimizer = make_optimizer(config.optimizer, config.train.steps)
    return run.restore(step, abstract_state(config, optimizer, mesh), print)


class Watch:
    """Notes, in their order, the steps that are dispatched and the arrays that the host reads."""

    def __init__(self, monkeypatch):
        self.events, self.made_by = [], {}
        self._compile = setup._compile
        monkeypatch.setattr(setup, "_compile", self.compile)
        real = ArrayImpl._value
        monkeypatch.setattr(ArrayImpl, "_value", property(lambda array: (self.read(array), real.fget(array))[1]))
        for name in ("__array__", "item", "tolist", "block_until_ready"):
            monkeypatch.setattr(ArrayImpl, name, self.reader(getattr(ArrayImpl, name)))

    def reader(self, method):
        return lambda array, *args, **kwargs: (self.read(array), method(array, *args, **kwargs))[1]

    def read(self, array):
        self.events.append(("read", self.made_by.get(id(array), (None,))[0]))

    def compile(self, *args):
        compiled = self._compile(*args)

        def step(state, batch):
            number = len([event for event in self.events if event[0] == "dispatched"]) + 1
            self.events.append(("dispatched", number))
            state, metrics = compiled(state, batch)
            self.made_by |= {id(array): (number, array) for array in metrics.values()}  # held, so that ids stay theirs
            return state, metrics

        return step


def test_metrics_are_read_one_step_late_and_nothing_else_waits_for_the_device(tmp_path, monkeypatch):
    watch = Watch(monkeypatch)
    train(configured(), tmp_path)
    begin = watch.events.index(("dispatched", 1))
    end = watch.events.index(("dispatched", 20))
    order = list(dict.fromkeys(watch.events[begin : end + 1]))
    expected = [("dispatched", 1)]
    for number in range(2, 21):
        expected += [("dispatched", number), ("read", number - 1)]
    assert order == expected[:-1]
    reads = [step for event, step in watch.events[begin:end] if event == "read"]
    assert reads.count(5) == reads.count(15) and set(reads) == set(range(1, 19))


def test_fewer_than_five_bad_steps_in_a_row_are_skipped_logged_and_passed_over(tmp_path, capsys):
    result = train(configured(), tmp_path, bad=(4, 7, 8, 9, 10, 12, 13, 14, 15))
    assert np.isfinite(result["loss"]) and result["step"] == 20
    lines = lines_of(tmp_path)
    skipped = {4: 1, 7: 1, 8: 2, 9: 3, 10: 4, 12: 1, 13: 2, 14: 3, 15: 4, 20: 0}
    assert {line["step"]: line["skipped"] for line in lines} == skipped
    assert [line["loss"] for line in lines] == ["NaN"] * 9 + [result["loss"]]
    assert lines[0].keys() == {"step", *loop.METRICS, "epoch"}  # nothing timed
    assert "step 8: loss or gradient is not finite, update skipped (2 in a row)\n" in capsys.readouterr().err


def test_five_bad_steps_in_a_row_end_the_run_and_spare_its_checkpoints(tmp_path):
    config = configured(checkpoint={"every": 5})
    message = "^loss or gradient was not finite in 5 steps in a row, up to step 11$"
    with pytest.raises(NumericAbort, match=message) as error:
        train(config, tmp_path, bad=range(7, 20))
    assert error.value.exit_code == 70
    assert [(line["step"], line["skipped"]) for line in lines_of(tmp_path)] == [(6 + n, n) for n in range(1, 6)]
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [5, 10]
    for step, skipped in ((5, 0), (10, 4)):
        state = restored(config, tmp_path, step)
        assert (state.step, state.skipped) == (step, skipped)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.model, state.optimizer)))


def test_a_signal_during_an_evaluation_is_obeyed_after_the_next_step_is_saved(tmp_path):
    evaluations = []

    def evaluate(model):
        if not evaluations:
            signal.raise_signal(signal.SIGTERM)
        evaluations.append(1)
        return Report({"loss": 1.0}, {"notes.txt": "all well"}, {"signature": "by hand"})

    config = configured(eval={"every": 4}, checkpoint={"best": "eval/loss"})
    with pytest.raises(Preempted, match=r"^SIGTERM: step 5 is saved; the same command goes on from there$") as error:
        train(config, tmp_path, evaluate=evaluate)
    assert error.value.exit_code == 75
    assert checkpoint.list_steps(tmp_path / "checkpoints") == [5]
    assert (tmp_path / "checkpoints/5/manifest.json").exists()
    result = train(config, tmp_path, evaluate=evaluate)
    assert (result["step"], result["eval/loss"], result["eval/signature"]) == (20, 1.0, "by hand")
    assert (tmp_path / "samples/20-notes.txt").read_text() == "all well"
    assert [line["step"] for line in lines_of(tmp_path)] == [4, 8, 12, 16, 20, 20]


def twice(make_batch, start, stop, **_):
    """A loader that hands out each batch twice."""
    yield from (make_batch(step // 2) for step in range(start, stop))


def test_the_ledger_holds_what_was_trained_on_and_not_what_was_due(tmp_path, monkeypatch):
    monkeypatch.setattr(prefetch, "batches", twice)
    config = configured(train={"steps": 6})
    train(config, tmp_path)
    data = SyntheticInput(config, config.model.vocab_size)
    with pytest.raises(DataError, match="steps 1 to 6 trained on other arrays than their rows make"):
        data_ledger.audit(epath.Path(tmp_path), data, 8)


@pytest.mark.exhaustive
def test_updates_that_are_skipped_are_counted_over_all_starts(tmp_path):
    config = configured(checkpoint={"every": 10})
    with pytest.raises(NumericAbort):
        train(config, tmp_path, bad=(4, 7, 8, 12, 13, 14, 15, 16))
    assert train(config, tmp_path, bad=(4, 7, 8, 12, 13))["skipped_steps"] == 5


def distance(one, other):
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(a) - np.asarray(b)) ** 2) for a, b in pairs)))


@pytest.mark.exhaustive
def test_an_average_that_is_switched_on_later_begins_with_the_weights_of_that_step(tmp_path, capsys):
    config = configured(train={"steps": 10}, checkpoint={"every": 10})
    train(config, tmp_path)
    averaged = configured(train={"steps": 12, "ema": 0.999}, checkpoint={"every": 1})
    train(averaged, tmp_path)
    assert (
        "10 has no averaged weights: the average (train.ema) begins with the weights of step 10"
        in capsys.readouterr().err
    )
    before, after = (restored(configured(train={"ema": 0.999}), tmp_path, step) for step in (10, 11))
    decay = 11 / 20  # of the eleventh step
    expected = jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, before.ema, after.model)
    assert distance(after.ema, expected) < 1e-6 < distance(before.model, after.model)


def test_a_short_run_with_a_long_average_is_judged_by_weights_near_its_own(tmp_path):
    config = configured(train={"steps": 60, "ema": 0.999}, optimizer={"learning_rate": 0.01, "warmup_steps": 0})
    config = validate(replace(config, checkpoint=replace(config.checkpoint, every=60)))
    train(config, tmp_path)
    state = restored(config, tmp_path, 60)
    fresh = init_state(config, make_optimizer(config.optimizer, 60), make_mesh(config, jax.devices()[:1]))
    assert distance(state.ema, state.model) < 0.3 * distance(fresh.model, state.model)
