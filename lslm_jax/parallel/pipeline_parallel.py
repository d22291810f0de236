"""Layers split into stages that work side by side, each on another part of the batch (GPipe, Huang et al. 2019).

Stage s holds layers s n .. (s + 1) n - 1 and passes what they make of one part of the batch, a microbatch, on to stage
s + 1. With several rounds (Narayanan et al. 2021) it holds as many smaller groups of layers instead, S groups apart;
the last stage passes on to the first, and parts come S at a time, so that a part is back just when its stage is free.
At time t, stage s works at u = t - s of its own clock, which is the same for all:

  part (u // (S R)) S + u % S,  round u // S % R

Of M R + S - 1 times, where S divides M or R is 1, a stage idles S - 1: more parts or more rounds make that little.

Stages are the only mesh axis that is written by hand (`jax.shard_map`); the compiler splits rows, heads and weights
over the others as it does without a pipeline. Were stages a dimension to map over (Xu et al. 2021, 3.3), cuDNN's
attention could not tell packed documents apart, since its call cannot be mapped; and it would be up to the compiler
that weights stay where they are. What is told of a part's rows travels with it.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lslm_jax.models import stack
from lslm_jax.parallel.sharding import constrain, num_shards, resolve


def num_times(parts: int, stages: int, rounds: int) -> int:
    """Times at which all stages do a group of layers each, until the last part has left the last stage."""
    return int(_leaves(parts, stages, rounds)[-1]) + 1


def idle(parts: int, stages: int, rounds: int) -> float:
    """The share of its time for which a stage has nothing to do."""
    return 1.0 - parts * rounds / num_times(parts, stages, rounds)


def num_parts(rows: int, stages: int, rounds: int, most: int) -> int:
    """Into how many equal parts of `rows` rows, at most so many, a batch is split: those that leave stages least idle.

    Args:
      rows: of each device that holds other rows than its neighbour.
      stages: S.
      rounds: R.
      most: 0: 4 for each stage.
    """
    wanted = [n for n in range(1, min(rows, most or 4 * stages) + 1) if rows % n == 0]
    return min(wanted, key=lambda n: idle(n, stages, rounds))


def _enters(parts: int, stages: int, rounds: int) -> np.ndarray:
    """When each part begins its first round."""
    part_M = np.arange(parts)
    return part_M // stages * stages * rounds + part_M % stages


def _leaves(parts: int, stages: int, rounds: int) -> np.ndarray:
    """When each part is done by the last stage for the last time."""
    return _enters(parts, stages, rounds) + stages * rounds - 1


def splits(num_layers: int, rounds: int) -> bool:
    """Whether the mesh in use splits so many layers into stages that pass each part so often."""
    stages = num_shards("layers")
    return stages > 1 and num_layers % (stages * rounds) == 0


def run(
    layers: Any,
    x_BTD: jax.Array,
    reading: Callable[[Any, Any], Callable[..., tuple[jax.Array, Any]]],
    rows: Any,
    shared: Any,
    *,
    beside: Any,
    keys: jax.Array | None,
    remat: str,
    parts: int,
    rounds: int,
) -> tuple[jax.Array, Any]:
    """What `stack.run` makes of x with `reading(rows, shared)` as its `apply`, by stages; without caches.

    Of each layer and each part the backward pass keeps what `remat` says, as it would without stages, and that of the
    idle times besides: with `full`, x of n layers at M R + S - 1 times, (L / S) (1 + (S - 1) / (M R)) [B, T, D] in all.

    Args:
      layers: from `stack.stacked`; stages times rounds must divide their number.
      x_BTD: what the first layer reads.
      reading: makes the forward pass of one layer for some rows.
      rows: what is told of each row, arrays [B, ...] or None.
      shared: what is told of all.
      beside: what each layer reads besides, stacked.
      keys: one dropout key a layer, or None; each part makes its own of it.
      remat: as in `stack.run`.
      parts: as `most` of `num_parts`.
      rounds: R.

    Returns:
      The last layer's output; and what each layer says besides of each part, [L, M, ...], where part m has every M-th
      row from m on.
    """
    place, stages = resolve(("layers",)), num_shards("layers")
    shards = num_shards("batch")
    M = num_parts(len(x_BTD) // math.gcd(len(x_BTD), shards), stages, rounds, parts)

    def split(a: jax.Array) -> jax.Array:
        # Every M-th row goes together, so that each device works on rows that it already holds.
        a = jnp.moveaxis(a.reshape(-1, M, *a.shape[1:]), 1, 0)
        a = constrain(a, (None, "batch", "length", *[None] * (a.ndim - 3)))
        return copied(a)

    # A copy for each stage, whose gradients the compiler adds up: were one array everybody's, they would be added up by
    # hand in its own type, at which XLA for CPUs gives up if that is bfloat16.
    copied = lambda a: jnp.broadcast_to(a[None], (stages, *a.shape))
    told = jax.tree.map(split, (x_BTD, rows)), jax.tree.map(copied, shared)
    one = functools.partial(_stage, reading, place[0], stages, rounds, remat)
    y_SMBTD, said_RS = jax.shard_map(
        one,
        axis_names={place[0]},
        in_specs=(place, PartitionSpec(), place),
        out_specs=(place, PartitionSpec(None, *place)),
        check_vma=False,
    )(layers, (beside, keys), told)
    y_BTD = jnp.moveaxis(y_SMBTD[-1], 0, 1).reshape(x_BTD.shape)
    said_L = jax.tree.map(lambda a: a.reshape(-1, *a.shape[3:]), said_RS)
    return constrain(y_BTD, ("batch", "length", "width")), said_L


def _stage(
    reading: Any, axis: str, S: int, R: int, remat: str, layers: Any, each: Any, told: Any
) -> tuple[jax.Array, Any]:
    """What one stage says of each part that leaves the last one, [1, M, B, T, D]; and its layers, [R, 1, n, M, ...].

    `layers` are those that lie here, `each` is of all layers, `told` are x and rows, [1, M, B, ...], and the shared.
    """
    parts, shared = jax.tree.map(lambda a: a[0], told)
    s, M = jax.lax.axis_index(axis), len(parts[0])
    groups = _deal(layers, axis, S, R)
    beside, keys = jax.tree.map(lambda a: a.reshape(R, S, -1, *a.shape[1:])[:, s], each)
    times = num_times(M, S, R)
    # Which part waits at the first stage; at times when none begins, nobody looks.
    waiting = np.minimum(np.searchsorted(_enters(M, S, R), np.arange(times)), M - 1)

    def work(state: Any, now: Any) -> tuple[Any, Any]:
        t, fresh = now
        u = t - s
        part, turn = u // (S * R) * S + u % S, u // S % R
        x_BTD, rows = jax.tree.map(functools.partial(jnp.where, (s == 0) & (turn == 0)), fresh, state)
        mine, my_beside, my_keys = jax.tree.map(lambda a: a[0] if R == 1 else a[turn], (groups, beside, keys))
        my_keys = None if my_keys is None else jax.vmap(lambda key: jax.random.fold_in(key, part))(my_keys)
        apply = reading(rows, shared)
        y_BTD, said = stack.run(mine, x_BTD, apply, caches=my_beside, keys=my_keys, remat=remat)
        passed = jax.tree.map(lambda a: jax.lax.ppermute(a, axis, [(i, (i + 1) % S) for i in range(S)]), (y_BTD, rows))
        return passed, (y_BTD, said)

    empty = jax.tree.map(lambda a: jnp.zeros_like(a[0]), parts)
    fresh = jax.tree.map(lambda a: a[waiting], parts)
    _, (y_NBTD, said_N) = jax.lax.scan(work, empty, (jnp.arange(times), fresh))
    when_RM = np.arange(R)[:, None] * S + _enters(M, S, R)[None] + s
    said_RM = jax.tree.map(lambda a: a[when_RM], said_N)
    return y_NBTD[_leaves(M, S, R)][None], jax.tree.map(lambda a: jnp.moveaxis(a, 1, 2)[:, None], said_RM)


def _deal(layers: Any, axis: str, S: int, R: int) -> Any:
    """The groups of layers that this stage works through, [R, n, ...], from those next to each other that lie here.

    Of all S R groups, g lies at stage g // R and is worked through by stage g % S, as its round g // S.
    """
    layers = jax.tree.map(lambda a: a.reshape(R, -1, *a.shape[1:]), layers)
    if R == 1:
        return layers
    s = jax.lax.axis_index(axis)
    # R times each stage gives one away and gets one: these are the ways to choose so that no two go to one stage.
    gives_RS = (np.arange(R)[:, None] + np.arange(S)[None] * math.gcd(R, S) // S) % R
    group_RS = np.arange(S)[None] * R + gives_RS
    came_SR = np.array([[np.argwhere(group_RS == r * S + to)[0, 0] for r in range(R)] for to in range(S)])

    def exchange(a: jax.Array) -> jax.Array:
        got = [
            jax.lax.ppermute(a[jnp.asarray(gives_S)[s]], axis, list(enumerate((group_S % S).tolist())))
            for gives_S, group_S in zip(gives_RS, group_RS, strict=True)
        ]
        return jnp.stack(got)[jnp.asarray(came_SR)[s]]

    return jax.tree.map(exchange, layers)
