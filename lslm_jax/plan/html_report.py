"""A plan as one HTML file that needs nothing else: which axis splits which tensor, and what fills a device's memory."""

import html
import math
import time
from typing import Any

from lslm_jax.errors import ConfigError
from lslm_jax.plan.compile_step import Compiled
from lslm_jax.plan.text_report import gib, text
from lslm_jax.runtime import atomic_io
from lslm_jax.runtime.pytree import flatten

_COLOURS = {
    "stage": "#8c6bb1",
    "data": "#4c9f70",
    "fsdp": "#3b7dd8",
    "expert": "#c05780",
    "context": "#d99a2b",
    "tensor": "#d1495b",
}
_PARTS = {
    "parameters": "#3b7dd8",
    "optimizer": "#8c6bb1",
    "average": "#c05780",
    "batch": "#4c9f70",
    "gradients": "#d99a2b",
    "activations": "#d1495b",
}
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
table { border-collapse: collapse } td, th { padding: .15em .8em; text-align: left; border-bottom: 1px solid #ddd }
pre { background: #f6f6f6; padding: 1em; overflow-x: auto }
.axis { color: #fff; border-radius: .3em; padding: 0 .4em; margin-left: .3em }
"""
_WIDTH, _HEIGHT = 900, 40


def check(path: str | None) -> None:
    """Refuses a file of another kind, before anything slow."""
    if path is not None and not path.endswith(".html"):
        raise ConfigError(f"--picture={path}: a plan is drawn as HTML, which every browser shows: use FILE.html")


def draw(path: str, name: str, compiled: Compiled, found: dict[str, Any]) -> None:
    """Writes the picture.

    Args:
      path: of the file.
      name: of the config, for the title.
      compiled: step.
      found: figures of the step.

    Raises:
      SaveError: it cannot be written.
    """
    model = compiled.config.model
    title = html.escape(f"Plan of {name} on {found['devices']} x {found['device']}")
    about = (
        f"{model.family}, {model.num_layers} layers, d_model {model.d_model:,}, {found['parameters']['total']:,} "
        f"parameters; {found['tokens_per_step']:,} tokens per step; planned {time.strftime('%Y-%m-%d')}"
    )
    page = (
        f"<!doctype html><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{html.escape(about)}</p>"
        f"<h2>Memory of a device</h2>{_bars(found['memory'])}"
        f"<h2>Which axis splits which tensor</h2>{_table(compiled)}"
        f"<h2>In words</h2><pre>{html.escape(text(found))}</pre>"
    )
    atomic_io.write(atomic_io.place(path), page.encode())


def _bars(memory: dict[str, Any]) -> str:
    """What a device holds, side by side, against what it can hold."""
    sizes = {name: memory.get(name) or 0 for name in _PARTS}
    limit = memory["limit"] or 0
    scale = _WIDTH / max(1, sum(sizes.values()), limit)
    x, boxes, legend = 0.0, "", ""
    for name, size in sizes.items():
        if size:
            boxes += (
                f'<rect x="{x:.1f}" y="10" width="{size * scale:.1f}" height="{_HEIGHT}" fill="{_PARTS[name]}">'
                f"<title>{name} {gib(size)}</title></rect>"
            )
            legend += f'<span class="axis" style="background:{_PARTS[name]}">{name} {gib(size)}</span>'
            x += size * scale
    if limit:
        at = limit * scale
        boxes += f'<line x1="{at:.1f}" x2="{at:.1f}" y1="0" y2="{_HEIGHT + 20}" stroke="#000" stroke-width="3"/>'
        legend += f"<span> | limit {gib(limit)}</span>"
    return f'<svg width="{_WIDTH + 4}" height="{_HEIGHT + 20}" role="img">{boxes}</svg><p>{legend}</p>'


def _table(compiled: Compiled) -> str:
    rows = ""
    for name, leaf in flatten({"model": compiled.state.model, "batch": compiled.batch}).items():
        spec = [*leaf.sharding.spec, *[None] * (leaf.ndim - len(leaf.sharding.spec))]
        cells = " x ".join(_dimension(size, places) for size, places in zip(leaf.shape, spec, strict=True))
        local = gib(leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)))
        rows += f"<tr><td>{html.escape(name)}<td>{cells or 1}<td>{leaf.dtype}<td>{local}"
    moments = "<p>Moments of the optimizer lie where their parameters lie, and are split over data as well.</p>"
    return f"<table><tr><th>tensor<th>shape, and what splits it<th>type<th>of it on a device{rows}</table>{moments}"


def _dimension(size: int, places: Any) -> str:
    axes = () if places is None else (places,) if isinstance(places, str) else places
    marks = "".join(f'<span class="axis" style="background:{_COLOURS[axis]}">{axis}</span>' for axis in axes)
    return f"{size}{marks}"
