"""The key-value cache: what every layer keeps of the tokens read so far, so that each token is read once."""

import jax
import jax.numpy as jnp

from lslm_jax.config import ModelConfig
from lslm_jax.models.attention import KeyValues
from lslm_jax.parallel.sharding import constrain

AXES = ("batch", "length", "kv_heads", "head_dim")
"""Logical axes of keys and of values: rows lie over the data axes of the mesh, heads over its tensor axis."""


def create(config: ModelConfig, batch: int, length: int) -> list[KeyValues]:
    """An empty cache for `batch` rows of up to `length` tokens.

    Returns:
      For each layer zeros [B, S, K, C] in the compute type, placed on the mesh where one is set.
    """
    shape = (batch, length, config.num_kv_heads, config.head_dim)
    zeros = lambda: constrain(jnp.zeros(shape, config.activations), AXES)
    return [KeyValues(zeros(), zeros()) for _ in range(num_layers(config))]


def num_layers(config: ModelConfig) -> int:
    """Layers that keep something: those that read token by token."""
    return config.num_decoder_layers if config.family == "encoder_decoder" else config.num_layers


def extend(cache: list[KeyValues], extra: int) -> list[KeyValues]:
    """The cache with room for `extra` more tokens in each row, at the end."""
    widths = [(0, extra if axis == "length" else 0) for axis in AXES]
    return jax.tree.map(lambda a: constrain(jnp.pad(a, widths), AXES), cache)


def num_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Bytes of a cache over all devices."""
    entries = 2 * num_layers(config) * batch * length * config.num_kv_heads * config.head_dim
    return entries * jnp.dtype(config.activations).itemsize
