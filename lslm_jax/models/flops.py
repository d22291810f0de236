"""Floating-point operations of a training step, counted from the model config."""

from lslm_jax.config import ModelConfig
from lslm_jax.models.model_configs import layer_types


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
