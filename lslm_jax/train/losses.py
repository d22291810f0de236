"""What training minimises: cross-entropy over large vocabularies, squared error, answer spans, balance of experts.

All are sums.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lslm_jax.models.moe import Routing
from lslm_jax.parallel.sharding import constrain, num_shards


class Sums(NamedTuple):
    """Totals over the targets of a batch, each counted by its weight; float32 scalars. Divide once, globally.

    Attributes:
      objective: what training minimises: cross-entropy with smoothed targets, plus the z-loss; or the squared error.
      nll: negative log-likelihood of the targets, in nats; or the squared error.
      correct: how often the target was the likeliest (`cross_entropy`), with the other end of its answer (`span`).
      weight: number of targets that count.
    """

    objective: jax.Array
    nll: jax.Array
    correct: jax.Array
    weight: jax.Array


class RoutingSums(NamedTuple):
    """How a batch was sent to experts: totals, float32.

    Attributes:
      balance: `Routing.balance_B`, mean over layers, of each row as often as it has targets.
      router_z: the same of `Routing.router_z_B`.
      load_LE: choices of each expert.
      dropped: choices over capacity.
    """

    balance: jax.Array
    router_z: jax.Array
    load_LE: jax.Array
    dropped: jax.Array


class Settings(NamedTuple):
    """What `cross_entropy` needs to know besides arrays.

    Attributes:
      vocab_size: rows of the output layer beyond it are padding and get no probability.
      chunk: tokens whose logits exist at once on a device.
      softcap: of the logits, 0 for none.
      z_loss: weight of the squared log-normaliser (Chowdhery et al. 2022).
      label_smoothing: probability spread evenly over the vocabulary (Szegedy et al. 2016).
      narrow: whether logits are written in the compute type, half the memory traffic; all sums are float32.
      summed_first: whether shards add up their gradients of w before the layers' backward pass begins. XLA puts it off,
        and each keeps a whole one meanwhile; where a batch comes in parts that saves a sum for each, so let it.
    """

    vocab_size: int
    chunk: int
    softcap: float = 0.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    narrow: bool = False
    summed_first: bool = False


def cross_entropy(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    settings: Settings,
    b_V: jax.Array | None = None,
) -> Sums:
    """Scores targets against softmax(x w + b), a chunk of tokens at a time: [tokens, V] never exists.

    Only `objective` has a gradient, with respect to x, w and b. It is worked out chunk by chunk together with the loss,
    while the logits are there, instead of computing them again in the backward pass.

    Args:
      x_BTD: final hidden states, in the compute type; T or as many as there are targets in a row.
      w_VD: output layer, float32.
      targets_BT: token ids, or labels.
      weights_BT: how much each target counts.
      settings: see there.
      b_V: bias of the output layer, float32, or None.
    """
    return _cross_entropy(settings, x_BTD, w_VD, b_V, targets_BT, weights_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(settings, x_BTD, w_VD, b_V, targets_BT, weights_BT):
    w, b = _output_layer(x_BTD, w_VD, b_V)

    def body(sums, chunk):
        return jax.tree.map(jnp.add, sums, _score(settings, w, b, *chunk)[0]), None

    zero = jnp.zeros((), jnp.float32)
    return jax.lax.scan(body, Sums(zero, zero, zero, zero), _chunks(settings, x_BTD, targets_BT, weights_BT))[0]


def _forward(settings, x_BTD, w_VD, b_V, targets_BT, weights_BT):
    w, b = _output_layer(x_BTD, w_VD, b_V)
    x_CNSD, targets_CNS, weights_CNS = _chunks(settings, x_BTD, targets_BT, weights_BT)
    N = x_CNSD.shape[1]

    def body(carry, chunk):
        sums, dw_NVD, db_NV = carry
        more, d_NSV, _ = _score(settings, w, b, *chunk)
        dx_NSD = jnp.einsum("nsv,vd->nsd", d_NSV, w)
        dw_NVD += jnp.einsum("nsv,nsd->nvd", d_NSV, chunk[0], preferred_element_type=jnp.float32)
        if db_NV is not None:
            db_NV += jnp.sum(d_NSV, axis=1, dtype=jnp.float32)
        return (jax.tree.map(jnp.add, sums, more), dw_NVD, db_NV), dx_NSD

    # Each shard adds up its own gradients of w and b; they are summed once after the loop, not once a chunk.
    zero = jnp.zeros((), jnp.float32)
    dw_NVD = constrain(jnp.zeros((N, *w.shape), jnp.float32), ("tokens", "vocab", "width"))
    db_NV = None if b is None else constrain(jnp.zeros((N, *b.shape), jnp.float32), ("tokens", "vocab"))
    carry = Sums(zero, zero, zero, zero), dw_NVD, db_NV
    (sums, dw_NVD, db_NV), dx_CNSD = jax.lax.scan(body, carry, (x_CNSD, targets_CNS, weights_CNS))
    dx_BTD = constrain(_together(dx_CNSD, *x_BTD.shape[:2]), ("batch", "length", "width"))
    db_V = None if db_NV is None else constrain(jnp.sum(db_NV, axis=0), ("vocab",))
    dw_VD = constrain(jnp.sum(dw_NVD, axis=0), ("vocab", "embed"))
    if settings.summed_first and N > 1:
        dx_BTD, dw_VD = jax.lax.optimization_barrier((dx_BTD, dw_VD))
    return sums, (dx_BTD, dw_VD, db_V)


def _backward(settings, residuals, cotangent):
    scale = cotangent.objective
    gradients = jax.tree.map(lambda d: d * scale.astype(d.dtype), residuals)
    return (*gradients, None, None)


_cross_entropy.defvjp(_forward, _backward)


def _output_layer(x_BTD, w_VD, b_V):
    """Weights in the compute type and bias, where they are multiplied."""
    return constrain(w_VD.astype(x_BTD.dtype), ("vocab", "width")), None if b_V is None else constrain(b_V, ("vocab",))


def _shards(B, T):
    """Into how many parts the mesh splits rows and positions, where it does so evenly."""
    return num_shards("rows", B), num_shards("length", T)


def _chunks(settings, x_BTD, *per_token_BT):
    """Tokens as [chunks, shards, tokens of a chunk, ...]: cutting within shards moves nothing between devices."""
    B, T, D = x_BTD.shape
    rows, spans = _shards(B, T)
    tokens = B // rows * T // spans
    size = next(n for n in range(min(settings.chunk, tokens), 0, -1) if tokens % n == 0)

    def cut(a, *rest):
        a = jnp.moveaxis(a.reshape(rows, B // rows, spans, T // spans, *rest), 2, 1)
        return jnp.moveaxis(a.reshape(rows * spans, tokens // size, size, *rest), 1, 0)

    return cut(x_BTD, D), *map(cut, per_token_BT)


def _together(a_CNS, B, T):
    """What `_chunks` cut, as [B, T, ...] again."""
    rows, spans = _shards(B, T)
    rest = a_CNS.shape[3:]
    a = jnp.moveaxis(a_CNS, 0, 1).reshape(rows, spans, B // rows, T // spans, *rest)
    return jnp.moveaxis(a, 1, 2).reshape(B, T, *rest)


def _score(settings, w_VD, b_V, x_NSD, targets_NS, weights_NS):
    """The sums of one chunk, the gradient of its objective with respect to the logits, and the NLL of each target.

    The gradient is in the compute type.
    """
    cap, smooth, z = settings.softcap, settings.label_smoothing, settings.z_loss
    capped_NSV, ids_V, real_V = _scores(settings, w_VD, b_V, x_NSD)
    logits_NSV = jnp.where(real_V, capped_NSV, -jnp.inf)
    hit_NSV = ids_V[None, None] == targets_NS[..., None]

    top_NS = jnp.max(logits_NSV, axis=-1)
    normaliser_NS = top_NS + jnp.log(jnp.sum(jnp.exp(logits_NSV - top_NS[..., None]), axis=-1))
    target_NS = jnp.sum(jnp.where(hit_NSV, logits_NSV, 0.0), axis=-1)
    # All sums before the gradient, which is then one pass of its own: a GPU's kernel for both takes half as long again.
    normaliser_NS, target_NS = jax.lax.optimization_barrier((normaliser_NS, target_NS))
    nll_NS = normaliser_NS - target_NS
    objective_NS = nll_NS + z * jnp.square(normaliser_NS)
    if smooth:
        mean_NS = jnp.sum(jnp.where(real_V, logits_NSV, 0.0), axis=-1) / settings.vocab_size
        objective_NS += smooth * (target_NS - mean_NS)

    d_NSV = jnp.exp(logits_NSV - normaliser_NS[..., None]) * (1.0 + 2.0 * z * normaliser_NS)[..., None]
    d_NSV -= jnp.where(hit_NSV, 1.0 - smooth, 0.0) + jnp.where(real_V, smooth / settings.vocab_size, 0.0)
    if cap:
        d_NSV *= 1.0 - jnp.square(capped_NSV / cap)
    d_NSV = (d_NSV * weights_NS[..., None]).astype(x_NSD.dtype)

    totals = (objective_NS, nll_NS, target_NS >= top_NS, jnp.ones_like(nll_NS))
    return Sums(*(jnp.sum(weights_NS * a) for a in totals)), d_NSV, nll_NS


def _scores(settings, w_VD, b_V, x_NSD):
    """The scores of all rows of the output layer, squashed, with the rows' ids and which of them are tokens."""
    dtype = x_NSD.dtype if settings.narrow else jnp.float32
    raw_NSV = jnp.einsum("nsd,vd->nsv", x_NSD, w_VD, preferred_element_type=dtype)
    if settings.narrow:  # the barrier, for XLA is free to write float32 where it is asked for next
        raw_NSV = jax.lax.optimization_barrier(raw_NSV).astype(jnp.float32)
    raw_NSV = constrain(raw_NSV if b_V is None else raw_NSV + b_V[None, None], ("tokens", None, "vocab"))
    cap = settings.softcap
    ids_V = jnp.arange(w_VD.shape[0], dtype=jnp.int32)
    return cap * jnp.tanh(raw_NSV / cap) if cap else raw_NSV, ids_V, (ids_V < settings.vocab_size)[None, None]


