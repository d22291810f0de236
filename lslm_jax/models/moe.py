"""A mixture of experts: many MLPs, of which each token goes through the few that a router picks for it."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lslm_jax.config import ModelConfig
from lslm_jax.kernels.grouped_matmul import block_size, grouped_dot, lay_out
from lslm_jax.models.layers import ACTIVATIONS, constant, normal, residual_std, weight_std
from lslm_jax.parallel.sharding import beside_weights, constrain


class Routing(NamedTuple):
    """How tokens were sent; of one layer, or with a leading L of many. Padding counts nowhere. All float32.

    Balance is told row by row, so that it depends neither on the mesh nor on how a batch is parted (DeepSeek-V3,
    sequence-wise).

    Attributes:
      balance_B: E sum_e f_e p_e of a row (Fedus et al. 2022), where f_e is the share of its choices that are expert e
        and p_e the mean probability of e; 1 where all are even, E where all go to one.
      router_z_B: mean over a row of the squared log-normaliser of the router (Zoph et al. 2022).
      load_E: choices of each expert, over all rows.
      dropped: choices that were more than an expert takes.
    """

    balance_B: jax.Array
    router_z_B: jax.Array
    load_E: jax.Array
    dropped: jax.Array


class Weights(nnx.Module):
    """Weights w, and biases b or None, that someone else multiplies with."""

    def __init__(self, key: jax.Array, axes: dict[str, int], std: float, bias: dict[str, int] | None = None):
        """Args: axes and bias map the logical name of each axis to its size."""
        self.w = normal(key, list(axes.values()), list(axes), std)
        self.b = constant(0.0, list(bias.values()), list(bias)) if bias else None


class Experts(nnx.Module):
    """In place of an MLP: the sum of what k of E MLPs say of a token, weighted by the router's probabilities."""

    def __init__(self, config: ModelConfig, key: jax.Array, *, sublayers: int):
        keys = jax.random.split(key, 4)
        E, D, F = config.num_experts, config.d_model, config.d_ff
        experts, width, hidden = {"experts": E}, {"embed": D}, {"mlp": F}
        std, bias = weight_std(config, D), experts | hidden if config.bias else None
        self.config = config
        self.up = Weights(keys[0], experts | width | hidden, std, bias)
        self.gate = Weights(keys[1], experts | width | hidden, std, bias) if config.gated else None
        down_std, down_bias = residual_std(config, F, sublayers), experts | {"width": D} if config.bias else None
        self.down = Weights(keys[2], experts | hidden | width, down_std, down_bias)
        self.router = Weights(keys[3], width | {"routes": E}, std)

    def __call__(self, x_BTD: jax.Array, real_BT: jax.Array | None, capacity: float) -> tuple[jax.Array, Routing]:
        """Maps [B, T, D] to [B, T, D].

        Args:
          x_BTD: tokens.
          real_BT: which of them are not padding, which no expert sees. None: all.
          capacity: of an expert, relative to its even share of a row's choices. 0: it takes all.
        """
        config, dtype = self.config, x_BTD.dtype
        E, k = config.num_experts, config.experts_per_token
        w_DE = self.router.w.get_value().astype(dtype)
        logits_BTE = jnp.einsum("btd,de->bte", x_BTD, w_DE, preferred_element_type=jnp.float32)
        logits_BTE = constrain(logits_BTE, ("batch", "length", None))
        most = math.ceil(capacity * k * x_BTD.shape[1] / E)
        expert_BTK, weight_BTK, routing = route(logits_BTE, k, real_BT, normalize=config.expert_normalize, most=most)
        number_E = nnx.Variable(jnp.arange(E), axes=("experts",))
        parts = {"up": self.up, "gate": self.gate, "down": self.down.w, "number": number_E}
        out_BTD = beside_weights(
            functools.partial(_mix, config, most), (x_BTD, expert_BTK, weight_BTK.astype(dtype)), parts
        )
        if self.down.b is not None:
            weight_BTE = jnp.sum(weight_BTK[..., None] * jax.nn.one_hot(expert_BTK, E), axis=2)
            out_BTD = out_BTD + weight_BTE.astype(dtype) @ self.down.b.get_value().astype(dtype)
        return out_BTD, routing


