"""The decoder-only Transformer: GPT and Llama are two configs of it."""

from typing import Any

import jax
import jax.numpy as jnp

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.models.embedding import Embedding, places
from lslm_jax.models.moe import Routing
from lslm_jax.models.transformer import Tower


class Decoder(Embedding, Tower):
    """Reads tokens, says at each position which may come next."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Args: config with all sizes filled in (`config.validation`)."""
        keys = jax.random.split(key, 4)
        Embedding.__init__(self, config, (keys[0], keys[1], keys[3]))
        Tower.__init__(self, config, keys[2], causal=True)

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        *,
        backend: Backend = attention.XLA,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the final hidden state [B, T, D], from which `logits` or the loss go on.

        Args:
          tokens_BT: what is read.
          positions_BT: place of each token in its document. None: 0..T-1.
          segments_BT: which document of its row a token belongs to, from 1, 0 for padding. None: one a row.
          backend: attention kernel, from `attention.choose`.
          key: dropout key. None: no dropout.
        """
        batch = Batch(tokens_BT, None, None, positions_BT, segments_BT)
        return self.features(batch, backend=backend, key=key)

    def features_and_routing(
        self, batch: Batch, *, backend: Backend, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        positions_BT = places(batch.tokens_BT, batch.positions_BT)
        x_BTD = self.look_up(batch.tokens_BT, positions_BT, key=embed_key)
        x_BTD, routing = self.read(x_BTD, positions_BT, batch.segments_BT, backend=backend, key=layer_key)
        if batch.places_BP is not None:
            x_BTD = jnp.take_along_axis(x_BTD, batch.places_BP[:, :, None], axis=1)
        return self.finish(x_BTD), routing

    def with_cache(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any, index: jax.Array, mask_BTS: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Reads T more tokens after those in the cache; returns the hidden state [B, T, D] and the longer cache.

        Args:
          tokens_BT: the new tokens.
          positions_BT: their places in their documents.
          cache: KeyValues of all layers, [L, B, S, K, C]; of an `unstacked` model a list of L.
          index: where in the cache the new tokens are written, the same in every row.
          mask_BTS: which cache entries each new token may see, were there no window: that is taken care of here.
        """
        x_BTD, cache = self.extend(self.look_up(tokens_BT, positions_BT), positions_BT, cache, index, mask_BTS)
        return self.finish(x_BTD), cache
