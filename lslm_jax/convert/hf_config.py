"""Settings that config.json tells in other words than ours: activations, rotary positions, what each layer sees."""

from collections.abc import Callable
from typing import Any

from lslm_jax.config import ModelConfig
from lslm_jax.convert.hf_mapping import Setting, Settings
from lslm_jax.errors import ConfigError
from lslm_jax.models.model_configs import layer_types

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
_KINDS = ", ".join(_SEEN)


def activation(
    key: str, default: str, ours: str = "activation", among: tuple[str, ...] = tuple(_ACTIVATIONS)
) -> Setting:
    """The MLP's activation, or another one; `default` is the family's own name where several mean the same."""

    def read(theirs: Settings) -> dict[str, Any]:
        name = theirs[key]
        if name not in among:
            raise ConfigError(f"{key}={name} is not among {', '.join(among)}")
        return {ours: _ACTIVATIONS[name]}

    def write(model: ModelConfig) -> dict[str, Any]:
        names = [name for name, value in _ACTIVATIONS.items() if value == getattr(model, ours)]
        if not names:
            raise ConfigError(f"{key} has no model.{ours}={getattr(model, ours)}")
        return {key: default if default in names else names[0]}

    return Setting(read, write, (key,))


def optional(ours: str, key: str) -> Setting:
    """A size that theirs may leave open, as null, where ours has 0."""

    def read(theirs: Settings) -> dict[str, Any]:
        size = theirs.get(key)
        if size is not None and not 0 < size < 2**31:
            raise ConfigError(f"{key}={size} must be positive")
        return {ours: size or 0}

    return Setting(read, lambda model: {key: getattr(model, ours) or None}, (key,))


def rope(default_theta: float, key: str = "rope_theta", fraction: tuple[str, float] | None = None) -> Setting:
    """Rotary positions, the same in all layers.

    As in transformers 5, `rope_scaling` takes the place of `rope_parameters` where a file has both, and what either
    lacks is taken from the keys beside it.

    Args:
      default_theta: the class's default base.
      key: the older name of the base.
      fraction: the older name of the share of rotated features, and its default.
    """

    def read(theirs: Settings) -> dict[str, Any]:
        inner = _flat(theirs)
        ours = {"rope_theta": _number(inner, "rope_theta", theirs.get(key, default_theta))}
        share = _number(inner, "partial_rotary_factor", theirs.get(fraction[0], fraction[1]) if fraction else 1.0)
        if fraction:
            ours["rope_fraction"] = _even_share(share, fraction[0], theirs)
        elif share != 1.0:
            raise ConfigError(f"partial_rotary_factor={share} is not supported, only 1.0")
        return ours | _read_scaling(inner, theirs)

    def write(model: ModelConfig) -> dict[str, Any]:
        share = {fraction[0]: model.rope_fraction} if fraction else {}
        return {key: model.rope_theta, "rope_scaling": _write_scaling(model)} | share

    return Setting(read, write, ("rope_parameters", "rope_scaling", key, *(fraction or ())[:1]))


def _flat(theirs: Settings) -> Settings:
    """The rotary settings that hold for all layers."""
    inner = theirs.get("rope_scaling") or theirs.get("rope_parameters") or {}
    if nested := [name for name, value in inner.items() if isinstance(value, dict)]:
        raise ConfigError(f"rope_parameters.{nested[0]}: rotary positions by kind of layer are not supported")
    return inner


def _number(inner: Settings, name: str, default: Any) -> float:
    value = inner.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"rope_parameters or rope_scaling: {name}={value!r} must be a positive number")
    return float(value)


def _even_share(share: float, key: str, theirs: Settings) -> float:
    """The share of a head's features that are rotated. transformers rotates one more where their number is odd."""
    width = theirs["hidden_size"] // theirs["num_attention_heads"]
    if int(width * share) % 2:
        raise ConfigError(
            f"partial_rotary_factor={share} of rope_parameters (or {key}) rotates {int(width * share)} of {width} "
            "features of a head: their number must be even"
        )
    return share


