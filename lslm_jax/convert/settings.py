"""Settings that config.json tells in other words than ours: activations, rotary positions, what each layer sees."""

from collections.abc import Callable
from typing import Any

from lslm_jax.config import ModelConfig
from lslm_jax.convert.family import Setting, Settings
from lslm_jax.errors import ConfigError
from lslm_jax.models.presets import layer_types

_ACTIVATIONS = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
_SEEN = {"full_attention": "full", "sliding_attention": "window"}


def activation(key: str, default: str, ours: str = "activation") -> Setting:
    """The MLP's activation, or another one."""

    def read(theirs: Settings) -> dict[str, Any]:
        name = theirs.get(key) or default
        if name not in _ACTIVATIONS:
            raise ConfigError(f"{key}={name} is not among {', '.join(_ACTIVATIONS)}")
        return {ours: _ACTIVATIONS[name]}

    def write(model: ModelConfig) -> dict[str, Any]:
        # Of two names for one thing, the family's own.
        names = [name for name, value in _ACTIVATIONS.items() if value == getattr(model, ours)]
        if not names:
            raise ConfigError(f"{key} has no model.{ours}={getattr(model, ours)}")
        return {key: default if default in names else names[0]}

    return Setting(read, write)


def optional(ours: str, key: str, default: int = 0) -> Setting:
    """A size that theirs may leave open, as null, where ours has 0."""
    read = lambda theirs: {ours: theirs.get(key, default) or 0}
    return Setting(read, lambda model: {key: getattr(model, ours) or None})


def rope(default_theta: float, key: str = "rope_theta", fraction: tuple[str, float] | None = None) -> Setting:
    """Rotary positions, the same in all layers.

    Args:
      default_theta: where config.json does not say.
      key: what theirs is called.
      fraction: what the share of rotated features is called, and how much it is where config.json does not say.
    """

    def read(theirs: Settings) -> dict[str, Any]:
        inner = theirs.get("rope_parameters") or theirs.get("rope_scaling") or {}
        ours = {"rope_theta": float(inner.get("rope_theta", theirs.get(key, default_theta)))}
        if fraction:
            ours["rope_fraction"] = float(inner.get("partial_rotary_factor", theirs.get(*fraction)))
        return ours | _read_scaling(inner)

    def write(model: ModelConfig) -> dict[str, Any]:
        share = {fraction[0]: model.rope_fraction} if fraction else {}
        return {key: model.rope_theta, "rope_scaling": _write_scaling(model)} | share

    return Setting(read, write)


def _read_scaling(theirs: Settings) -> dict[str, Any]:
    kind = theirs.get("rope_type", theirs.get("type", "default"))
    match kind:
        case "default":
            return {}
        case "linear":
            return {"rope_scaling": "linear", "rope_factor": float(theirs["factor"])}
        case "llama3":
            return {
                "rope_scaling": "llama3",
                "rope_factor": float(theirs["factor"]),
                "rope_low_factor": float(theirs["low_freq_factor"]),
                "rope_high_factor": float(theirs["high_freq_factor"]),
                "rope_original_length": int(theirs["original_max_position_embeddings"]),
            }
    raise ConfigError(f"rotary positions of type {kind} are not supported, only default, linear and llama3")


def _write_scaling(model: ModelConfig) -> dict[str, Any] | None:
    match model.rope_scaling:
        case "linear":
            return {"rope_type": "linear", "factor": model.rope_factor}
        case "llama3":
            return {
                "rope_type": "llama3",
                "factor": model.rope_factor,
                "low_freq_factor": model.rope_low_factor,
                "high_freq_factor": model.rope_high_factor,
                "original_max_position_embeddings": model.rope_original_length,
            }
    return None


def two_ropes(theta_key: str, theta: float, local_key: str, local_theta: float) -> Setting:
    """Rotary positions that differ between layers that see all and those that see a window."""

    def read(theirs: Settings) -> dict[str, Any]:
        inner = theirs.get("rope_parameters") or {}
        full = inner.get("full_attention") or {}
        local = inner.get("sliding_attention") or {}
        if (kind := local.get("rope_type", "default")) != "default":
            raise ConfigError(f"rotary positions of type {kind} in layers with a window are not supported")
        return {
            "rope_theta": float(full.get("rope_theta", theirs.get(theta_key, theta))),
            "rope_local_theta": float(local.get("rope_theta", theirs.get(local_key, local_theta))),
        } | _read_scaling(full or theirs.get("rope_scaling") or {})

    def write(model: ModelConfig) -> dict[str, Any]:
        local = model.rope_local_theta or model.rope_theta
        scaling = _write_scaling(model)
        # Newer versions of transformers read the first, older ones the others.
        full = {"rope_type": "default", "rope_theta": model.rope_theta} | (scaling or {})
        parameters = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        return {"rope_parameters": parameters, theta_key: model.rope_theta, local_key: local, "rope_scaling": scaling}

    return Setting(read, write)


