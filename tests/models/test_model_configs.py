"""The published sizes, counted without allocating anything, and what a step costs."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from lslm_jax.config import Config, ModelConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention, model_configs
from lslm_jax.models.build_model import build_model
from lslm_jax.models.embedding import padded_vocab
from lslm_jax.models.flops import flops_per_token
from lslm_jax.train import losses, train_step
from lslm_jax.train.train_state import divide, num_parameters


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (replace(model_configs.gpt2_small, vocab_size=50_257), 124_439_808),
        (replace(model_configs.gpt2_xl, vocab_size=50_257), 1_557_611_200),
        (model_configs.llama_1b, 1_235_814_400),
        (model_configs.llama_8b, 8_030_261_248),
        (model_configs.mixtral_8x7b, 46_702_792_704),
    ],
    ids=["gpt2_small", "gpt2_xl", "llama_1b", "llama_8b", "mixtral_8x7b"],
)
def test_presets_have_the_published_number_of_parameters(config, parameters):
    config = fill_sizes(config)
    model = jax.eval_shape(lambda: build_model(config, jax.random.key(0)))
    tables = 1 if config.tie_embeddings else 2
    padding = tables * (padded_vocab(config) - config.vocab_size) * config.d_model
    assert num_parameters(model) - padding == parameters


@pytest.mark.parametrize(
    ("config", "objective", "parameters"),
    [
        (replace(model_configs.bert_base, vocab_size=30_522), "masked", 109_514_298),
        # Theirs has two positions more, of which one is for padding.
        (replace(model_configs.roberta_base, vocab_size=50_265), "masked", 124_697_433 - 2 * 768),
        (model_configs.t5_small, "seq2seq", 60_506_624),
        (model_configs.t5_v1_1_small, "seq2seq", 76_961_152),
    ],
    ids=["bert_base", "roberta_base", "t5_small", "t5_v1_1_small"],
)
def test_presets_of_encoders_and_encoder_decoders_have_the_published_number_of_parameters(
    config, objective, parameters
):
    config = fill_sizes(config)
    model = jax.eval_shape(lambda: build_model(config, jax.random.key(0), objective))
    extra = padded_vocab(config) - config.vocab_size
    # Of the vocabulary's padding there is a row in each table, and a number in the bias of masked tokens.
    padding = extra * config.d_model * (1 if config.tie_embeddings else 2) + extra * (objective == "masked")
    assert num_parameters(model) - padding == parameters


def test_of_experts_only_those_that_a_token_meets_cost_anything():
    mixture = fill_sizes(replace(model_configs.mixtral_8x7b, shared_experts=1))
    wide = replace(mixture, num_experts=0, shared_experts=0, d_ff=3 * mixture.d_ff)
    routers = 6 * mixture.num_layers * mixture.d_model * mixture.num_experts
    assert flops_per_token(mixture, 512) == flops_per_token(wide, 512) + routers
    more = replace(mixture, num_experts=2 * mixture.num_experts)
    assert flops_per_token(more, 512) == flops_per_token(mixture, 512) + routers


LLAMA = replace(model_configs.LLAMA, num_kv_heads=2, d_ff=1024, dtype="float32")


@pytest.mark.parametrize(
    "family",
    [ModelConfig(), pytest.param(LLAMA, marks=pytest.mark.exhaustive), replace(LLAMA, window=16)],
    ids=["gpt", "llama", "window"],
)
def test_flops_per_token_agree_with_what_xla_counts(family):
    model = replace(family, num_layers=2, d_model=512, num_heads=8, vocab_size=1024, max_length=64, scan_layers=False)
    B, T = 2, 64
    config = Config(model=fill_sizes(model), train=TrainConfig(loss_chunk=B * T))
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32)
    batch = Batch(ids_BT, ids_BT, jax.ShapeDtypeStruct((B, T), jnp.float32))
    gradient = jax.jit(lambda *args: train_step.accumulate_gradients(config, attention.XLA, *args))
    abstract = jax.eval_shape(lambda: build_model(config.model, jax.random.key(0)))
    compiled = gradient.lower(*divide(config, abstract), batch, jax.eval_shape(lambda: jax.random.key(0))).compile()
    seen = sum(min(t + 1, model.window or T) for t in range(T)) / T
    # The reference multiplies masked pairs too, which a fused kernel leaves out and nobody counts as work.
    masked = 6 * 2 * model.num_layers * 512 * (T - seen)
    counted = compiled.cost_analysis()["flops"] / (B * T)
    assert counted == pytest.approx(flops_per_token(config.model, T) + masked, rel=0.05)


@pytest.mark.parametrize(
    ("family", "objective", "window"),
    [
        ("encoder", "masked", 0),
        ("encoder", "tagging", 8),
        ("encoder_decoder", "seq2seq", 8),
        pytest.param("encoder", "masked", 8, marks=pytest.mark.exhaustive),
        pytest.param("encoder", "tagging", 0, marks=pytest.mark.exhaustive),
        pytest.param("encoder_decoder", "seq2seq", 0, marks=pytest.mark.exhaustive),
    ],
)
def test_flops_of_encoders_and_encoder_decoders_agree_with_what_xla_counts(family, objective, window):
    B, T, S, D, L = 2, 64, 96, 512, 2
    model = ModelConfig(family=family, num_layers=L, num_decoder_layers=1, d_model=D, num_heads=8, vocab_size=1024)
    model = fill_sizes(replace(model, num_labels=128, window=window, scan_layers=False))
    model = replace(model, layer_types=("full", "window") if window else ())
    ids = lambda n: jax.ShapeDtypeStruct((B, n), jnp.int32)
    batch = Batch(ids(T), ids(T), jax.ShapeDtypeStruct((B, T), jnp.float32))
    predictions = 0
    if objective == "masked":
        predictions = 16
        batch = batch._replace(targets_BT=ids(16), weights_BT=ids(16), places_BP=ids(16))
    if family == "encoder_decoder":
        batch = batch._replace(source_BS=ids(S))

    def objective_of(model, batch):
        x_BPD = model.features(batch, backend=attention.XLA)
        w_VD, b_V = model.output()
        settings = losses.Settings(w_VD.shape[0], chunk=B * T)
        return losses.cross_entropy(x_BPD, w_VD, batch.targets_BT, batch.weights_BT, settings, b_V).objective

    abstract = jax.eval_shape(lambda: build_model(model, jax.random.key(0), objective))
    counted = jax.jit(jax.grad(objective_of)).lower(abstract, batch).compile().cost_analysis()["flops"] / (B * T)
    # The reference multiplies masked pairs too, which nobody counts as work.
    both = lambda n: sum(min(t, window - 1) + min(n - 1 - t, window - 1) + 1 for t in range(n)) / n if window else n
    if family == "encoder":
        masked = T - both(T)  # of two layers the first sees everything
    else:
        masked = (S - both(S)) * S / T + T - (T + 1) / 2
    expected = flops_per_token(model, T, S, objective, predictions) + 6 * 2 * D * masked
    assert counted == pytest.approx(expected, rel=0.05)


def test_attention_is_counted_over_the_tokens_a_query_sees():
    config = fill_sizes(model_configs.llama_1b)
    for window, length in [(0, 100), (7, 100), (100, 100), (300, 100), (1, 100)]:
        seen = sum(min(t + 1, window or length) for t in range(length)) / length
        flops = flops_per_token(replace(config, window=window), length)
        without = flops_per_token(replace(config, window=1), length)
        assert flops - without == pytest.approx(6 * 2 * 16 * 2048 * (seen - 1))
