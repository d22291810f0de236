"""Tokens to vectors and vectors back to tokens: what models of every family begin and end with."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.data.batch import Batch
from lslm_jax.models.attention import Backend
from lslm_jax.models.layers import INIT_STD, Norm, constant, dropout, normal, sinusoids, softcap
from lslm_jax.models.moe import Routing
from lslm_jax.parallel.sharding import constrain

VOCAB_MULTIPLE = 128  # matrix units and the tensor axis like round sizes


def padded_vocab(config: ModelConfig) -> int:
    """Rows of the embedding: the vocabulary rounded up. The rows beyond it are never read nor predicted."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Embedding(nnx.Module):
    """A model's tables, and its output layer over the vocabulary; one for source and target where there are both."""

    def __init__(self, config: ModelConfig, keys: Sequence[jax.Array], *, head: bool = True):
        """Args: keys of tokens, positions and output layer; head: whether the model says tokens at all."""
        D, V = config.d_model, padded_vocab(config)
        fan_in = config.init == "fan_in"
        # Scaled or not, tokens then come to N(0, 1), and so do what is added to them.
        table_std = 1.0 if fan_in else INIT_STD
        token_std = D**-0.5 if fan_in and config.embed_scale else table_std
        head_std = D**-0.5 if fan_in else INIT_STD
        self.config = config
        self.embed = normal(keys[0], [V, D], ["vocab", "embed"], token_std)
        learned = config.positions == "learned"
        table = [config.position_offset + config.max_length, D]
        self.positions = normal(keys[1], table, ["positions", "embed"], table_std) if learned else None
        types_key = jax.random.fold_in(keys[1], 1)
        types = [config.token_types, D]
        self.types = normal(types_key, types, ["types", "embed"], table_std) if config.token_types else None
        self.embed_norm = Norm(config, {"width": D}) if config.embed_norm else None
        untied = head and not config.tie_embeddings
        self.head = normal(keys[2], [V, D], ["vocab", "embed"], head_std) if untied else None
        self.output_bias = constant(0.0, [V], ["vocab"]) if head and config.output_bias else None

    def look_up(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        types_BT: jax.Array | None = None,
        key: jax.Array | None = None,
    ) -> jax.Array:
        """What the first block reads, [B, T, D]. Types None: all are the first. Key None: no dropout."""
        config = self.config
        with jax.named_scope("embed"):
            # Tables are gathered over fsdp first: looking rows up in split columns would copy the activations instead.
            x_BTD = constrain(self.embed.get_value(), ("vocab", "width"))[tokens_BT]
            if config.embed_scale:
                x_BTD = x_BTD * math.sqrt(config.d_model)
            if self.positions is not None:
                table_PD = constrain(self.positions.get_value(), ("positions", "width"))
                x_BTD = x_BTD + table_PD[config.position_offset + positions_BT]
            if config.positions == "sinusoidal":
                x_BTD = x_BTD + sinusoids(positions_BT, config.d_model)
            if self.types is not None:
                types_BT = jnp.zeros_like(tokens_BT) if types_BT is None else types_BT
                x_BTD = x_BTD + constrain(self.types.get_value(), ("types", "width"))[types_BT]
            if self.embed_norm is not None:
                x_BTD = self.embed_norm(x_BTD)
            x_BTD = constrain(x_BTD.astype(config.activations), ("batch", "length", "width"))
            return dropout(x_BTD, config.dropout, key)

    def features(self, batch: Batch, *, backend: Backend, key: jax.Array | None = None) -> jax.Array:
        """What the output layer reads for each target of a batch, [B, P, D]."""
        return self.features_and_routing(batch, backend=backend, key=key)[0]

    def features_and_routing(
        self, batch: Batch, *, backend: Backend, key: jax.Array | None = None
    ) -> tuple[jax.Array, Routing | None]:
        """The same, and how each layer, of the encoder first, sent tokens to experts, where there are any."""
        raise NotImplementedError

    def finish(self, x_BTD: jax.Array) -> jax.Array:
        """The final hidden state as the output layer reads it."""
        return x_BTD / math.sqrt(self.config.d_model) if self.config.logit_scale else x_BTD

    def logits(self, x_BTD: jax.Array) -> jax.Array:
        """Scores of every token, [B, T, V], float32; those of the padding of the vocabulary are -inf."""
        w_VD, b_V = self.output()
        logits_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
        if b_V is not None:
            logits_BTV += b_V[None, None]
        logits_BTV = softcap(constrain(logits_BTV, ("batch", "length", "vocab")), self.config.logit_softcap)
        return jnp.where(jnp.arange(w_VD.shape[0])[None, None] < self.config.vocab_size, logits_BTV, -jnp.inf)

    def output(self) -> tuple[jax.Array, jax.Array | None]:
        """The output layer: weights [V, D], the embedding itself where they are tied, and bias [V] or None; float32."""
        weights_VD = (self.embed if self.head is None else self.head).get_value()
        return weights_VD, None if self.output_bias is None else self.output_bias.get_value()


def places(tokens_BT: jax.Array, positions_BT: jax.Array | None) -> jax.Array:
    """The positions given, or else 0..T-1, [1, T] for all rows: what is made of them is made once."""
    return jnp.arange(tokens_BT.shape[1])[None] if positions_BT is None else positions_BT
