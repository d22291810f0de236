"""Learning-rate schedules and optimizers, all from optax."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from lslm_jax.config import OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 to the peak, then the named shape down to `final_ratio` of it at `steps`."""
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
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup]) if warmup else after


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """Clipping by global norm, then the named optimizer on the schedule."""
    rate = schedule(config, steps)
    dtype = jnp.dtype(config.moment_dtype)
    decay = {"weight_decay": config.weight_decay, "mask": is_decayed}
    match config.name:
        case "sgd":
            core = optax.chain(
                optax.add_decayed_weights(config.weight_decay, is_decayed),
                optax.sgd(rate, momentum=config.b1 or None, nesterov=config.nesterov, accumulator_dtype=dtype),
            )
        case "adam":
            core = optax.adam(rate, config.b1, config.b2, config.eps, mu_dtype=dtype, nesterov=config.nesterov)
        case "adamw":
            core = optax.adamw(
                rate, config.b1, config.b2, config.eps, mu_dtype=dtype, nesterov=config.nesterov, **decay
            )
        case "adafactor":
            core = optax.adafactor(rate, weight_decay_rate=config.weight_decay or None, weight_decay_mask=is_decayed)
        case "lion":
            core = optax.lion(rate, config.b1, config.b2, mu_dtype=dtype, **decay)
        case "muon":
            core = _muon(config, rate, dtype)
    return optax.chain(optax.clip_by_global_norm(config.clip), core) if config.clip else core


def _muon(config: OptimizerConfig, rate: optax.Schedule, dtype: Any) -> optax.GradientTransformation:
    directions = optax.contrib.muon(
        1.0,
        beta=config.b1,
        eps=config.eps,
        mu_dtype=dtype,
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
        layers = axes.index("layers") + 1 if "layers" in axes else 0
        split = layers + 1 if axes[layers] == "embed" else len(axes) - 1
        numbers = optax.contrib.MuonDimensionNumbers(tuple(range(layers, split)), tuple(range(split, len(axes))))
        return jax.tree.map(lambda _: numbers, param)

    return jax.tree_util.tree_map_with_path(dimensions, params, is_leaf=lambda p: isinstance(p, nnx.Variable))
