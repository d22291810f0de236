"""What encoders end with, by objective: each makes features of hidden states and owns, or borrows, an output layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Batch
from lslm_jax.errors import ConfigError
from lslm_jax.models.layers import ACTIVATIONS, Linear, Norm, constant, dropout, normal, weight_std


def make(config: ModelConfig, objective: str, key: jax.Array) -> Any:
    """The head for an objective.

    Raises:
      ConfigError: an encoder has none for it.
    """
    match objective:
        case "masked":
            return MaskedHead(config, key)
        case "classification":
            return PooledHead(config, config.num_labels, key)
        case "regression":
            return PooledHead(config, 1, key)
        case "tagging":
            return TokenHead(config, config.num_labels, key)
        case "qa":
            return TokenHead(config, 2, key)
    raise ConfigError(f"an encoder does not learn task.objective={objective}")


class Transform(nnx.Module):
    """What a head does to hidden states before its output layer: a dense layer, its activation, perhaps a norm."""

    def __init__(self, config: ModelConfig, activation: str, key: jax.Array, *, norm: bool):
        D = config.d_model
        self.activation = activation
        self.dense = Linear(key, {"embed": D}, {"width": D}, bias=config.bias, std=weight_std(config, D))
        self.norm = Norm(config, {"width": D}) if norm else None

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Maps [B, T, D] to [B, T, D]."""
        x_BTD = ACTIVATIONS[self.activation](self.dense(x_BTD))
        return x_BTD if self.norm is None else self.norm(x_BTD)


class MaskedHead(nnx.Module):
    """Tells the masked tokens: a last transform, then the embedding as output layer (BERT)."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.transform = Transform(config, config.activation, key, norm=True)

    def __call__(self, x_BTD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Features [B, P, D] at the places of the batch, or [B, T, D] at all."""
        if batch.places_BP is not None:
            x_BTD = jnp.take_along_axis(x_BTD, batch.places_BP[:, :, None], axis=1)
        return self.transform(x_BTD)

    def output(self) -> None:
        """Its output layer is that of the embedding."""


class PooledHead(nnx.Module):
    """Tells a class or a number of the whole row: pooling, a transform, dropout, output layer (BERT)."""

    def __init__(self, config: ModelConfig, labels: int, key: jax.Array):
        pooler_key, head_key = jax.random.split(key)
        self.config = config
        self.pooler = Transform(config, config.head_activation, pooler_key, norm=config.head_norm)
        self.head, self.bias = _output(config, labels, head_key)

    def __call__(self, x_BTD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Features [B, 1, D]."""
        pooled_B1D = self.pooler(pool(x_BTD, batch.segments_BT, self.config.pool))
        return dropout(pooled_B1D, self.config.dropout, key)

    def output(self) -> tuple[jax.Array, jax.Array]:
        """The output layer: weights [labels, D] and bias [labels]."""
        return self.head.get_value(), self.bias.get_value()


class TokenHead(nnx.Module):
    """Tells something of each token, its tag or whether an answer starts or ends there: dropout, output layer."""

    def __init__(self, config: ModelConfig, labels: int, key: jax.Array):
        pooler_key, head_key = jax.random.split(key)
        self.config = config
        self.pooler = Transform(config, config.head_activation, pooler_key, norm=True) if config.head_norm else None
        self.head, self.bias = _output(config, labels, head_key)

    def __call__(self, x_BTD: jax.Array, batch: Batch, key: jax.Array | None) -> jax.Array:
        """Features [B, T, D]."""
        return dropout(x_BTD if self.pooler is None else self.pooler(x_BTD), self.config.dropout, key)

    def output(self) -> tuple[jax.Array, jax.Array]:
        """The output layer: weights [labels, D] and bias [labels]."""
        return self.head.get_value(), self.bias.get_value()


def _output(config: ModelConfig, labels: int, key: jax.Array) -> tuple[nnx.Param, nnx.Param]:
    D = config.d_model
    weights = normal(key, [labels, D], ["labels", "embed"], weight_std(config, D))
    return weights, constant(0.0, [labels], ["labels"])


def pool(x_BTD: jax.Array, segments_BT: jax.Array | None, how: str) -> jax.Array:
    """The first token of each row or the mean of all that are not padding: [B, 1, D]."""
    if how == "first":
        return x_BTD[:, :1]
    if segments_BT is None:
        return jnp.mean(x_BTD, axis=1, keepdims=True)
    real_BT1 = (segments_BT > 0)[:, :, None]
    total_B1D = jnp.sum(jnp.where(real_BT1, x_BTD, 0), axis=1, keepdims=True, dtype=jnp.float32)
    return (total_B1D / jnp.maximum(jnp.sum(real_BT1, axis=1, keepdims=True), 1)).astype(x_BTD.dtype)
