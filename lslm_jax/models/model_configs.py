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

mixtral_8x7b = replace(
    LLAMA,
    num_layers=32,
    d_model=4096,
    num_heads=32,
    num_kv_heads=8,
    d_ff=14_336,
    num_experts=8,
    vocab_size=32_000,
    max_length=32_768,
    rope_theta=1e6,
)
"""Mixtral 8x7B, 46.7B parameters, of which a token meets 12.9B (Jiang et al. 2024)."""

BERT = ModelConfig(
    family="encoder",
    norm_place="after",
    embed_norm=True,
    output_bias=True,
    norm_eps=1e-12,
    token_types=2,
    max_length=512,
    activation="gelu_exact",
    dropout=0.1,
    init="normal",
)
T5 = ModelConfig(
    family="encoder_decoder",
    positions="relative",
    norm="rmsnorm",
    norm_eps=1e-6,
    bias=False,
    attention_scale=1.0,
    head_dim=64,
    max_length=512,
    dropout=0.1,
    init="fan_in",
    vocab_size=32_128,
)

bert_base = replace(BERT, num_layers=12, d_model=768, num_heads=12)
"""BERT, 110M parameters (Devlin et al. 2019)."""
bert_small = replace(
    BERT, num_layers=4, d_model=256, num_heads=4, max_length=128, positions="rotary", norm_place="before", dropout=0.0
)
"""A small BERT for small budgets; `configs/bert_small_novels.py` has what rotary positions make of one."""
roberta_base = replace(bert_base, norm_eps=1e-5, token_types=1)
"""RoBERTa, 125M parameters (Liu et al. 2019)."""
modern_encoder_base = ModelConfig(
    family="encoder",
    num_layers=22,
    d_model=768,
    num_heads=12,
    d_ff=1152,
    max_length=8192,
    positions="rotary",
    embed_norm=True,
    activation="gelu_exact",
    gated=True,
    bias=False,
    rope_theta=160_000.0,
    window=65,
    layer_types=("full", "window", "window"),
    rope_local_theta=10_000.0,
    first_norm=False,
    output_bias=True,
    head_activation="gelu_exact",
    head_norm=True,
    dtype="bfloat16",
)
"""ModernBERT, 149M parameters (Warner et al. 2024)."""
transformer_base = ModelConfig(
    family="encoder_decoder",
    num_layers=6,
    d_model=512,
    num_heads=8,
    positions="sinusoidal",
    norm_place="after",
    embed_scale=True,
    activation="relu",
    dropout=0.1,
    init="fan_in",
)
"""The Transformer of 2017, base model (Vaswani et al. 2017)."""
t5_small = replace(T5, num_layers=6, d_model=512, num_heads=8, activation="relu", logit_scale=True)
"""T5 1.0, 60M parameters (Raffel et al. 2020)."""
t5_v1_1_small = replace(T5, num_layers=8, d_model=512, num_heads=6, d_ff=1024, gated=True, tie_embeddings=False)
"""T5 1.1, 77M parameters (Shazeer 2020 for its MLP)."""


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
            from lslm_jax.models.encoder_decoder import Seq2Seq

            return Seq2Seq(config, key)


def layer_types(config: ModelConfig, num_layers: int) -> list[str]:
    """What each layer of a stack sees: `full`, `window` or `no_rope`."""
    kinds = config.layer_types or ("window" if config.window else "full",)
    return [kinds[i % len(kinds)] for i in range(num_layers)]


def flops_per_token(
    config: ModelConfig,
    length: int,
    source_length: int = 0,
    objective: str = "causal",
    predictions: int = 0,
) -> float:
    """Floating-point operations of one training step per token of its rows, forward and backward.

    The rows are those of `tokens_BT`: of an encoder-decoder, targets; what their sources take is spread over them.
    Padding counts as any token, and of experts count those that one goes through.

    Counted from the structure: each weight of a matrix product is multiplied and added once forward and twice
    backward (6 a weight); attention multiplies queries with keys and weights with values over the tokens a query sees,
    as if rows were one document: all of them, or on average (T + 1) / 2 where causal, or less with a window.
    Recomputation is not counted, nor is the embedding.

    Args:
      config: with all sizes filled in.
      length: tokens of a row, T.
      source_length: of an encoder-decoder's source row, S. 0: T.
      objective: `task.objective`, which says what an encoder ends in.
      predictions: targets of a row for masked, P. 0: T.
    """
    layers, D = config.num_layers, config.d_model
    match config.family:
        case "decoder":
            return 6.0 * (_tower(config, layers, length, causal=True) + D * config.vocab_size)
        case "encoder":
            head = _head(config, length, objective, predictions)
            return 6.0 * (_tower(config, layers, length, causal=False) + head)
    S = source_length or length
    projections = D * config.head_dim * 2
    source = _tower(config, layers, S, causal=False)
    source += config.num_decoder_layers * projections * config.num_kv_heads  # keys and values for cross-attention
    products = 2 * S * config.head_dim
    cross = config.num_decoder_layers * config.num_heads * (projections + products)
    target = _tower(config, config.num_decoder_layers, length, causal=True)
    return 6.0 * (target + cross + D * config.vocab_size + source * S / length)


def _tower(config: ModelConfig, num_layers: int, length: int, *, causal: bool) -> float:
    """Multiplications of a stack's blocks per token, forward, without cross-attention."""
    D, F, C = config.d_model, config.d_ff, config.head_dim
    projections = D * C * (2 * config.num_heads + 2 * config.num_kv_heads)
    mlp = D * F * (3 if config.gated else 2)
    if config.num_experts:
        mlp = (config.experts_per_token + config.shared_experts) * mlp + D * config.num_experts
    windows = [config.window if kind == "window" else 0 for kind in layer_types(config, num_layers)]
    seen = sum(keys_seen(length, window, causal) for window in windows)
    return num_layers * (projections + mlp) + 2 * config.num_heads * C * seen


def keys_seen(length: int, window: int, causal: bool) -> float:
    """Keys that a query of a row sees on average, itself among them."""
    window = min(window or length, length)
    before = window - window * (window - 1) / (2 * length)  # the first tokens of a row see fewer than a full window
    return before if causal else 2 * before - 1


def _head(config: ModelConfig, length: int, objective: str, predictions: int) -> float:
    """Multiplications of what an encoder ends in, per token of its row."""
    D = config.d_model
    match objective:
        case "masked":
            return D * (D + config.vocab_size) * (predictions or length) / length
        case "classification":
            return D * (D + config.num_labels) / length
        case "regression":
            return D * (D + 1) / length
        case "tagging":
            return D * config.num_labels
    return 2 * D
