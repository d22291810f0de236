"""Attention in rows whose positions are split over devices: context parallelism.

Each device keeps its queries and gathers the keys and values of its rows, for one layer at a time (Llama 3, Grattafiori
et al. 2024). Ring Attention (Liu et al. 2023) passes them round instead and never holds them whole. They are gathered
here for three reasons. A query takes in its keys in the same order on any number of devices. Any mask will do:
documents, windows, another sequence. And the fused kernel of TPUs, which cannot merge what several calls say and be
differentiated, works as it is; cuDNN's has no mask for queries from the middle of a row, and `attention.choose` refuses
it. Beside the products, which grow with the square of the length, keys and values are few; the backward pass gathers
them anew. All else that a device holds is for its own positions.

Causal work is even only where each device has an early and a late part of the row. Rows are therefore folded for stacks
that look back: cut into twice as many chunks as there are devices, device i gets chunks i and 2n - 1 - i, as in Llama
3; stripes (Brandon et al. 2023) are even too, but hide no block of keys altogether. A stack folds hidden states when
they enter and unfolds them when they leave, so that nothing outside of it knows.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from lslm_jax.kernels import blockwise_attention, fused_attention
from lslm_jax.kernels.blockwise_attention import Options
from lslm_jax.parallel.sharding import axes_of, resolve


def devices_of(length: int) -> int:
    """Over how many devices the mesh in use splits rows of this length."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in axes_of("length", length))


def is_split(*lengths: int) -> bool:
    """Whether the mesh in use splits rows of these lengths, all of them alike."""
    (axes, *others) = {axes_of("length", length) for length in lengths}
    return bool(axes) and not others


def can_fold(length: int) -> bool:
    """Whether rows of this length are split and can be folded."""
    return is_split(length) and length % (2 * devices_of(length)) == 0


def fold(x_BT: jax.Array) -> jax.Array:
    """Moves positions [B, T, ...] so that each device has an early chunk and a late one."""
    return _exchange(_fold, x_BT)


def unfold(x_BT: jax.Array) -> jax.Array:
    """Moves positions back to where they were before `fold`."""
    return _exchange(_unfold, x_BT)


