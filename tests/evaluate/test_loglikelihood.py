"""Likelihoods of texts: those of the whole logits, whatever the batch, the padding and the mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.errors import ConfigError
from lslm_jax.evaluate import lm_eval_harness, loglikelihood
from lslm_jax.evaluate.loglikelihood import Text
from lslm_jax.evaluate.types import Setting
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh, shardings_of
from lslm_jax.train import losses

LONGEST, V = 40, 37
MODEL = fill_sizes(
    ModelConfig(
        num_layers=2, d_model=16, num_heads=2, max_length=LONGEST, vocab_size=V, logit_softcap=3.0, init="fan_in"
    )
)


@pytest.fixture(scope="module")
def model():
    return jax.jit(lambda: build_model(MODEL, jax.random.key(0), "causal"))()


def texts():
    """Of all lengths, of which a little, much or all is predicted."""
    rng = np.random.default_rng(0)
    lengths = [2, 3, LONGEST + 1, 17, 18, *rng.integers(2, LONGEST + 2, 20)]
    return [Text(rng.integers(0, V, n).tolist(), int(rng.integers(1, n))) for n in lengths]


def logits_of(model, ids):
    """Of one text alone. Behind it are zeros, which it does not see: all texts are as long, and compiled for once."""
    padded = np.pad(np.array(ids, np.int32), (0, LONGEST - len(ids)))
    return np.asarray(all_logits(model, padded[None]), np.float64)[0, : len(ids)]


@jax.jit
def all_logits(model, ids):
    return model.logits(model(ids))


def plain(model, text):
    """One text alone, with all its logits at once."""
    logits_TV = logits_of(model, text.ids[:-1])
    logp_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=-1, keepdims=True))
    rows, targets = range(len(text.ids) - 1 - text.count, len(text.ids) - 1), text.ids[-text.count :]
    return float(sum(logp_TV[row, id] for row, id in zip(rows, targets, strict=True))), all(
        int(np.argmax(logp_TV[row])) == id for row, id in zip(rows, targets, strict=True)
    )


@pytest.mark.parametrize("mesh", [MeshConfig(), MeshConfig(data=1, fsdp=4, tensor=2)])
def test_each_text_is_as_likely_as_alone(model, mesh):
    config = Config(model=MODEL, mesh=mesh, data=DataConfig(seq_len=20), train=TrainConfig(batch_size=5, loss_chunk=7))
    where = make_mesh(replace(config, train=replace(config.train, batch_size=8)))
    wanted = texts()
    expected = [plain(model, text) for text in wanted]
    with jax.set_mesh(where):
        placed = jax.device_put(model, shardings_of(model, where))
        setting = Setting(config, None, [], None, attention.XLA, where)  # type: ignore[arg-type]
        found = loglikelihood.rate(setting, placed, wanted, lambda length: attention.XLA)
    np.testing.assert_allclose([nats for nats, _ in found], [nats for nats, _ in expected], rtol=1e-5)
    assert [likeliest for _, likeliest in found] == [likeliest for _, likeliest in expected]


def test_what_the_model_would_write_is_the_likeliest(model):
    ids = [3]
    for _ in range(10):
        ids.append(int(np.argmax(logits_of(model, ids)[-1])))
    config = Config(model=MODEL, train=TrainConfig(batch_size=8))
    setting = Setting(config, None, [], None, attention.XLA, make_mesh(config))  # type: ignore[arg-type]
    other = [*ids[:-1], (ids[-1] + 1) % V]
    with jax.set_mesh(setting.mesh):
        found = loglikelihood.rate(setting, model, [Text(ids, 10), Text(other, 10)], lambda length: attention.XLA)
    assert [likeliest for _, likeliest in found] == [True, False]


def test_of_equally_likely_tokens_the_first_counts_as_the_likeliest():
    x_BTD, w_VD = np.zeros((1, 4, 2), np.float32), np.ones((6, 2), np.float32)
    settings = losses.Settings(vocab_size=5, chunk=3)  # the sixth row is padding
    log_probabilities = jax.jit(losses.log_probabilities, static_argnums=3)
    nats_BT, likeliest_BT = log_probabilities(x_BTD, w_VD, np.array([[0, 1, 4, 0]]), settings)
    np.testing.assert_allclose(nats_BT, -np.log(5.0), rtol=1e-6)
    assert likeliest_BT.tolist() == [[True, False, False, True]]


def test_few_shapes_stand_for_all_lengths():
    config = Config(model=replace(MODEL, max_length=3000))
    widths = {loglikelihood._width(config, length) for length in range(1, 3001)}
    assert widths == {16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3000}


def test_a_task_stops_a_text_at_the_first_of_its_strings():
    assert lm_eval_harness._cut("one. two\nthree", ("\n", ". ")) == "one"
    assert lm_eval_harness._cut("one", ("\n",)) == "one"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("",), "--harness names no task"),
        (("a", None, -1), "--fewshot=-1 must not be negative"),
        (("a", None, None, 0), "--limit=0 must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(flags, message):
    with pytest.raises(ConfigError, match=message):
        lm_eval_harness.asked(*flags, *[None] * (4 - len(flags)))


def test_only_decoders_that_continue_texts_are_asked():
    for model, objective in [({"family": "encoder"}, "masked"), ({}, "seq2seq")]:
        with pytest.raises(ConfigError, match="--harness asks decoders that continue texts"):
            lm_eval_harness.check(Config(model=ModelConfig(**model), task=TaskConfig(objective=objective)))
