"""Attention a block at a time: the products of one block of queries with one of keys are all that exists at once.

A running softmax takes in block after block of keys (Milakov and Gimelshein 2018); the backward pass works the
products out again from the normalisers that the forward pass left (FlashAttention, Dao et al. 2022). Blocks that
causality or the window hides altogether are passed over. All that the reference can do, this can too.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lslm_jax.kernels.fused_attention import SAVED
from lslm_jax.models.layers import near, relative_bias, softcap

BLOCK = 512  # queries and keys of a block, at most


class Options(NamedTuple):
    """What attention sees, and how products become logits; see `attention.attend`.

    Attributes:
      causal: whether a query sees only what is before it.
      window: how far it sees, 0: all the way.
      cap: of the products, 0: none.
      farthest: distance from which on all have the same bias.
    """

    causal: bool
    window: int
    cap: float = 0.0
    farthest: int = 0


class Queries(NamedTuple):
    """Blocks of queries, of all N or of one, in groups that share keys; their places; None, or their segments."""

    q_NBKTGC: jax.Array
    first_N: Any
    segments_NBT: Any


class Keys(NamedTuple):
    """Blocks of keys and values, of all J or of one; None, or their segments."""

    k_JBKSC: jax.Array
    v_JBKSC: jax.Array
    segments_JBS: Any


def attend(
    options: Options,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    starts_N: jax.Array,
    segments: tuple[jax.Array, ...] = (),
    everywhere: jax.Array | None = None,
    table_NH: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, H, C] of queries from anywhere in a row to all of its keys.

    Args:
      options: see there.
      q_BTHC: queries, already scaled: N stretches of equal length, one behind the other.
      k_BSKC: keys, from the beginning of the row.
      v_BSKC: values.
      starts_N: place of each stretch's first query in the row.
      segments: those of queries [B, T] and of keys [B, S], or none. A query that sees no key says 0.
      everywhere: a boolean: whether the window is ignored.
      table_NH: of `layers.relative_bias`.
    """
    B, T, H, C = q_BTHC.shape
    S, K = k_BSKC.shape[1:3]
    stretch = T // starts_N.shape[0]
    block, source_block = _divisor(stretch), _divisor(S)
    segments_BT, source_BS = segments or (None, None)
    queries = Queries(
        jnp.moveaxis(_cut(q_BTHC.reshape(B, T, K, H // K, C), block), 3, 2),
        (starts_N[:, None] + jnp.arange(0, stretch, block)[None]).reshape(-1),
        None if segments_BT is None else _cut(segments_BT, block),
    )
    keys = Keys(
        jnp.moveaxis(_cut(k_BSKC, source_block), 3, 2),
        jnp.moveaxis(_cut(v_BSKC, source_block), 3, 2),
        None if source_BS is None else _cut(source_BS, source_block),
    )
    out_NBKTGC: Any = _attend(options, queries, keys, everywhere, table_NH)
    return jnp.transpose(out_NBKTGC, (1, 0, 3, 2, 4, 5)).reshape(B, T, H, C)


def _cut(x_BT: jax.Array, size: int) -> jax.Array:
    """Maps [B, T, ...] to [blocks, B, size, ...]."""
    return jnp.moveaxis(x_BT.reshape(x_BT.shape[0], -1, size, *x_BT.shape[2:]), 1, 0)


def reach(
    options: Options, first: Any, length: int, blocks: int, size: int, everywhere: jax.Array | None = None
) -> tuple[Any, Any]:
    """Which blocks of `size` keys, from the first to before the last, `length` queries from a place on may see."""
    begin, end = 0, blocks
    if options.window:
        begin = jnp.maximum(first - options.window + 1, 0) // size
        end = jnp.minimum((first + length + options.window - 2) // size + 1, blocks)
    if everywhere is not None:
        begin, end = jnp.where(everywhere, 0, begin), jnp.where(everywhere, blocks, end)
    if options.causal:
        end = jnp.minimum((first + length - 1) // size + 1, blocks)
    return begin, end


def _divisor(length: int) -> int:
    return next(n for n in range(min(length, BLOCK), 0, -1) if length % n == 0)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, queries, keys, everywhere, table_NH):
    return _forward(options, queries, keys, everywhere, table_NH)[0]


def _forward(options, queries, keys, everywhere, table_NH):
    def block(_, queries):
        def step(j, carry):
            top_BKTG, total_BKTG, sum_BKTGC = carry
            of_block = jax.tree.map(lambda x: x[j], keys)
            products_BKTGS = _products(queries.q_NBKTGC, of_block.k_JBKSC)
            apart = queries.first_N - j * products_BKTGS.shape[-1]
            logits_BKTGS = _logits(options, products_BKTGS, table_NH, apart)
            logits_BKTGS += _hidden(
                options, queries.segments_NBT, of_block.segments_JBS, logits_BKTGS, apart, everywhere
            )
            higher_BKTG = jnp.maximum(top_BKTG, jnp.max(logits_BKTGS, axis=-1))
            # Where nothing has been seen yet, -inf less -inf would be NaN.
            level_BKTG = jnp.where(jnp.isfinite(higher_BKTG), higher_BKTG, 0.0)
            weights_BKTGS = jnp.exp(logits_BKTGS - level_BKTG[..., None])
            shrink_BKTG = jnp.exp(top_BKTG - level_BKTG)
            total_BKTG = total_BKTG * shrink_BKTG + jnp.sum(weights_BKTGS, axis=-1)
            more_BKTGC = _sum("bktgs,bksc->bktgc", weights_BKTGS.astype(of_block.v_JBKSC.dtype), of_block.v_JBKSC)
            return higher_BKTG, total_BKTG, sum_BKTGC * shrink_BKTG[..., None] + more_BKTGC

        shape = queries.q_NBKTGC.shape
        nothing = jnp.full(shape[:-1], -jnp.inf), jnp.zeros(shape[:-1]), jnp.zeros(shape)
        seen = _seen(options, queries, keys, everywhere)
        top_BKTG, total_BKTG, sum_BKTGC = jax.lax.fori_loop(*seen, step, nothing)
        some_BKTG = total_BKTG > 0
        out_BKTGC = sum_BKTGC / jnp.where(some_BKTG, total_BKTG, 1.0)[..., None]
        normaliser_BKTG = jnp.where(some_BKTG, top_BKTG + jnp.log(total_BKTG), jnp.inf)
        return None, (out_BKTGC.astype(queries.q_NBKTGC.dtype), normaliser_BKTG)

    _, (out_NBKTGC, normaliser_NBKTG) = jax.lax.scan(block, None, queries)
    saved = checkpoint_name(out_NBKTGC, SAVED), checkpoint_name(normaliser_NBKTG, SAVED)
    return saved[0], (queries, keys, everywhere, table_NH, *saved)


def _backward(options, residuals, d_NBKTGC):
    queries, keys, everywhere, table_NH, out_NBKTGC, normaliser_NBKTG = residuals
    dtype = d_NBKTGC.dtype

    def block(gradients, of_block):
        queries, d_BKTGC, out_BKTGC, normaliser_BKTG = of_block
        shared_BKTG = jnp.sum(d_BKTGC.astype(jnp.float32) * out_BKTGC, axis=-1)

        def step(j, carry):
            dq_BKTGC, dk_JBKSC, dv_JBKSC, dtable_NH = carry
            k_BKSC, v_BKSC, segments_BS = jax.tree.map(lambda x: x[j], keys)
            apart = queries.first_N - j * k_BKSC.shape[2]
            products_BKTGS = _products(queries.q_NBKTGC, k_BKSC)
            logits_BKTGS, pull = jax.vjp(lambda x, table: _logits(options, x, table, apart), products_BKTGS, table_NH)
            logits_BKTGS += _hidden(options, queries.segments_NBT, segments_BS, logits_BKTGS, apart, everywhere)
            weights_BKTGS = jnp.exp(logits_BKTGS - normaliser_BKTG[..., None])
            dweights_BKTGS = _sum("bktgc,bksc->bktgs", d_BKTGC, v_BKSC)
            dproducts_BKTGS, more_NH = pull(weights_BKTGS * (dweights_BKTGS - shared_BKTG[..., None]))
            dproducts_BKTGS = dproducts_BKTGS.astype(dtype)
            dk_BKSC = _sum("bktgs,bktgc->bksc", dproducts_BKTGS, queries.q_NBKTGC)
            dv_BKSC = _sum("bktgs,bktgc->bksc", weights_BKTGS.astype(dtype), d_BKTGC)
            return (
                dq_BKTGC + _sum("bktgs,bksc->bktgc", dproducts_BKTGS, k_BKSC),
                dk_JBKSC.at[j].add(dk_BKSC),
                dv_JBKSC.at[j].add(dv_BKSC),
                None if dtable_NH is None else dtable_NH + more_NH,
            )

        seen = _seen(options, queries, keys, everywhere)
        dq_BKTGC, *gradients = jax.lax.fori_loop(*seen, step, (jnp.zeros(d_BKTGC.shape), *gradients))
        return tuple(gradients), dq_BKTGC.astype(dtype)

    zeros: list[Any] = [None if x is None else jnp.zeros(x.shape) for x in (keys.k_JBKSC, keys.v_JBKSC, table_NH)]
    of_blocks = queries, d_NBKTGC, out_NBKTGC, normaliser_NBKTG
    (dk_JBKSC, dv_JBKSC, dtable_NH), dq_NBKTGC = jax.lax.scan(block, tuple(zeros), of_blocks)
    dkeys = Keys(dk_JBKSC.astype(keys.k_JBKSC.dtype), dv_JBKSC.astype(keys.v_JBKSC.dtype), None)
    return Queries(dq_NBKTGC, None, None), dkeys, None, dtable_NH


_attend.defvjp(_forward, _backward)


def _seen(options, queries, keys, everywhere):
    """Blocks of keys that one block of queries must visit."""
    J, _, _, S, _ = keys.k_JBKSC.shape
    return reach(options, queries.first_N, queries.q_NBKTGC.shape[2], J, S, everywhere)


def _products(q_BKTGC, k_BKSC):
    return _sum("bktgc,bksc->bktgs", q_BKTGC, k_BKSC)


def _sum(what, a, b):
    return jnp.einsum(what, a, b, preferred_element_type=jnp.float32)


def _logits(options, products_BKTGS, table_NH, apart):
    """Products, squashed and biased; `apart` is the place of the first query less that of the first key."""
    logits_BKTGS = softcap(products_BKTGS, options.cap)
    if table_NH is None:
        return logits_BKTGS
    _, K, T, G, S = products_BKTGS.shape
    bias_HTS = relative_bias(table_NH, T, S, apart, causal=options.causal, farthest=options.farthest)
    return logits_BKTGS + jnp.swapaxes(bias_HTS.reshape(1, K, G, T, S), 2, 3)


def _hidden(options, segments_BT, segments_BS, like_BKTGS, apart, everywhere):
    """-inf where a query must not look, 0 where it may: [B or 1, 1, T, 1, S]."""
    T, S = like_BKTGS.shape[2], like_BKTGS.shape[4]
    distance_TS = apart + jnp.arange(T)[:, None] - jnp.arange(S)[None]
    seen_TS = near(distance_TS, options.window, everywhere)
    if options.causal:
        seen_TS = seen_TS & (distance_TS >= 0)
    seen_BTS = seen_TS[None]
    if segments_BT is not None:
        seen_BTS = seen_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])
    return jnp.where(seen_BTS, 0.0, -jnp.inf)[:, None, :, None]
