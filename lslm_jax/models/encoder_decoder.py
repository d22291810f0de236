"""The encoder-decoder Transformer: that of 2017 and T5 are two configs of it."""

import copy
from dataclasses import replace
from typing import Any, Self

import jax
import jax.numpy as jnp

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Array, Batch
from lslm_jax.models.attention import Backend
from lslm_jax.models.embedding import Embedding, places
from lslm_jax.models.layers import dropout
from lslm_jax.models.moe import Routing
from lslm_jax.models.transformer import Tower


class Seq2Seq(Embedding):
    """Reads a source as a whole, and says at each position of a target which token may come next.

    Source and target share the tables of tokens and of positions.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Args: config with all sizes filled in (`config.validation`)."""
        keys = jax.random.split(key, 5)
        super().__init__(config, (keys[0], keys[1], keys[4]))
        self.encoder = Tower(config, keys[2], causal=False)
        decoder = replace(config, num_layers=config.num_decoder_layers)
        self.decoder = Tower(decoder, keys[3], causal=True, cross=True)

    def features_and_routing(
        self, batch: Batch, *, backend: Backend, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        encoder_key, *keys = [None] * 4 if key is None else jax.random.split(key, 4)
        memory_BSD, source_routing = self._encode(
            batch.source_BS, batch.source_positions_BS, batch.source_segments_BS, backend, encoder_key
        )
        positions_BT = places(batch.tokens_BT, batch.positions_BT)
        x_BTD, routing = self.decoder.read(
            self.look_up(batch.tokens_BT, positions_BT, key=keys[0]),
            positions_BT,
            batch.segments_BT,
            backend=backend,
            key=keys[1],
            memory_BSD=memory_BSD,
            source_segments_BS=batch.source_segments_BS,
        )
        both = jax.tree.map(lambda *parts: jnp.concatenate(parts), source_routing, routing)
        return self.finish(self._dropped(x_BTD, keys[2])), both

    def encode(
        self,
        source_BS: Array,
        positions_BS: jax.Array | None = None,
        segments_BS: jax.Array | None = None,
        *,
        backend: Backend,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What the encoder says of a source, [B, S, D]. Arguments as those of `Tower.read`; positions None: 0..S-1."""
        return self._encode(source_BS, positions_BS, segments_BS, backend, key)[0]

    def _encode(
        self, source_BS: Array, positions_BS: Any, segments_BS: Any, backend: Backend, key: Any
    ) -> tuple[jax.Array, Routing | None]:
        keys = [None] * 3 if key is None else jax.random.split(key, 3)
        positions_BS = places(source_BS, positions_BS)
        x_BSD = self.look_up(source_BS, positions_BS, key=keys[0])
        x_BSD, routing = self.encoder.read(x_BSD, positions_BS, segments_BS, backend=backend, key=keys[1])
        return self._dropped(x_BSD, keys[2]), routing

    def cross(self, memory_BSD: jax.Array) -> Any:
        """Keys and values of what the encoder says: KeyValues [L, B, S, K, C]; of an `unstacked` model a list of L."""
        return self.decoder.keys_values(memory_BSD)

    def with_cache(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        cache: Any,
        index: jax.Array,
        mask_BTS: jax.Array,
        cross: Any,
        cross_mask_BTS: jax.Array,
    ) -> tuple[jax.Array, Any]:
        """Reads T more tokens of the target; returns the hidden state [B, T, D] and the longer cache.

        Args:
          tokens_BT: the new tokens, and so on as in `Decoder.with_cache`.
          cross: from `cross`.
          cross_mask_BTS: which tokens of the source each new token may see, at least one; or [B, 1, S] for all of them.
        """
        x_BTD = self.look_up(tokens_BT, positions_BT)
        x_BTD, cache = self.decoder.extend(x_BTD, positions_BT, cache, index, mask_BTS, cross, cross_mask_BTS)
        return self.finish(x_BTD), cache

    def unstacked(self) -> Self:
        """The same model with its decoder's layers apart, for writing token by token."""
        model = copy.copy(self)
        model.decoder = self.decoder.unstacked()
        return model

    def _dropped(self, x_BTD: jax.Array, key: jax.Array | None) -> jax.Array:
        """A stack's output, with dropout where that of its last block has passed a norm since (T5)."""
        return dropout(x_BTD, self.config.dropout, key) if self.decoder.norm is not None else x_BTD