def starts(device: Any, devices: int, length: int, *, folded: bool) -> Any:
    """Places of the first position of each stretch that a device has of a row: one, or two where it is folded."""
    if not folded:
        return (device * (length // devices),)
    chunk = length // (2 * devices)
    return device * chunk, (2 * devices - 1 - device) * chunk


def order(devices: int, length: int, *, folded: bool) -> np.ndarray:
    """The place in the row of each position, as they lie on the devices: int32 [T]."""
    stretch = length // devices // (2 if folded else 1)
    first = np.array([starts(device, devices, length, folded=folded) for device in range(devices)])
    return (first.reshape(-1, 1) + np.arange(stretch)[None]).reshape(-1).astype(np.int32)


def attend(
    name: str,
    options: Options,
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    segments_BT: jax.Array | None,
    source_segments_BS: jax.Array | None,
    *,
    folded: bool,
    everywhere: jax.Array | None = None,
    table_NH: jax.Array | None = None,
) -> jax.Array:
    """Attention [B, T, H, C] of each device's queries to all keys of their rows; see `attention.attend`.

    Args:
      name: of the back end, xla or splash.
      options: see there; splash goes by what is causal and by the window.
      q_BTHC: queries, already scaled.
      k_BSKC: keys.
      v_BSKC: values.
      segments_BT: of queries, or None.
      source_segments_BS: of keys. None: as of queries.
      folded: whether positions are, of queries and keys.
      everywhere: see `blockwise.attend`, as `table_NH`.
    """
    (B, T), (S, K) = q_BTHC.shape[:2], k_BSKC.shape[1:3]
    mesh, axes, devices = jax.sharding.get_abstract_mesh(), axes_of("length", T), devices_of(T)
    shared, shared_specs = (everywhere, table_NH), (PartitionSpec(), resolve((None, "kv_heads"), (1, K), mesh))
    if name == "splash":
        shared, shared_specs = _splash(options, T, S, folded)

    def shard(q_BTHC, k_BSKC, v_BSKC, segments, shared):
        whole = functools.partial(_gather, axes=axes, devices=devices, folded=folded)
        k_BSKC, v_BSKC = whole(k_BSKC), whole(v_BSKC)
        segments = segments and (segments[0], whole(segments[1]))
        if name == "splash":
            return fused_attention.run_splash(shared, q_BTHC, k_BSKC, v_BSKC, segments)
        starts_N = jnp.stack(starts(jax.lax.axis_index(axes), devices, T, folded=folded))
        return blockwise_attention.attend(options, q_BTHC, k_BSKC, v_BSKC, starts_N, segments, *shared)

    # Query heads go where the key heads are that they share. What kernels say is kept, whole keys and values are not.
    heads = resolve(("batch", "length", "kv_heads", "head_dim"), k_BSKC.shape, mesh)
    specs = heads, heads, heads, resolve(("batch", "length"), (B, T), mesh), shared_specs
    remembering = jax.checkpoint(shard, policy=fused_attention.is_kernel_output)
    sharded = jax.shard_map(remembering, in_specs=specs, out_specs=heads, check_vma=False)
    source_BS = segments_BT if source_segments_BS is None else source_segments_BS
    segments = () if segments_BT is None else (segments_BT, source_BS)
    return sharded(q_BTHC, k_BSKC, v_BSKC, segments, shared)


def _splash(options: Options, length: int, source_length: int, folded: bool) -> tuple[Any, Any]:
    """The kernel of all devices, and how its description of the mask is split over them."""
    devices, axes = devices_of(length), axes_of("length", length)
    window = options.window if options.window < length else 0
    if not (options.causal or window):  # each device sees all
        return fused_attention.splash_kernel(length // devices, source_length, False, 0), PartitionSpec()
    places_T = order(devices, length, folded=folded)
    kernel = fused_attention.splash_kernel(length, source_length, options.causal, window, devices, places_T)
    places = NamedSharding(jax.sharding.get_abstract_mesh(), PartitionSpec(None, axes))
    return kernel, kernel.manual_sharding_spec(places)


def _gather(x_BS: jax.Array, axes: tuple[str, ...], devices: int, folded: bool) -> jax.Array:
    """All positions of the rows that a device has a part of, in their order."""
    x_BS = jax.lax.all_gather(x_BS, axes, axis=1, tiled=True)
    if not folded:
        return x_BS
    x_BN2S = x_BS.reshape(x_BS.shape[0], devices, 2, -1, *x_BS.shape[2:])
    return jnp.concatenate([x_BN2S[:, :, 0], x_BN2S[:, ::-1, 1]], axis=1).reshape(x_BS.shape)


def _exchange(how: Callable[..., jax.Array], x_BT: jax.Array) -> jax.Array:
    axes = axes_of("length", x_BT.shape[1])
    names = ("batch", "length", *[None] * (x_BT.ndim - 2))
    spec = resolve(names, x_BT.shape, jax.sharding.get_abstract_mesh())
    run = functools.partial(how, axes=axes, devices=devices_of(x_BT.shape[1]))
    return jax.shard_map(run, in_specs=spec, out_specs=spec)(x_BT)


def _routes(devices: int) -> list[list[tuple[int, int]]]:
    """From and to which device the even chunks go, and the odd ones; each device has, and gets, one of either."""
    home = lambda chunk: min(chunk, 2 * devices - 1 - chunk)
    return [[(i, home(2 * i + odd)) for i in range(devices)] for odd in (0, 1)]


def _fold(x_BT, axes, devices):
    halves = zip(jnp.split(x_BT, 2, axis=1), _routes(devices), strict=True)
    even, odd = (jax.lax.ppermute(half, axes, route) for half, route in halves)
    # Device i has chunk i in front.
    is_even = jax.lax.axis_index(axes) % 2 == 0
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], axis=1)


def _unfold(x_BT, axes, devices):
    front, back = jnp.split(x_BT, 2, axis=1)
    is_even = jax.lax.axis_index(axes) % 2 == 0
    even, odd = jnp.where(is_even, front, back), jnp.where(is_even, back, front)
    routes = ([(home, here) for here, home in route] for route in _routes(devices))
    halves = [jax.lax.ppermute(half, axes, route) for half, route in zip((even, odd), routes, strict=True)]
    return jnp.concatenate(halves, axis=1)
