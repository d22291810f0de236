"""A run goes round a loss spike, the same way every time, and its ledger tells."""

import contextlib
import io
import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
from error_table import assert_told
from etils import epath

from lslm_jax.checkpoint import checkpoint, integrity
from lslm_jax.cli import commands
from lslm_jax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    TokenizerConfig,
    TrainConfig,
)
from lslm_jax.config.validation import validate
from lslm_jax.data import dataloader, skipped_batches
from lslm_jax.data.skipped_batches import Detour, at, extend
from lslm_jax.data.synthetic_data import SyntheticInput
from lslm_jax.errors import CheckpointRefused, DataError, NumericAbort
from lslm_jax.resilience import loss_spikes
from lslm_jax.resilience.loss_spikes import Detector, Spike

CONFIG = validate(
    Config(
        model=ModelConfig(num_layers=1, d_model=32, num_heads=2, vocab_size=61, max_length=16),
        data=DataConfig(source="synthetic", seq_len=16),
        tokenizer=TokenizerConfig(vocab_size=61),
        train=TrainConfig(steps=60, batch_size=8, spike=6.0, spike_steps=2),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
        checkpoint=CheckpointConfig(every=10, keep=3),
        eval=EvalConfig(every=0),
        log=LogConfig(every=1, tensorboard=False, timing=False),
    )
)
BAD = range(46, 50)  # batches, from 0: they are read in steps 47 to 50


class Spoilt(SyntheticInput):
    """The same few tokens again and again, which are soon learnt; but noise in some batches."""

    bad = BAD

    def batch(self, step):
        batch = super().batch(step)
        if step in self.bad:
            return batch
        return batch._replace(tokens_BT=batch.tokens_BT % 2, targets_BT=batch.targets_BT % 2)


@pytest.fixture(scope="module", autouse=True)
def spoilt(one_device):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataloader, "open_train", lambda config, directory, *rest: Spoilt(config, *rest))
        yield


class Flags:
    """Of the command line."""

    def __init__(self, workdir):
        self.workdir = str(workdir)


