"""Tiny models whose words vary: weights are several times their usual size. All in float32."""

from dataclasses import replace

import jax
import numpy as np

from lslm_jax.config import ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.data.batch import Batch
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model

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
        return jax.tree.map(lambda a: 5.0 * a if a.ndim > 1 else a, build_model(config, jax.random.key(0)))

    return make()


@jax.jit
def all_logits(model, tokens_BT, source_BS=None, source_segments_BS=None):
    """The full forward pass, to compare with: [B, T, V]."""
    batch = Batch(tokens_BT, tokens_BT, tokens_BT, source_BS=source_BS, source_segments_BS=source_segments_BS)
    return model.logits(model.features(batch, backend=attention.XLA))


def padded(rows, length):
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def text_logits(model, tokenizer, prompts, texts):
    """Logits of the full forward pass before each token of the texts: for each prompt and its text [n, V]."""
    has_source = model.config.family == "encoder_decoder"
    begun = [[tokenizer.bos_id, *([] if has_source else prompt)] for prompt in prompts]
    tokens_BT = padded([[*row, *ids] for row, ids in zip(begun, texts, strict=True)], model.config.max_length)
    source = ()
    if has_source:
        rows = [[*prompt, tokenizer.eos_id] for prompt in prompts]
        longest = max(map(len, rows))
        source = padded(rows, longest), padded([[1] * len(row) for row in rows], longest)
    logits_BTV = np.asarray(all_logits(model, tokens_BT, *source))[..., : tokenizer.vocab_size]
    return [logits_TV[len(row) - 1 :][: len(ids)] for logits_TV, row, ids in zip(logits_BTV, begun, texts, strict=True)]
