"""Which mesh, which parts of a batch and which remat suit a run best: all that are sensible are compiled."""

import multiprocessing
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from lslm_jax.config import Config
from lslm_jax.errors import ConfigError
from lslm_jax.plan import topology as topologies
from lslm_jax.plan.compile_step import compile_step
from lslm_jax.plan.estimates import figures
from lslm_jax.plan.suggest_fix import Settings, changed, flags
from lslm_jax.plan.topology import Topology
from lslm_jax.runtime.progress import say

_REMATS = ("none", "save_attention", "full")
_LONG = 16_384  # tokens of a row from which on it may be worth splitting


def search(config: Config, place: Topology | None, memory: int | None) -> list[dict[str, Any]]:
    """Figures of everything that fits, the lowest bound on a step's time first; each with its `flags`.

    The batch of a step stays as it is: only how it is laid out changes, so every one of them is the same training.

    Args:
      config: resolved.
      place: the hardware; None: what is there.
      memory: bytes that a device's program may take, None for all of them.
    """
    count = len(topologies.devices(place))
    laid = list(meshes(config, count, 1 if place is None else place.slices))
    say(f"trying {len(laid)} meshes of {count} devices")
    found = []
    # Each process has a compiler of its own: it uses one core most of the time.
    spawned = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count(), mp_context=spawned) as processes:
        tried = processes.map(_try_mesh, [(config, place, memory, mesh) for mesh in laid])
        for settings, each in zip(laid, tried, strict=True):
            say(f"  {flags(settings)}: {len(each)} fit")
            found += each
    return sorted(found, key=_step_seconds)


def _step_seconds(found: dict[str, Any]) -> tuple[float, int]:
    return found["bound"]["step_seconds"] or 0.0, found["memory"]["needed"]


def meshes(config: Config, count: int, slices: int) -> Iterator[Settings]:
    """Ways to lay out so many devices: few copies of the weights, or many; heads and positions split, or not.

    Args:
      config: resolved.
      count: devices, of all slices together.
      slices: over which only data goes: what talks more stays within one.
    """
    inside = count // slices
    for tensor in (1, 2, 4, 8):
        for context in (1, 2, 4) if config.data.seq_len >= _LONG else (1,):
            rest = inside // (tensor * context)
            for data in sorted({1, 4, 16, rest}):
                if rest * tensor * context != inside or data > rest or rest % data:
                    continue
                sizes = {"data": data, "fsdp": rest // data, "context": context, "tensor": tensor}
                settings = tuple((f"mesh.{name}", str(size)) for name, size in sizes.items())
                settings += (("mesh.dcn_data", str(slices)),) * (slices > 1)
                try:
                    changed(config, settings)
                except ConfigError:
                    continue
                yield settings


def _try_mesh(task: tuple[Config, Topology | None, int | None, Settings]) -> list[dict[str, Any]]:
    """What fits of one mesh: in as few parts as may be, with as little computed twice as may be."""
    base, place, memory, mesh = task
    found, parts = [], base.train.accumulate
    while base.train.batch_size % parts == 0:
        for remat in _REMATS:
            settings = (*mesh, ("model.remat", remat), ("train.accumulate", str(parts)))
            try:
                each = figures(compile_step(changed(base, settings), place), place, memory, None)
            except ConfigError:  # the rows of a part do not go round
                return found
            if _hopeless(each["memory"]):
                return found
            if each["memory"]["fits"] is not False:
                found.append(each | {"settings": dict(settings), "flags": flags(settings)})
                break
        if found and found[-1]["settings"]["model.remat"] == _REMATS[0]:
            return found
        parts *= 2
    return found


def _hopeless(memory: dict[str, Any]) -> bool:
    """Whether what must be there anyway is too much already."""
    fixed = sum(memory[name] for name in ("parameters", "optimizer", "average", "gradients"))
    return memory["limit"] is not None and fixed > memory["limit"]
