"""The decoder-only Transformer: GPT and Llama are two configs of it."""

import copy
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.models import attention, stack
from lslm_jax.models.attention import Backend, KeyValues
from lslm_jax.models.block import Attend, Block
from lslm_jax.models.layers import Norm, dropout, normal, softcap
from lslm_jax.sharding import constrain

VOCAB_MULTIPLE = 128  # matrix units and the tensor axis like round sizes


def padded_vocab(config: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up. The rows beyond it are never read nor predicted."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Decoder(nnx.Module):
    """Reads tokens, says at each position which may come next."""

    def __init__(self, config: ModelConfig, key: jax.Array):
        """Args: config with all sizes filled in (`config_checks`)."""
        keys = jax.random.split(key, 4)
        D, V = config.d_model, padded_vocab(config)
        self.config = config
        self.embed = normal(keys[0], [V, D], ["vocab", "embed"])
        learned = config.positions == "learned"
        self.positions = normal(keys[1], [config.max_length, D], ["positions", "embed"]) if learned else None
        self.blocks = stack.stacked(functools.partial(Block, config), config.num_layers, keys[2])
        self.norm = Norm(D, "width", kind=config.norm, eps=config.norm_eps, bias=config.bias)
        self.head = None if config.tie_embeddings else normal(keys[3], [V, D], ["vocab", "embed"])

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

        def attend(q_BTHC, k_BTKC, v_BTKC, cache):
            out = attention.attend(
                q_BTHC, k_BTKC, v_BTKC, segments_BT=segments_BT, window=self.config.window, backend=backend
            )
            return out, cache

        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        return self._run(tokens_BT, positions_BT, attend, None, key)[0]

    def unstacked(self) -> "Decoder":
        """The same model with its layers apart, for reading token by token; its cache is a list, one entry a layer."""
        model = copy.copy(self)
        model.blocks = stack.unstacked(self.blocks, self.config.dtype)
        return model

    def with_cache(
        self, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Any, index: jax.Array, mask_BTS: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Reads T more tokens after those in the cache; returns the hidden state [B, T, D] and the longer cache.

        Args:
          tokens_BT: the new tokens.
          positions_BT: their places in their documents.
          cache: KeyValues of all layers, [L, B, S, K, C]; of an `unstacked` model a list of L.
          index: where in the cache the new tokens are written, the same in every row.
          mask_BTS: which cache entries each new token may see.
        """

        def attend(q_BTHC, k_BTKC, v_BTKC, cache):
            k_BSKC = jax.lax.dynamic_update_slice_in_dim(cache.k_BSKC, k_BTKC, index, axis=1)
            v_BSKC = jax.lax.dynamic_update_slice_in_dim(cache.v_BSKC, v_BTKC, index, axis=1)
            return attention.attend_masked(q_BTHC, k_BSKC, v_BSKC, mask_BTS), KeyValues(k_BSKC, v_BSKC)

        return self._run(tokens_BT, positions_BT, attend, cache, None)

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores of every token, [B, T, V], float32; those of the padding of the vocabulary are -inf."""
        w_VD = self.output_weights().astype(x_BTD.dtype)
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD, preferred_element_type=jnp.float32)
        logits_BTV = softcap(constrain(logits_BTV, ("batch", "length", "vocab")), self.config.logit_softcap)
        return jnp.where(jnp.arange(w_VD.shape[0])[None, None] < self.config.vocab_size, logits_BTV, -jnp.inf)

    def output_weights(self) -> jax.Array:
        """The output layer, [V, D], float32: the embedding itself where they are tied."""
        return (self.embed if self.head is None else self.head).get_value()

    def _run(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        attend: Attend,
        caches: Any,
        key: jax.Array | None,
    ) -> tuple[jax.Array, Any]:
        config = self.config
        embed_key, layer_keys = None, None
        if key is not None and config.dropout:
            embed_key, layer_key = jax.random.split(key)
            layer_keys = jax.random.split(layer_key, config.num_layers)
        with jax.named_scope("embed"):
            # Tables are gathered over fsdp first: looking rows up in split columns would copy the activations instead.
            x_BTD = constrain(self.embed.get_value(), ("vocab", "width"))[tokens_BT]
            if self.positions is not None:
                x_BTD = x_BTD + constrain(self.positions.get_value(), ("positions", "width"))[positions_BT]
            x_BTD = constrain(x_BTD.astype(config.dtype), ("batch", "length", "width"))
            x_BTD = dropout(x_BTD, config.dropout, embed_key)

        def apply(block, x_BTD, cache, key):
            return block(x_BTD, positions_BT, attend, cache=cache, key=key)

        with jax.named_scope("blocks"):
            x_BTD, caches = stack.run(
                self.blocks,
                x_BTD,
                apply,
                caches=caches,
                keys=layer_keys,
                remat=config.remat,
                scan=config.scan_layers,
            )
        return self.norm(x_BTD), caches