def window(key: str = "sliding_window") -> Setting:
    """One window for all layers, or null."""
    return Setting(lambda theirs: {"window": theirs.get(key) or 0}, lambda model: {key: model.window or None})


def windows(period: int, full: int, period_key: str = "") -> Setting:
    """Layers that see a window and layers that see all.

    Args:
      period: of `layer_types`, where config.json does not list them: one layer of so many sees all.
      full: which one of them that is.
      period_key: the setting of theirs that says otherwise.
    """

    def read(theirs: Settings) -> dict[str, Any]:
        size = theirs.get(period_key, period) if period_key else period
        return _seen(theirs.get("sliding_window"), theirs, lambda i: i % size == full % size)

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": model.window or None, "layer_types": _their_kinds(model)}

    return Setting(read, write)


def used_window() -> Setting:
    """Qwen's windows: none unless `use_sliding_window`, and then only from layer `max_window_layers` on."""

    def read(theirs: Settings) -> dict[str, Any]:
        if not theirs.get("use_sliding_window"):
            return {}
        first = theirs.get("max_window_layers", 28)
        return _seen(theirs.get("sliding_window"), theirs, lambda i: i < first)

    def write(model: ModelConfig) -> dict[str, Any]:
        used = {"use_sliding_window": model.window > 0, "sliding_window": model.window or None}
        return used | {"layer_types": _their_kinds(model)}

    return Setting(read, write)


def modern_window() -> Setting:
    """ModernBERT's windows: `local_attention` counts tokens on both sides, one layer of so many sees all."""

    def read(theirs: Settings) -> dict[str, Any]:
        size = theirs.get("global_attn_every_n_layers", 3)
        return _seen(theirs.get("local_attention", 128) // 2 + 1, theirs, lambda i: i % size == 0)

    def write(model: ModelConfig) -> dict[str, Any]:
        kinds = _their_kinds(model)
        every = next((n for n in range(1, len(kinds)) if kinds[n] == "full_attention"), len(kinds))
        size = {"local_attention": 2 * max(model.window - 1, 0), "global_attn_every_n_layers": every}
        return size | {"layer_types": kinds}

    return Setting(read, write)


def layers_without_rope() -> Setting:
    """SmolLM3's layers without positions: every fourth, unless it lists them."""

    def read(theirs: Settings) -> dict[str, Any]:
        every = theirs.get("no_rope_layer_interval", 4)
        has = theirs.get("no_rope_layers") or [(i + 1) % every for i in range(int(theirs["num_hidden_layers"]))]
        return {"layer_types": _shortest(["full" if rope else "no_rope" for rope in has])}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"no_rope_layers": [int(kind != "no_rope") for kind in layer_types(model, model.num_layers)]}

    return Setting(read, write)


def _seen(window: int | None, theirs: Settings, sees_all: Callable[[int], bool]) -> dict[str, Any]:
    """The window, and which layers see it: as config.json lists them, or else all but those that `sees_all` names."""
    kinds = theirs.get("layer_types") or [
        "full_attention" if sees_all(i) else "sliding_attention" for i in range(int(theirs["num_hidden_layers"]))
    ]
    unknown = [kind for kind in kinds if kind not in _SEEN]
    if unknown:
        raise ConfigError(f"layers of type {unknown[0]} are not supported, only {', '.join(_SEEN)}")
    if not window or "sliding_attention" not in kinds:
        return {}
    return {"window": window, "layer_types": _shortest([_SEEN[kind] for kind in kinds])}


def _their_kinds(model: ModelConfig) -> list[str]:
    theirs = {ours: name for name, ours in _SEEN.items()} | {"no_rope": "full_attention"}
    return [theirs[kind] for kind in layer_types(model, model.num_layers)]


def _shortest(kinds: list[str]) -> tuple[str, ...]:
    """The shortest beginning that, repeated, gives all; () where that is one kind, which goes without saying."""
    if len(set(kinds)) == 1 and kinds[0] != "no_rope":
        return ()
    repeats = lambda n: all(kind == kinds[i % n] for i, kind in enumerate(kinds))
    return tuple(kinds[: next(n for n in range(1, len(kinds) + 1) if repeats(n))])
