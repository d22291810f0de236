"""What to change of a run that does not fit into memory: nothing is advised that was not compiled."""

from collections.abc import Iterator
from typing import Any

from lslm_jax.config import Config, loading, validation
from lslm_jax.config.mesh_axes import mesh_axes, slices
from lslm_jax.errors import ConfigError
from lslm_jax.plan.compile_step import compile_step
from lslm_jax.plan.estimates import figures, jax_share
from lslm_jax.plan.topology import Topology
from lslm_jax.runtime.progress import say

Settings = tuple[tuple[str, str], ...]

MAX_TRIES = 6
_MOST_OF_A_CARD = 0.92
_WEAKER = {"none": ("save_attention", "full"), "dots": ("full",), "save_attention": ("full",), "full": ()}


def changed(config: Config, settings: Settings) -> Config:
    """The config with some settings changed; ConfigError where they are impossible."""
    return validation.validate(loading.override(config, list(settings)))


def flags(settings: Settings) -> str:
    """The settings as they are written on the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in settings)


def advise(
    config: Config, topology: Topology | None, memory: int | None, found: dict[str, Any]
) -> dict[str, Any] | None:
    """The smallest change that makes a step fit, of those worth trying: its settings, flags and figures; None: none.

    Args:
      config: resolved; it does not fit.
      topology: what for.
      memory: bytes that a device's program may take, None for all of them.
      found: figures of the config.
    """
    if roomier := _more_of_the_card(topology, memory, found):
        return roomier
    tries = 0
    for settings in _worth_trying(config, found):
        if tries == MAX_TRIES:
            break
        try:
            other = changed(config, settings)
            tries += 1
            after = figures(compile_step(other, topology), topology, memory, None)
        except ConfigError:
            continue
        fits = after["memory"]["fits"]
        say(f"  tried {flags(settings)}: {'it fits' if fits else 'it does not fit either'}")
        if fits:
            return {"settings": dict(settings), "flags": flags(settings), "figures": after}
    return None


def _more_of_the_card(topology: Topology | None, memory: int | None, found: dict[str, Any]) -> dict[str, Any] | None:
    """The same program, where it is only too much for the share of a GPU that jax takes unless it is told otherwise."""
    needed, limit = found["memory"]["needed"], found["memory"]["limit"]
    if topology is None or memory is not None or not found["device"].startswith("NVIDIA") or needed is None:
        return None
    share = jax_share() * needed / limit
    if share > _MOST_OF_A_CARD:
        return None
    return {"settings": {}, "flags": f"XLA_PYTHON_CLIENT_MEM_FRACTION={_MOST_OF_A_CARD} in the environment"}


def _worth_trying(config: Config, found: dict[str, Any]) -> Iterator[Settings]:
    """Changes from the cheapest on; those that cannot save enough are left out."""
    memory, limit = found["memory"], found["memory"]["limit"] or 0
    kept = memory["parameters"] + memory["optimizer"] + memory["average"] + memory["batch"]
    remats = [(("model.remat", name),) for name in _WEAKER[config.model.remat]]
    strongest = remats[-1] if remats else ()
    parts = _more_parts(config, found)
    if kept + memory["gradients"] < limit:
        yield from remats
        yield from (strongest + part for part in _enough(parts, config, kept, memory))
    most = strongest + (parts[-1] if parts else ())
    data = mesh_axes(config.mesh)["data"] * slices(config.mesh)["data"]
    if data != 1 and found["mesh"].get("data", 1) > 1:
        apart = (("mesh.data", "1"), ("mesh.fsdp", "-1"))
        yield from (apart + more for more in dict.fromkeys(((), strongest, most)))
    for tensor in (2, 4, 8):
        yield (("mesh.tensor", str(tensor)), *most)


def _more_parts(config: Config, found: dict[str, Any]) -> list[Settings]:
    """More parts in which a batch can be worked through, down to a row on each device."""
    rows, devices = config.train.batch_size, found["devices"]
    counts = [config.train.accumulate * 2**n for n in range(1, 11)]
    return [(("train.accumulate", str(n)),) for n in counts if rows % n == 0 and rows // n >= min(devices, rows)]


def _enough(parts: list[Settings], config: Config, kept: int, memory: dict[str, Any]) -> list[Settings]:
    """The fewest parts that seem enough, as activations shrink with the rows that are there at once; and the most."""
    if memory["needed"] is None or not parts:
        return parts[-1:]
    fixed = kept + memory["gradients"]
    share = (memory["limit"] - fixed) / max(1, memory["needed"] - fixed)
    few = [part for part in parts if config.train.accumulate / int(part[-1][1]) <= share]
    return list(dict.fromkeys([*few[:1], parts[-1]]))
