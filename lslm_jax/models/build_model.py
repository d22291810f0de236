"""Builds the model of a config: decoder, encoder or encoder-decoder."""

from typing import Any

import jax

from lslm_jax.config import ModelConfig
from lslm_jax.models.decoder import Decoder
from lslm_jax.models.encoder import Encoder
from lslm_jax.models.encoder_decoder import Seq2Seq


def build_model(config: ModelConfig, key: jax.Array, objective: str = "causal") -> Any:
    """Builds a model with random weights. Under `jax.eval_shape` it returns shapes and logical axes at no cost.

    Every model has `features(batch, backend=, key=)`, the hidden states of each target of a batch, and `output()`, the
    weights [V, D] and bias [V] (or None) of its output layer.

    Args:
      config: model config with all sizes resolved.
      key: PRNG key of the initial weights.
      objective: `task.objective`; selects the head of an encoder.

    Raises:
      ConfigError: the objective has no encoder head.
    """
    match config.family:
        case "decoder":
            return Decoder(config, key)
        case "encoder":
            return Encoder(config, key, objective)
        case "encoder_decoder":
            return Seq2Seq(config, key)
