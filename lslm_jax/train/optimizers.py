"""Learning-rate schedules and optimizers, all from optax."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from lslm_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from `warmup_from` to the peak, then the named shape down to `final_ratio` of it at `steps`."""
    peak, final = config.learning_rate, config.learning_rate * config.final_ratio
    warmup = min(config.warmup_steps, steps)
    rest = max(steps - warmup, 1)
    match config.schedule:
        case "constant":
            after = optax.constant_schedule(peak)
        case "linear":
            after = optax.linear_schedule(peak, final, rest)
        case "cosine":
            after = optax.cosine_decay_schedule(peak, rest, alpha=config.final_ratio)
        case "rsqrt":
            # Counted from the warm-up's end, so that the two meet at the peak (Raffel et al. 2020).
            flat = max(warmup, 1)
            after = lambda count: peak * jnp.sqrt(flat / jnp.maximum(count + flat, 1))
        case "wsd":
            decay = max(steps // 5, 1)
            after = optax.linear_schedule(peak, final, decay, transition_begin=max(rest - decay, 0))
    rise = optax.linear_schedule(peak * config.warmup_from, peak, warmup)
    return optax.join_schedules([rise, after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, the named optimizer on the schedule, a smaller rate for lower layers."""
    rate = schedule(config, steps)
    decay = {"weight_decay": config.weight_decay, "mask": is_decayed}
    match config.name:
        case "sgd":
            core = optax.chain(
                optax.add_decayed_weights(config.weight_decay, is_decayed),
                optax.sgd(rate, momentum=config.b1 or None, nesterov=config.nesterov),
            )
        case "adam":
            core = optax.adam(rate, config.b1, config.b2, config.eps, nesterov=config.nesterov)
        case "adamw":
            core = optax.adamw(rate, config.b1, config.b2, config.eps, nesterov=config.nesterov, **decay)
        case "adafactor":
            core = optax.adafactor(rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=is_decayed)
        case "lion":
            core = optax.lion(rate, config.b1, config.b2, **decay)
        case "muon":
            core = _muon(config, rate)
    if config.moment_dtype == "bfloat16":
        core = _with_short_moments(core)
    before = [optax.clip_by_global_norm(config.clip)] if config.clip else []
    after = [optax.stateless(functools.partial(_scale_by_depth, config.layer_decay))] if config.layer_decay < 1 else []
    return optax.chain(*before, core, *after) if before or after else core


def updates_done(state: Any) -> jax.Array:
    """The optimizer's own count, which skipped steps do not move; the schedule follows it."""
    return optax.tree.get_all_with_path(state, "count")[0][1]


def _with_short_moments(core: optax.GradientTransformation) -> optax.GradientTransformation:
    """The optimizer with all its moments kept as bfloat16; each update is worked out in float32.

    A moment takes in 1 - b of something each step, which is often less than half the distance between two such
    numbers, and rounded to the nearest would never move. It is rounded up or down at random, right on average.
    """
    is_moment = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.ndim > 0
    cast = lambda state, dtype: jax.tree.map(lambda leaf: leaf.astype(dtype) if is_moment(leaf) else leaf, state)

    def init(params: Any) -> Any:
        return cast(core.init(params), jnp.bfloat16)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = core.update(updates, cast(state, jnp.float32), params)
        key = jax.random.key(updates_done(state))
        leaves, structure = jax.tree.flatten(state)
        for i, leaf in enumerate(leaves):
            if is_moment(leaf):
                leaves[i] = _round_at_random(leaf, jax.random.fold_in(key, i))
        return updates, jax.tree.unflatten(structure, leaves)

    return optax.GradientTransformation(init, update)


def _round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """Each float32 as one of the two bfloat16 around it, the nearer one more often: right on average.

    A bfloat16 is the first half of a float32. What is added to the second half carries over as often as that is large.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    carried = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((carried >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))  # a carry would make a number of NaN


_TOP = ("norm", "head", "output_bias", "top")  # what hidden states pass after the last layer


def _scale_by_depth(decay: float, updates: Any, params: Any = None) -> Any:
    """Updates times decay ** n, where n layers and tops lie above: the top moves at the full rate (Bao et al. 2021)."""
    is_param = lambda leaf: isinstance(leaf, nnx.Variable)
    leaves = jax.tree.leaves(updates, is_leaf=is_param)
    depth = max([leaf.shape[0] for leaf in leaves if "layers" in leaf.get_metadata("axes")], default=0)

    def scaled(path: tuple[Any, ...], param: Any) -> Any:
        if param.get_metadata("axes")[0] == "layers":
            rate = decay ** np.arange(param.shape[0], 0, -1, dtype=np.float32)
            return jax.tree.map(lambda update: update * rate.reshape(-1, *[1] * (update.ndim - 1)), param)
        rate = 1.0 if any(part.name in _TOP for part in path) else decay ** (depth + 1)
        return jax.tree.map(lambda update: update * rate, param)

    return jax.tree_util.tree_map_with_path(scaled, updates, is_leaf=is_param)


def _muon(config: OptimizerConfig, rate: optax.Schedule) -> optax.GradientTransformation:
    directions = optax.contrib.muon(
        1.0,
        beta=config.b1,
        eps=config.eps,
        nesterov=config.nesterov,
        adam_b1=config.b1,
        adam_b2=config.b2,
        muon_weight_dimension_numbers=_matrices,
        # Updates as large as Adam's, so that one learning rate does for both (Liu et al. 2025).
        consistent_rms=0.2,
    )
    # The decay that optax offers here would take in biases and norms: its Adam half has no mask.
    decay = optax.add_decayed_weights(-config.weight_decay, is_decayed)
    return optax.chain(directions, decay, optax.scale_by_schedule(rate))


def is_decayed(params: Any) -> Any:
    """True where weights decay: matrices, told by name, for stacked biases and norms have two axes as well."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _owner(path) in ("w", "embed", "head"), params)


def _owner(path: tuple[Any, ...]) -> str:
    """The attribute that holds a parameter: the path ends in `.NAME.value`."""
    return path[-2].name


def _matrices(params: Any) -> Any:
    """Which axes of each projection are inputs and outputs; None for what is not one (embeddings, norms, biases)."""

    def dimensions(path: tuple[Any, ...], param: Any) -> Any:
        if not isinstance(param, nnx.Variable) or path[-1].name != "w":
            return jax.tree.map(lambda _: None, param)
        axes = param.get_metadata("axes")
        layers = sum(name in ("layers", "experts") for name in axes)  # the first axes: each has matrices of its own
        split = layers + 1 if axes[layers] == "embed" else len(axes) - 1
        numbers = optax.contrib.MuonDimensionNumbers(tuple(range(layers, split)), tuple(range(split, len(axes))))
        return jax.tree.map(lambda _: numbers, param)

    return jax.tree_util.tree_map_with_path(dimensions, params, is_leaf=lambda p: isinstance(p, nnx.Variable))
