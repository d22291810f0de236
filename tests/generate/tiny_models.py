"""Tiny models whose words vary: weights are several times their usual size. All in float32."""

from dataclasses import replace

import jax

from lslm_jax.config import ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.data.tokenizer import Bytes
from lslm_jax.models import presets

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
    qk_norm=True,
    scan_layers=False,
)


def make_model(config: ModelConfig):
    @jax.jit
    def make():
        return jax.tree.map(lambda a: 5.0 * a if a.ndim > 1 else a, presets.build(config, jax.random.key(0)))

    return make()


@jax.jit
def all_logits(model, tokens_BT):
    """The full forward pass, to compare with: [B, T, V]."""
    return model.logits(model(tokens_BT))