def route(
    logits_BTE: jax.Array, k: int, real_BT: jax.Array | None = None, *, normalize: bool = True, most: int = 0
) -> tuple[jax.Array, jax.Array, Routing]:
    """Which k experts each token goes to, and how much each counts.

    Args:
      logits_BTE: of the router, float32.
      k: experts a token.
      real_BT: which tokens are not padding. None: all.
      normalize: whether the k probabilities are divided by their sum.
      most: choices of a row that an expert takes, from the first token on, so that no choice depends on what comes
        later; the others are dropped. 0: all.

    Returns:
      Experts [B, T, K], E where there is none; their weights, float32; statistics.
    """
    E = logits_BTE.shape[-1]
    real_BT = jnp.ones(logits_BTE.shape[:2], bool) if real_BT is None else real_BT
    probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    expert_BTK = _likeliest(probability_BTE, k)
    choice_BTKE = jax.nn.one_hot(expert_BTK, E)
    weight_BTK = jnp.sum(choice_BTKE * probability_BTE[:, :, None], axis=-1)
    if normalize:
        weight_BTK = weight_BTK / jnp.sum(weight_BTK, axis=-1, keepdims=True)
    choice_BTKE = jnp.where(real_BT[..., None, None], choice_BTKE, 0.0)

    tokens_B = jnp.maximum(jnp.sum(real_BT, axis=1), 1).astype(jnp.float32)
    probability_BE = jnp.sum(jnp.where(real_BT[..., None], probability_BTE, 0.0), axis=1)
    choice_BTE = jnp.sum(choice_BTKE, axis=2)
    balance_B = E / k * jnp.sum(jnp.sum(choice_BTE, axis=1) * probability_BE, axis=-1) / jnp.square(tokens_B)
    normalizer_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
    router_z_B = jnp.sum(jnp.where(real_BT, jnp.square(normalizer_BT), 0.0), axis=1) / tokens_B
    load_E = jnp.sum(choice_BTE, axis=(0, 1))
    if most:
        fits_BTE = jnp.cumsum(choice_BTE, axis=1) <= most
        choice_BTKE = jnp.where(fits_BTE[:, :, None], choice_BTKE, 0.0)
    is_taken_BTK = jnp.sum(choice_BTKE, axis=-1) > 0
    routing = Routing(balance_B, router_z_B, load_E, jnp.sum(load_E) - jnp.sum(is_taken_BTK))
    return jnp.where(is_taken_BTK, expert_BTK, E), jnp.where(is_taken_BTK, weight_BTK, 0.0), routing


def of_parts(found: Routing) -> Routing:
    """Of all rows, what was told of parts of them, [L, M, ...], where part m has every M-th row from m on."""
    all_rows = lambda a_LMB: jnp.swapaxes(a_LMB, 1, 2).reshape(len(a_LMB), -1)
    return Routing(
        all_rows(found.balance_B), all_rows(found.router_z_B), jnp.sum(found.load_E, 1), jnp.sum(found.dropped, 1)
    )


def _likeliest(probability_BTE: jax.Array, k: int) -> jax.Array:
    """The k likeliest, the first of equals; `jax.lax.top_k` would bring the whole batch to every device."""
    found = []
    for _ in range(k):
        found.append(jnp.argmax(probability_BTE, axis=-1))
        is_found_BTE = found[-1][..., None] == jnp.arange(probability_BTE.shape[-1])[None, None]
        probability_BTE = jnp.where(is_found_BTE, -1.0, probability_BTE)
    return jnp.stack(found, axis=-1).astype(jnp.int32)


def _mix(
    config: ModelConfig, most: int, parts: Any, x_BTD: jax.Array, expert_BTK: jax.Array, weight_BTK: jax.Array
) -> jax.Array:
    """What the experts at hand, G of all, say of the tokens that go to them, weighted: [B, T, D]."""
    number_G = parts["number"].get_value()
    (B, T, k), G = expert_BTK.shape, len(number_G)
    act, block = ACTIVATIONS[config.activation], block_size(B * T * k, config.num_experts)
    rows = B * (min(T * min(k, G), most * G) if most else T * min(k, G))
    group_N = expert_BTK.reshape(-1) - number_G[0]  # experts that are elsewhere, and none, are not in 0..G-1
    places = lay_out(group_N, G, rows, block)
    x_RD = x_BTD.reshape(B * T, -1).at[places.row_R // k].get(mode="fill", fill_value=0)

    def project(part: Weights) -> jax.Array:
        y_RF = grouped_dot(x_RD, part.w.get_value().astype(x_RD.dtype), places.ends_G, block)
        if part.b is None:
            return y_RF
        group_R = jnp.searchsorted(places.ends_G, jnp.arange(len(x_RD)) // block, side="right")
        return y_RF + part.b.get_value().astype(x_RD.dtype).at[group_R].get(mode="clip")

    up_RF = project(parts["up"])
    hidden_RF = act(up_RF) if parts["gate"] is None else act(project(parts["gate"])) * up_RF
    y_RD = grouped_dot(hidden_RF, parts["down"].get_value().astype(x_RD.dtype), places.ends_G, block)
    y_BTKD = y_RD.at[places.place_N].get(mode="fill", fill_value=0).reshape(B, T, k, -1)
    return jnp.einsum("btkd,btk->btd", y_BTKD, weight_BTK)