def log_probabilities(
    x_BTD: jax.Array, w_VD: jax.Array, targets_BT: jax.Array, settings: Settings, b_V: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """How likely each target is, [B, T] in nats, and whether it is the likeliest, bool [B, T].

    A chunk of tokens at a time, as `cross_entropy`, whose arguments these are; without a gradient. Of tokens that are
    equally likely, the one with the lowest id counts as the likeliest.
    """
    w, b = _output_layer(x_BTD, w_VD, b_V)

    def body(carry, chunk):
        x_NSD, targets_NS = chunk
        scores_NSV, ids_V, real_V = _scores(settings, w, b, x_NSD)
        logits_NSV = jnp.where(real_V, scores_NSV, -jnp.inf)
        target_NS = jnp.sum(jnp.where(ids_V[None, None] == targets_NS[..., None], logits_NSV, 0.0), axis=-1)
        nats_NS = target_NS - jax.nn.logsumexp(logits_NSV, axis=-1)
        return carry, (nats_NS, jnp.argmax(logits_NSV, axis=-1) == targets_NS)

    _, found = jax.lax.scan(body, None, _chunks(settings, x_BTD, targets_BT))
    nats_BT, likeliest_BT = (_together(a_CNS, *targets_BT.shape) for a_CNS in found)
    return nats_BT, likeliest_BT


def cross_entropy_by_target(
    x_BTD: jax.Array,
    w_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    settings: Settings,
    b_V: jax.Array | None = None,
) -> tuple[Sums, jax.Array]:
    """The sums of `cross_entropy`, and the negative log-likelihood of each target they add up, [B, T], in nats.

    The arguments are those of `cross_entropy`; nothing has a gradient.
    """
    w, b = _output_layer(x_BTD, w_VD, b_V)

    def body(sums, chunk):
        more, _, nll_NS = _score(settings, w, b, *chunk)
        return jax.tree.map(jnp.add, sums, more), nll_NS

    zero = jnp.zeros((), jnp.float32)
    chunks = _chunks(settings, x_BTD, targets_BT, weights_BT)
    sums, nll_CNS = jax.lax.scan(body, Sums(zero, zero, zero, zero), chunks)
    return sums, _together(nll_CNS, *targets_BT.shape)


def squared_error(
    x_BPD: jax.Array, w_1D: jax.Array, targets_BP: jax.Array, weights_BP: jax.Array, b_1: jax.Array | None = None
) -> Sums:
    """The squared difference between numbers and x w + b, in float32; nothing is ever `correct`."""
    error_BP = _products(x_BPD, w_1D, b_1)[..., 0] - targets_BP
    total = jnp.sum(weights_BP * jnp.square(error_BP))
    return Sums(total, total, jnp.zeros((), jnp.float32), jnp.sum(weights_BP))


def span(
    x_BTD: jax.Array,
    w_2D: jax.Array,
    targets_B2: jax.Array,
    weights_B2: jax.Array,
    segments_BT: jax.Array | None = None,
    b_2: jax.Array | None = None,
) -> Sums:
    """Cross-entropy of an answer's first and last position among those of its row, each one target.

    Args:
      x_BTD: final hidden states, in the compute type.
      w_2D: output layer of starts and ends, float32.
      targets_B2: positions in the row.
      weights_B2: how much each counts.
      segments_BT: 0 where no answer can be. None: nowhere.
      b_2: bias of the output layer, float32, or None.
    """
    logits_B2T = jnp.swapaxes(_products(x_BTD, w_2D, b_2), 1, 2)
    if segments_BT is not None:
        real_BT = segments_BT > 0
        # A row of nothing but padding weighs 0, but 0 times NaN is NaN.
        real_BT = real_BT | ~jnp.any(real_BT, axis=1, keepdims=True)
        logits_B2T = jnp.where(real_BT[:, None], logits_B2T, -jnp.inf)
    logp_B2T = jax.nn.log_softmax(logits_B2T, axis=-1)
    nll_B2 = -jnp.take_along_axis(logp_B2T, targets_B2[:, :, None], axis=-1)[..., 0]
    both_B1 = jnp.all(jnp.argmax(logits_B2T, axis=-1) == targets_B2, axis=1, keepdims=True)
    total = jnp.sum(weights_B2 * nll_B2)
    return Sums(total, total, jnp.sum(weights_B2 * both_B1), jnp.sum(weights_B2))


def routing(found: Routing, weights_BP: jax.Array) -> RoutingSums:
    """Adds up what layers tell, with a leading L, of each row.

    A row counts by the weight of its targets: so one division by that of the batch does for all that is minimised.
    """
    weight_B = jnp.sum(weights_BP, axis=1)
    total = lambda of_row_LB: jnp.sum(weight_B * jnp.mean(of_row_LB, axis=0))
    return RoutingSums(total(found.balance_B), total(found.router_z_B), found.load_E, jnp.sum(found.dropped))


def routing_metrics(sums: RoutingSums, weight: jax.Array) -> dict[str, jax.Array]:
    """What a step records of its experts, besides the loss; float32 scalars.

    Args:
      sums: of a batch.
      weight: of its targets.

    Returns:
      `balance_loss`, 1 where each row spreads evenly, and `router_z_loss`, both before their weights; `expert_load`,
      the busiest expert's share of a layer relative to the mean, mean over layers; `dropped`, the share of choices
      over capacity.
    """
    choices = jnp.maximum(jnp.sum(sums.load_LE), 1.0)
    mean_L = jnp.maximum(jnp.mean(sums.load_LE, axis=1), 1e-9)
    return {
        "balance_loss": sums.balance / jnp.maximum(weight, 1.0),
        "router_z_loss": sums.router_z / jnp.maximum(weight, 1.0),
        "expert_load": jnp.mean(jnp.max(sums.load_LE, axis=1) / mean_L),
        "dropped": sums.dropped / choices,
    }


def _products(x_BTD, w_VD, b_V):
    """Products with a small output layer, x w + b, in float32."""
    y_BTV = jnp.einsum("btd,vd->btv", x_BTD, w_VD.astype(x_BTD.dtype), preferred_element_type=jnp.float32)
    return y_BTV if b_V is None else y_BTV + b_V[None, None]
