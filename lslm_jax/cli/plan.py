"""`plan`: what a run needs, and how fast it can be, on hardware that need not be there."""

import argparse
import json
from typing import Any

from lslm_jax.config import Config
from lslm_jax.errors import ConfigError
from lslm_jax.plan import html_report, mesh_search, text_report, topology
from lslm_jax.plan.compile_step import compile_step, resolve
from lslm_jax.plan.estimates import figures
from lslm_jax.plan.suggest_fix import advise
from lslm_jax.plan.topology import Topology
from lslm_jax.runtime.progress import say
from lslm_jax.train.metrics_logging import json_values


def plan(config: Config, flags: argparse.Namespace) -> dict[str, Any]:
    """`plan`: compiles the train step for a topology, and tells all that follows from it.

    Raises:
      ConfigError: it does not fit into memory; the JSON that says by how much is printed all the same.
    """
    html_report.check(flags.picture)
    if config.train.epochs:
        raise ConfigError("plan reads no data and cannot count epochs: set --config.train.steps=N")
    place = None if flags.topology is None else topology.parse(flags.topology)
    config = resolve(config)
    if flags.search:
        return _search(config, place, flags)
    compiled = compile_step(config, place)
    found = figures(compiled, place, flags.memory, flags.price)
    say(text_report.text(found))
    if flags.picture:
        name = flags.config or flags.pretrained or flags.workdir or "the defaults"
        html_report.draw(flags.picture, name, compiled, found)
    result = {"topology": flags.topology, **found}
    if found["memory"]["fits"] is not False:
        return json_values(result)
    advice = advise(config, place, flags.memory, found)
    print(json.dumps(json_values(result | {"advice": advice})))
    what = f"use {advice['flags']}, which fits" if advice else "nothing that was tried makes it fit: use more devices"
    raise ConfigError(f"{text_report.verdict(found['memory'])} on each device: {what}")


def _search(config: Config, place: Topology | None, flags: argparse.Namespace) -> dict[str, Any]:
    found = mesh_search.search(config, place, flags.memory)
    if not found:
        raise ConfigError("no mesh, remat and train.accumulate that were tried make it fit: use more devices")
    say(text_report.ranking(found))
    return json_values({"topology": flags.topology, "found": found})
