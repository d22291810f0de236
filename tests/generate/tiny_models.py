"""Tiny models whose words vary: weights are several times their usual size. All in float32."""

from dataclasses import replace

import jax
import numpy as np

from lslm_jax.batch import Batch
from lslm_jax.config import ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.data.tokenizer import Bytes
from lslm_jax.models import attention, presets

GPT = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=Bytes().vocab_size, max_length=96))
LLAMA = replace(
    GPT,
    num_kv_heads=2,
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated=True,
    bias=False,
    tie_embeddings=False,
    window=7,
    qk_norm="head",
    scan_layers=False,
)
TRANSFORMER = replace(
    GPT,
    family="encoder_decoder",
    vocab_size=GPT.vocab_size + 100,
    num_decoder_layers=1,
    positions="sinusoidal",
    norm_place="after",
    embed_scale=True,
    activation="relu",
    tie_embeddings=False,
)
T5 = replace(
    TRANSFORMER,
    num_layers=1,
    num_decoder_layers=2,
    num_kv_heads=2,
    positions="relative",
    relative_buckets=8,
    relative_distance=16,
    norm="rmsnorm",
    norm_place="before",
    embed_scale=False,
    gated=True,
    bias=False,
    attention_scale=1.0,
    logit_scale=True,
    scan_layers=False,
)


def make_model(config: ModelConfig):
    @jax.jit
    def make():
        return jax.tree.map(lambda a: 5.0 * a if a.ndim > 1 else a, presets.build(config, jax.random.key(0)))

    return make()


@jax.jit
def all_logits(model, tokens_BT, source_BS=None):
    """The full forward pass, to compare with: [B, T, V]."""
    batch = Batch(tokens_BT, tokens_BT, tokens_BT, source_BS=source_BS)
    return model.logits(model.features(batch, backend=attention.XLA))


def text_logits(model, tokenizer, prompt, ids):
    """What the full forward pass says before each of `ids`, given the prompt: [n, V]."""
    is_source = model.config.family == "encoder_decoder"
    read = [tokenizer.bos_id, *([] if is_source else prompt)]
    row = read + ids
    row_BT = np.array([row + [0] * (model.config.max_length - len(row))])
    source_BS = np.array([[*prompt, tokenizer.eos_id]]) if is_source else None
    logits_BTV = all_logits(model, row_BT, source_BS)
    return np.asarray(logits_BTV[0, len(read) - 1 :][: len(ids), : tokenizer.vocab_size])