def _read_scaling(inner: Settings, theirs: Settings) -> dict[str, Any]:
    kind = inner.get("rope_type", inner.get("type", "default"))
    match kind:
        case "default":
            return {}
        case "linear":
            return {"rope_scaling": "linear", "rope_factor": _number(inner, "factor", None)}
        case "llama3":
            original = _number(inner, "original_max_position_embeddings", theirs.get("max_position_embeddings"))
            return {
                "rope_scaling": "llama3",
                "rope_factor": _number(inner, "factor", None),
                "rope_low_factor": _number(inner, "low_freq_factor", None),
                "rope_high_factor": _number(inner, "high_freq_factor", None),
                "rope_original_length": int(original),
            }
    raise ConfigError(f"rope_type: rotary positions of type {kind} are not supported, only default, linear and llama3")


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


def two_ropes(
    theta_key: str, theta: float, local_key: str, local_theta: float, *, scales_both: bool = False
) -> Setting:
    """Rotary positions that differ between layers that see all and those that see a window.

    Args:
      theta_key: the older name of the base of layers that see all.
      theta: its default.
      local_key: the older name of the base of layers that see a window.
      local_theta: its default.
      scales_both: whether `rope_scaling` applies to layers with a window too (ModernBERT).
    """

    def read(theirs: Settings) -> dict[str, Any]:
        parameters, scaling = theirs.get("rope_parameters") or {}, theirs.get("rope_scaling") or {}
        if flat := [name for name in parameters if name not in _SEEN]:
            raise ConfigError(f"rope_parameters.{flat[0]} is not supported: it is given by kind of layer, {_KINDS}")
        full = {**(parameters.get("full_attention") or {}), **scaling}
        local = {**(parameters.get("sliding_attention") or {}), **(scaling if scales_both else {})}
        if (kind := local.get("rope_type", local.get("type", "default"))) != "default":
            raise ConfigError(f"rope_type: rotary positions of type {kind} in layers with a window are not supported")
        for inner in (full, local):
            if (share := inner.get("partial_rotary_factor", 1.0)) != 1.0:
                raise ConfigError(f"partial_rotary_factor={share} is not supported, only 1.0")
        return {
            "rope_theta": _number(full, "rope_theta", theirs.get(theta_key, theta)),
            "rope_local_theta": _number(local, "rope_theta", theirs.get(local_key, local_theta)),
        } | _read_scaling(full, theirs)

    def write(model: ModelConfig) -> dict[str, Any]:
        local = model.rope_local_theta or model.rope_theta
        scaling = _write_scaling(model)
        # Newer versions of transformers read the first, older ones the others.
        full = {"rope_type": "default", "rope_theta": model.rope_theta} | (scaling or {})
        parameters = {"full_attention": full, "sliding_attention": {"rope_type": "default", "rope_theta": local}}
        return {"rope_parameters": parameters, theta_key: model.rope_theta, local_key: local} | (
            {"rope_scaling": scaling} if scaling and not scales_both else {}
        )

    return Setting(read, write, ("rope_parameters", "rope_scaling", theta_key, local_key))


def window(key: str = "sliding_window") -> Setting:
    """One window for all layers, or null."""
    return Setting(
        lambda theirs: {"window": _window(theirs, key) or 0}, lambda model: {key: model.window or None}, (key,)
    )


def _window(theirs: Settings, key: str = "sliding_window") -> int | None:
    """A size, or None. transformers masks everything where it is 0."""
    size = theirs.get(key)
    if size is not None and not 0 < size < 2**31:
        raise ConfigError(f"{key}={size} must be positive, or null for none")
    return size


def windows(period: int, full: int, period_key: str = "") -> Setting:
    """Layers that see a window and layers that see all.

    Args:
      period: of `layer_types`, where config.json does not list them: one layer of so many sees all.
      full: which one of them that is.
      period_key: the setting of theirs that says otherwise.
    """

    def read(theirs: Settings) -> dict[str, Any]:
        size = _period(theirs, period_key, period) if period_key else period
        return _seen(_window(theirs), theirs, lambda i: i % size == full % size)

    def write(model: ModelConfig) -> dict[str, Any]:
        kinds = _their_kinds(model)
        return {"layer_types": kinds} | ({"sliding_window": model.window} if model.window else {})

    return Setting(read, write, ("sliding_window", "layer_types", *([period_key] if period_key else [])))


