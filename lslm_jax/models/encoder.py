"""The encoder-only Transformer: BERT, RoBERTa and their modern kin are configs of it."""

from typing import Any

import jax

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention, heads
from lslm_jax.models.attention import Backend
from lslm_jax.models.embedding import Embedding, places
from lslm_jax.models.moe import Routing
from lslm_jax.models.transformer import Tower


class Encoder(Embedding, Tower):
    """Reads tokens as a whole; its top says what the objective asks."""

    def __init__(self, config: ModelConfig, key: jax.Array, objective: str):
        """Args: config with all sizes filled in (`config.validation`)."""
        keys = jax.random.split(key, 5)
        Embedding.__init__(self, config, (keys[0], keys[1], keys[3]), head=objective == "masked")
        Tower.__init__(self, config, keys[2], causal=False)
        self.top = heads.make(config, objective, keys[4])

    def __call__(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segments_BT: jax.Array | None = None,
        types_BT: jax.Array | None = None,
        *,
        backend: Backend = attention.XLA,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the final hidden state [B, T, D].

        Args:
          tokens_BT: what is read.
          positions_BT: place of each token in its document. None: 0..T-1.
          segments_BT: which document of its row a token belongs to, from 1, 0 for padding. None: one a row.
          types_BT: 0 for the first and 1 for the second text of a pair. None: 0.
          backend: attention kernel, from `attention.choose`.
          key: dropout key. None: no dropout.
        """
        return self._read(tokens_BT, positions_BT, segments_BT, types_BT, backend, key)[0]

    def _read(
        self, tokens_BT: Any, positions_BT: Any, segments_BT: Any, types_BT: Any, backend: Backend, key: Any
    ) -> tuple[jax.Array, Routing | None]:
        embed_key, layer_key = (None, None) if key is None else jax.random.split(key)
        positions_BT = places(tokens_BT, positions_BT)
        x_BTD = self.look_up(tokens_BT, positions_BT, types_BT, embed_key)
        return self.read(x_BTD, positions_BT, segments_BT, backend=backend, key=layer_key)

    def features_and_routing(
        self, batch: Batch, *, backend: Backend, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        body_key, top_key = (None, None) if key is None else jax.random.split(key)
        x_BTD, routing = self._read(
            batch.tokens_BT, batch.positions_BT, batch.segments_BT, batch.types_BT, backend, body_key
        )
        return self.finish(self.top(x_BTD, batch, top_key)), routing

    def output(self) -> tuple[jax.Array, jax.Array | None]:
        """The output layer: weights [V, D] and bias [V] or None, float32; V are tokens or the labels of a head."""
        return self.top.output() or super().output()
