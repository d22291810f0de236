"""Named sizes of the published families, and what a model costs. Config files read this before jax is needed."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lslm_jax.config import ModelConfig

if TYPE_CHECKING:
    import jax

GPT2 = ModelConfig()
LLAMA = ModelConfig(
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated=True,
    bias=False,
    tie_embeddings=False,
    rope_theta=500_000.0,
    dtype="bfloat16",
)

gpt2_small = replace(GPT2, num_layers=12, d_model=768, num_heads=12)
"""GPT-2, 124M parameters (Radford et al. 2019)."""
gpt2_xl = replace(GPT2, num_layers=48, d_model=1600, num_heads=25)
"""GPT-2, 1.5B parameters."""
llama_1b = replace(
    LLAMA,
    num_layers=16,
    d_model=2048,
    num_heads=32,
    num_kv_heads=8,
    d_ff=8192,
    vocab_size=128_256,
    max_length=8192,
    tie_embeddings=True,
)
"""Llama 3.2, 1.2B parameters (Grattafiori et al. 2024), without its stretched rotary frequencies."""
llama_8b = replace(
    LLAMA,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    d_ff=14_336,
    vocab_size=128_256,
    max_length=8192,
)
"""Llama 3, 8B parameters."""


def build(config: ModelConfig, key: "jax.Array", objective: str = "causal") -> Any:
    """A model with random weights; under `jax.eval_shape`, its shapes and logical axes at no cost.

    Every model has `features(batch, backend=, key=)`, what its output layer reads for each target of a batch, and
    `output()`, that layer: weights [V, D] and bias [V] or None.

    Args:
      config: with all sizes filled in.
      key: of the weights.
      objective: `task.objective`; encoders end in a head for it.

    Raises:
      ConfigError: an encoder has no head for it.
    """
    match config.family:
        case "decoder":
            from lslm_jax.models.decoder import Decoder

            return Decoder(config, key)
        case "encoder":
            from lslm_jax.models.encoder import Encoder

            return Encoder(config, key, objective)
        case "encoder_decoder":
            from lslm_jax.models.seq2seq import Seq2Seq

            return Seq2Seq(config, key)


def flops_per_token(config: ModelConfig, length: int) -> float:
    """Floating-point operations of one training step per token, forward and backward, at sequence length T.

    Counted from the structure: each weight of a matrix product is multiplied and added once forward and twice
    backward (6 a weight); attention multiplies queries with keys and weights with values over the tokens a causal
    query sees, on average (T + 1) / 2 or less with a window. Recomputation is not counted, nor is the embedding.
    """
    D, F, C = config.d_model, config.d_ff, config.head_dim
    projections = D * C * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = D * F * (3 if config.gated else 2)
    weights = config.num_layers * (projections + mlp) + D * config.vocab_size
    window = min(config.window or length, length)
    seen = window - window * (window - 1) / (2 * length)  # the first tokens of a row see fewer than a full window
    attention = 2 * config.num_layers * config.num_heads * C * seen
    return 6.0 * (weights + attention)