def run(workdir, config=CONFIG):
    return commands.train(config, Flags(workdir))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that went round a spike, and what it said."""
    workdir, said = tmp_path_factory.mktemp("finished"), io.StringIO()
    with contextlib.redirect_stderr(said):
        assert run(workdir)["step"] == 60
    return workdir, said.getvalue()


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def test_a_run_goes_back_before_a_spike_and_leaves_its_batches_out(finished):
    workdir, said = finished
    assert "in step 48 as in all since 47: going back to step 40, without the 8 batches that came after it" in said
    # What was left of the noise came first then: that is a spike as well, with no checkpoint from long enough before.
    assert "in step 42 as in all since 41: going back to step 30, without the 20 batches that came after it" in said
    assert skipped_batches.read(epath.Path(workdir)) == [Detour(30, 20)]
    found = losses(workdir)
    assert list(found) == list(range(1, 61)) and max(list(found.values())[30:]) < 1
    audited = commands.audit(CONFIG, Flags(workdir))
    assert (audited["steps"], audited["repeated_steps"], audited["batches_left_out"]) == (60, 8 + 12, 20)


def test_a_new_run_that_finds_the_detours_takes_the_same_way_bit_for_bit(finished, tmp_path):
    shutil.copy(finished[0] / "detours.json", tmp_path)
    run(tmp_path)
    assert losses(tmp_path) == losses(finished[0])


def test_without_a_checkpoint_from_before_the_run_ends(tmp_path):
    spike = Spike(67, 68, 0.7, 5.0)
    with pytest.raises(NumericAbort, match=r"since 67; no checkpoint from before is left .*: raise checkpoint\.keep"):
        loss_spikes.go_round(epath.Path(tmp_path), CONFIG, spike)
    told = loss_spikes.go_round(epath.Path(tmp_path), CONFIG, Spike(7, 8, 0.7, 5.0))  # none was due yet
    assert told.endswith("going back to step 0, without the 8 batches that came after it")


def test_a_spike_that_comes_again_however_much_is_left_out_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Spoilt, "bad", range(46, 10_000))
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, keep=1))
    with pytest.raises(NumericAbort, match="leaving out batches after step 40 did not help, 5 times") as error:
        run(tmp_path, config)
    assert_told("A loss spike that comes again (`train.spike`)", error.value.exit_code, str(error.value))


def test_a_kill_while_going_back_leaves_no_checkpoint_of_the_way_that_was_left(tmp_path, monkeypatch):
    workdir = epath.Path(tmp_path)
    config = replace(CONFIG, checkpoint=replace(CONFIG.checkpoint, every=4))
    with monkeypatch.context() as patch:
        patch.setattr(integrity, "discard", lambda path: 1 / 0)  # killed here
        with pytest.raises(ZeroDivisionError):
            run(tmp_path, config)
    assert checkpoint.list_steps(workdir / "checkpoints")[-1] == 44 and skipped_batches.back_to(workdir) == 40
    assert run(tmp_path, config)["step"] == 60
    assert skipped_batches.back_to(workdir) is None and skipped_batches.read(workdir) == [Detour(40, 10)]


def test_a_run_whose_detours_were_changed_is_refused(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "detours.json").unlink()
    more = replace(CONFIG, train=replace(CONFIG.train, steps=70))
    with pytest.raises(CheckpointRefused, match=r"left out other batches \(\[\[30, 20\]\], now \[\]\)"):
        run(tmp_path, more)
    (tmp_path / "detours.json").write_text('{"detours": [60]}')
    with pytest.raises(DataError, match="does not hold detours"):
        run(tmp_path, more)


def test_what_is_far_above_the_usual_for_long_enough_is_a_spike():
    rng = np.random.default_rng(0)
    usual = iter(rng.normal(3.0, 0.1, 10_000))
    detector = Detector(5.0, 4)
    for step in range(1, 1001):
        detector.add(step, next(usual))
    for step, loss in enumerate([4.0, 4.0, 4.0, 3.0, 3.0, 3.0, 3.0, 3.0, math.nan, 4.0, 4.0, 4.0], 1001):
        detector.add(step, loss)  # three in a row; three later, after a step that was skipped
    with pytest.raises(Spike, match=r"^the loss was about 2\.97\d and is 4.000, in step 1013 as in all since 1010$"):
        detector.add(1013, 4.0)


def detected(losses, deviations=6.0, steps=10):
    """The step at which a spike is found in a series of losses; None for none."""
    detector = Detector(deviations, steps)
    for step, loss in enumerate(losses, 1):
        try:
            detector.add(step, loss)
        except Spike:
            return step
    return None


def around(mean, count, seed=0):
    return list(np.random.default_rng(seed).normal(mean, 0.1, count))


@pytest.mark.parametrize(
    ("kind", "losses", "window"),
    [
        ("a slow drift", around(3.0, 200) + [3.0 + 0.03 * n for n in range(4000)], (200, 500)),
        ("an exponential drift", around(3.0, 200) + [3.0 * 1.01**n for n in range(370)], (200, 400)),
        ("every second step", around(3.0, 200) + [9.0, 3.0] * 50, (200, 230)),
        ("nine steps of ten", around(3.0, 200) + ([9.0] * 9 + [3.0]) * 5, (209, 215)),
        ("soon after the start", list(np.linspace(8.0, 6.0, 40)) + [30.0] * 20, (49, 51)),
    ],
)
def test_a_rise_that_is_no_plain_jump_is_a_spike(kind, losses, window):
    found = detected(losses)
    assert found and window[0] <= found <= window[1], (kind, found)


@pytest.mark.parametrize(
    "losses",
    [
        around(3.0, 5000),
        [3.0] * 200 + [3.02] * 50,  # of losses that were all equal, any other one is no spike
        [2.0 + 6.0 * math.exp(-n / 100) for n in range(3000)],
    ],
)
def test_noise_and_a_falling_loss_are_no_spike(losses):
    assert detected(losses) is None


@pytest.mark.parametrize("deviations, losses", [(0.0, [1.0] * 200 + [9.0] * 50), (3.0, [1.0] * 7 + [9.0] * 50)])
def test_nothing_is_a_spike_where_none_is_asked_for_or_too_little_is_known(deviations, losses):
    detector = Detector(deviations, 4)
    for step, loss in enumerate(losses):
        detector.add(step, loss)


def test_detours_add_up_and_those_of_a_way_that_was_left_are_part_of_the_new_one():
    one = extend([], 60, 69)
    assert one == [Detour(60, 9)] and [at(step, one) for step in (59, 60, 61)] == [59, 69, 70]
    again = extend(one, 60, 75)  # batches 69 to 83 are left out as well
    assert again == [Detour(60, 24, 2)] and at(60, again) == 84
    further = extend(again, 40, 63)
    assert further == [Detour(40, 47)] and at(40, further) == at(63, again)
    later = extend(again, 80, 90)
    assert later == [Detour(60, 24, 2), Detour(80, 10)] and at(80, later) == at(90, again)


def test_rows_over_a_detour_are_those_of_the_single_steps():
    data, around = SyntheticInput(CONFIG, 61), [Detour(4, 3), Detour(6, 2)]
    slots = np.array([1, 5])
    single = [data.rows(at(step, around), slots) for step in range(2, 9)]
    np.testing.assert_array_equal(skipped_batches.rows(data, around, 2, slots, 7), np.concatenate(single))
