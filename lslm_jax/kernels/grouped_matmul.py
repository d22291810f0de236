"""Rows sorted by group, each multiplied with the matrix of its group: what a mixture of experts is made of.

Groups have any size, and none is cut. So that shapes are static, rows lie in blocks, each of one group; the last block
of a group is filled up with zeros, and as many blocks are worked on as are in use.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

SAVED = "grouped_dot"  # under this name the products can be kept for the backward pass

_MAX_BLOCK, _MIN_BLOCK = 512, 8
_MAX_TILE = 1024  # of either side of a weight's gradient, in a TPU's kernel


class Layout(NamedTuple):
    """Where rows lie in blocks; N rows, G groups, R places of all blocks.

    Attributes:
      row_R: which row lies in a place; N where none does.
      place_N: where a row lies; R where it has no group.
      ends_G: the number of blocks of a group and of those before it.
    """

    row_R: jax.Array
    place_N: jax.Array
    ends_G: jax.Array


def block_size(rows: int, groups: int) -> int:
    """Rows of a block: a quarter of what a group has on average, so that little is filled up; a power of two."""
    wanted = max(rows // (4 * groups), 1)
    return min(max(1 << (wanted.bit_length() - 1), _MIN_BLOCK), _MAX_BLOCK)


def lay_out(group_N: jax.Array, groups: int, most: int, block: int) -> Layout:
    """Lays rows out by group, in the order they come in.

    Args:
      group_N: of each row; whoever is not in 0..groups-1 has none.
      groups: how many there are, G.
      most: rows that have a group, at most.
      block: from `block_size`.
    """
    N, places = len(group_N), (-(-most // block) + groups) * block
    is_in_NG = (group_N[:, None] == jnp.arange(groups)[None]).astype(jnp.int32)
    count_NG = jnp.cumsum(is_in_NG, axis=0)  # of the group, up to and with this row
    blocks_G = -(-count_NG[-1] // block)
    ends_G = jnp.cumsum(blocks_G)
    place_NG = ((ends_G - blocks_G) * block - 1)[None] + count_NG
    place_N = jnp.where(jnp.any(is_in_NG > 0, axis=1), jnp.sum(is_in_NG * place_NG, axis=1), places)
    row_R = jnp.full(places, N, jnp.int32).at[place_N].set(jnp.arange(N), mode="drop")
    return Layout(row_R, place_N, ends_G)


def grouped_dot(x_RD: jax.Array, w_GDF: jax.Array, ends_G: jax.Array, block: int) -> jax.Array:
    """Each row times the matrix of its group: [R, F]; places in blocks behind the last group hold anything.

    On TPUs this is `jax.lax.ragged_dot`, which XLA has a kernel for there. On GPUs and CPUs XLA makes of that a product
    of all rows with the matrices of all groups, masked: so here it is a loop over the blocks that are in use.

    Args:
      x_RD: rows as a Layout has them.
      w_GDF: a matrix for each group, of the type of x.
      ends_G: of the Layout.
      block: rows of a block.
    """
    y_RF: Any = _grouped_dot(x_RD, w_GDF, ends_G, block)
    return checkpoint_name(y_RF, SAVED)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _grouped_dot(x_RD, w_GDF, ends_G, block):
    return jax.lax.platform_dependent(
        x_RD, w_GDF, ends_G, tpu=functools.partial(_ragged, block), default=functools.partial(_products, block, 0)
    )


def _forward(x_RD, w_GDF, ends_G, block):
    return _grouped_dot(x_RD, w_GDF, ends_G, block), (x_RD, w_GDF, ends_G)


def _backward(block, saved, dy_RF):
    dx_RD, dw_GDF = jax.lax.platform_dependent(
        *saved,
        dy_RF,
        tpu=functools.partial(_ragged_gradients, block),
        default=functools.partial(_gradients, block),
    )
    return dx_RD, dw_GDF, None


_grouped_dot.defvjp(_forward, _backward)


def _ragged(block, x_RD, w_GDF, ends_G):
    return jax.lax.ragged_dot(x_RD, w_GDF, block * jnp.diff(ends_G, prepend=0))


def _ragged_gradients(block, x_RD, w_GDF, ends_G, dy_RF, interpret=False):
    # XLA would make of the second one a product of all rows with those of all groups, masked.
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    tiling = block, min(_MAX_TILE, x_RD.shape[1]), min(_MAX_TILE, dy_RF.shape[1])
    sizes_G = block * jnp.diff(ends_G, prepend=0)
    dw_GDF = tgmm(x_RD.T, dy_RF, sizes_G, preferred_element_type=w_GDF.dtype, tiling=tiling, interpret=interpret)
    return _ragged(block, dy_RF, w_GDF.swapaxes(1, 2), ends_G), dw_GDF


def _products(block, contract, x_RD, w_GDF, ends_G):
    """The loop; with `contract` 1, rows are multiplied with the transposed matrices."""

    def body(i, y_RF):
        w_DF = w_GDF[jnp.sum(ends_G <= i)]
        y_MF = jax.lax.dot_general(_block(x_RD, i, block), w_DF, (((1,), (contract,)), ((), ())))
        return jax.lax.dynamic_update_slice_in_dim(y_RF, y_MF, i * block, 0)

    outputs = w_GDF.shape[2 - contract]
    return jax.lax.fori_loop(0, ends_G[-1], body, jnp.zeros((len(x_RD), outputs), x_RD.dtype))


def _gradients(block, x_RD, w_GDF, ends_G, dy_RF):
    def of_group(bounds):
        def body(i, dw_DF):
            x_MD, dy_MF = _block(x_RD, i, block), _block(dy_RF, i, block)
            return dw_DF + jnp.einsum("md,mf->df", x_MD, dy_MF, preferred_element_type=jnp.float32)

        start, end = bounds
        return jax.lax.fori_loop(start, end, body, jnp.zeros(w_GDF.shape[1:], jnp.float32)).astype(w_GDF.dtype)

    starts_G = jnp.concatenate([jnp.zeros(1, ends_G.dtype), ends_G[:-1]])
    return _products(block, 1, dy_RF, w_GDF, ends_G), jax.lax.map(of_group, (starts_G, ends_G))


def _block(x_RD, i, block):
    return jax.lax.dynamic_slice_in_dim(x_RD, i * block, block, 0)