def _period(theirs: Settings, key: str, default: int) -> int:
    size = theirs.get(key, default)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"{key}={size!r} must be a positive whole number")
    return size


def used_window() -> Setting:
    """Qwen's windows: none unless `use_sliding_window`, and then only from layer `max_window_layers` on."""

    def read(theirs: Settings) -> dict[str, Any]:
        used = _window(theirs) if theirs["use_sliding_window"] else None
        first = theirs["max_window_layers"] if used else theirs["num_hidden_layers"]
        return _seen(used, theirs, lambda i: i < first)

    def write(model: ModelConfig) -> dict[str, Any]:
        used = {"use_sliding_window": model.window > 0, "sliding_window": model.window or None}
        return used | {"layer_types": _their_kinds(model)}

    return Setting(read, write, ("use_sliding_window", "sliding_window", "max_window_layers", "layer_types"))


def modern_window() -> Setting:
    """ModernBERT's windows: `local_attention` counts tokens on both sides, one layer of so many sees all."""

    def read(theirs: Settings) -> dict[str, Any]:
        size, width = _period(theirs, "global_attn_every_n_layers", 3), theirs["local_attention"]
        if not 0 <= width < 2**31:
            raise ConfigError(f"local_attention={width} must not be negative")
        return _seen(width // 2 + 1, theirs, lambda i: i % size == 0)

    def write(model: ModelConfig) -> dict[str, Any]:
        kinds = _their_kinds(model)
        every = next((n for n in range(1, len(kinds)) if kinds[n] == "full_attention"), len(kinds))
        size = {"local_attention": 2 * max(model.window - 1, 0), "global_attn_every_n_layers": every}
        return size | {"layer_types": kinds}

    return Setting(read, write, ("local_attention", "global_attn_every_n_layers", "layer_types"))


def layers_without_rope() -> Setting:
    """SmolLM3's layers without positions: every fourth, unless it lists them."""

    def read(theirs: Settings) -> dict[str, Any]:
        layers, every = theirs["num_hidden_layers"], _period(theirs, "no_rope_layer_interval", 4)
        has = theirs.get("no_rope_layers")
        has = [(i + 1) % every for i in range(layers)] if has is None else has
        if len(has) != layers or not all(isinstance(rope, int) for rope in has):
            raise ConfigError(f"no_rope_layers must list num_hidden_layers={layers} numbers, not {len(has)}")
        if any(kind != "full_attention" for kind in theirs.get("layer_types") or ()):
            raise ConfigError("layer_types of smollm3 are not supported, only full_attention")
        return {"layer_types": _shortest(["full" if rope else "no_rope" for rope in has])}

    def write(model: ModelConfig) -> dict[str, Any]:
        return {"no_rope_layers": [int(kind != "no_rope") for kind in layer_types(model, model.num_layers)]}

    return Setting(read, write, ("no_rope_layers", "no_rope_layer_interval", "layer_types", "num_hidden_layers"))


def _seen(window: int | None, theirs: Settings, sees_all: Callable[[int], bool]) -> dict[str, Any]:
    """The window, and which layers see it: as config.json lists them, or else all but those that `sees_all` names."""
    layers = theirs["num_hidden_layers"]
    kinds = theirs.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if sees_all(i) else "sliding_attention" for i in range(layers)]
    if len(kinds) != layers:
        raise ConfigError(f"layer_types must list num_hidden_layers={layers} layers, not {len(kinds)}")
    unknown = [kind for kind in kinds if kind not in _SEEN]
    if unknown:
        raise ConfigError(f"layer_types: layers of type {unknown[0]!r} are not supported, only {_KINDS}")
    if "sliding_attention" not in kinds:
        return {}
    if not window:
        raise ConfigError("layer_types has sliding_attention, but sliding_window is null or use_sliding_window false")
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
