"""What a step needs of a device's memory, before and after each thing that saves some, by the devices' own compilers.

    python benchmarks/memory.py [--only=NAME] [--write]

Needs them: pip install -e '.[tpu,plan-gpu]'. Every figure is of a plan of the real train step, in a process of its
own; beside it stands the closed formula of `predicted`. Each case is kept in benchmarks/results/memory.json, and done
again only where --only names it. With --write, the table goes into benchmarks/compiled.md, between its marks.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from typing import Any, NamedTuple

import pages
from measure import MODELS

from lslm_jax.config import Config, MeshConfig, ModelConfig, loading
from lslm_jax.config.validation import fill_sizes
from lslm_jax.train.train_step import usual_chunk

HERE = pathlib.Path(__file__).parent
KEPT, PAGE, MARK = HERE / "results/memory.json", HERE / "compiled.md", "<!-- memory -->"
SAVINGS = {
    "nothing saved": {"train.loss_chunk": 1 << 20, "model.remat": "none"},
    "logits in parts": {"model.remat": "none"},
    "and products and attention kept": {"model.remat": "save_attention"},
    "and nothing kept of a layer": {"model.remat": "full"},
    "and moments in bfloat16": {"model.remat": "full", "optimizer.moment_dtype": "bfloat16"},
}
LAST, LARGEST = list(SAVINGS)[-1], "the most rows that fit so"


class Case(NamedTuple):
    """A model on hardware, with so many rows for each device."""

    model: str
    topology: str
    devices: int
    rows: int

    @property
    def name(self) -> str:
        """What it is kept under."""
        return f"{self.model} {self.topology}"

    @property
    def is_tpu(self) -> bool:
        """Rather than a GPU."""
        return self.topology.startswith("v")


CASES = [
    *(Case("gpt2_small", name, n, 64) for name, n in (("h200:1", 1), ("h200:8", 8), ("v5p:4x4x4", 64))),
    *(Case("llama_1b", name, n, 16) for name, n in (("h200:1", 1), ("h200:8", 8), ("v5p:4x4x4", 64))),
    *(Case("llama_8b", name, n, 1) for name, n in (("h200:1", 1), ("h200:8", 8), ("v5p:4x4x4", 64))),
]


def main() -> None:
    """Plans what is missing, prints the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--only", default="", help="cases whose name has this in it, again")
    flags.add_argument("--write", action="store_true", help="put the table into compiled.md")
    flags.add_argument("--jobs", type=int, default=2, help="plans at a time")
    args = flags.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    wanted = [case for case in CASES if args.only in case.name and (args.only or case.name not in kept)]
    with ThreadPoolExecutor(args.jobs) as pool:
        for done in as_completed({pool.submit(plans, case): case for case in wanted}):
            kept |= done.result()
            KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    shown = table(kept)
    print(shown)
    if args.write:
        pages.write(PAGE, MARK, shown)


def plans(case: Case) -> dict[str, dict[str, dict[str, Any]]]:
    """All plans of a case, by its name and what each saves."""
    found = {saving: plan(case, saving, case.rows) for saving in SAVINGS}
    return {case.name: found | {LARGEST: largest(case, found[LAST])}}


def configured(case: Case, saving: str, rows: int) -> Config:
    """The config of a case: weights and all that goes with them split over all devices."""
    base, mesh = MODELS[case.model], MeshConfig(data=1, fsdp=case.devices)
    base = replace(base, train=replace(base.train, batch_size=rows * case.devices), mesh=mesh)
    return loading.override(base, [(key, str(value)) for key, value in SAVINGS[saving].items()])


def plan(case: Case, saving: str, rows: int) -> dict[str, Any]:
    """The figures that are kept of a plan."""
    config = configured(case, saving, rows)
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        file.write(loading.to_json(config))
        file.flush()
        command = [sys.executable, "-m", "lslm_jax.main", "plan", f"--config={file.name}"]
        begun = time.monotonic()
        done = subprocess.run(
            [*command, f"--topology={case.topology}"], capture_output=True, text=True, cwd=HERE.parent
        )
    lines = done.stdout.splitlines()
    if not lines:
        sys.exit(f"{case} {saving}: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(lines[-1])
    told = f"{case.name}, {rows} rows a device, {saving}: {found['memory']['needed']} bytes"
    print(f"{told}, {time.monotonic() - begun:.0f} s", file=sys.stderr)
    memory = {name: found["memory"].get(name) for name in ("needed", "limit", "fits", "arguments", "temporaries")}
    said = predicted(config, found["parameters"]["total"], case)
    return {"rows": rows, "seconds": round(time.monotonic() - begun, 1), "predicted": said} | memory


def predicted(config: Config, parameters: int, case: Case) -> float:
    """Bytes of a device by closed formula.

    Weights and gradients in float32 and two moments, over all devices; in bfloat16 what the backward pass keeps of all
    layers; and the larger of two things that are there one after the other: all that is made inside a single layer,
    where it is worked out again; one part of the logits in float32 and in bfloat16, with the head's matrix gathered
    whole in bfloat16, and its gradient in float32.
    """
    model, devices = fill_sizes(config.model), case.devices
    tokens = config.train.batch_size * config.data.seq_len // devices
    moments = 2 if config.optimizer.moment_dtype == "bfloat16" else 4
    chunk = config.train.loss_chunk or usual_chunk("tpu" if case.is_tpu else "gpu", model.vocab_size)
    logits = 6.0 * min(chunk, tokens) * model.vocab_size
    gathered = 6.0 * model.vocab_size * model.d_model if devices > 1 else 0.0
    layer = 0.0 if model.remat == "none" else 2.0 * tokens * _kept(replace(model, remat="none"), case)
    each = parameters * (8.0 + 2 * moments) / devices
    return each + 2.0 * tokens * model.num_layers * _kept(model, case) + max(logits + gathered, layer)


def _kept(model: ModelConfig, case: Case) -> int:
    """Numbers of a token that the backward pass reads of one layer, and that were not worked out again.

    TPUs keep a head in tiles of 128. What gates a product is kept beside it, unless one device does it all: there XLA
    works it out again.
    """
    D, F = model.d_model, model.d_ff
    head = -(-model.head_dim // 128) * 128 if case.is_tpu else model.head_dim
    products = D + 2 * (model.num_heads + model.num_kv_heads) * head + (2 if model.gated else 1) * F
    activations = 2 if model.gated and case.devices > 1 else 1
    inside = {"full": 0, "save_attention": products, "none": products + 2 * D + activations * F}  # D: two norms
    return D + inside[model.remat]


def largest(case: Case, first: dict[str, Any]) -> dict[str, Any]:
    """The most rows a device that fit with all savings, to within a twentieth, from a line through two plans."""
    second = plan(case, LAST, 2 * case.rows)
    each = (second["needed"] - first["needed"]) / case.rows
    return nearer(case, first, max(1, case.rows + int((first["limit"] - first["needed"]) / each)), None)


def nearer(case: Case, best: dict[str, Any], rows: int, fails: int | None) -> dict[str, Any]:
    """The same, from rows that fit, others to be tried, and perhaps such that do not fit."""
    best = best if best["fits"] else best | {"rows": 0}
    while abs((fails or rows) - best["rows"]) > max(1, best["rows"] // 20):
        found = plan(case, LAST, rows)
        best, fails = (found, fails) if found["fits"] else (best, rows)
        rows = (best["rows"] + fails) // 2 if fails else int(rows * found["limit"] / found["needed"])
    return best


def table(found: dict[str, dict[str, dict[str, Any]]]) -> str:
    """A row a plan."""
    heads = ["model", "hardware", "rows a device", "", "needed, GiB", "of these temporaries", "formula", "of it"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in CASES:
        for told, each in found.get(case.name, {}).items():
            needed, said = each["needed"], each["predicted"]
            cells = [case.model, case.topology, f"{each['rows']:,}", told]
            cells += [f"{gib(needed)} of {gib(each['limit'])}" + ("" if each["fits"] else ": too much")]
            cells += [gib(each["temporaries"]), gib(said), f"{needed / said:.0%}" if needed else ""]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def gib(count: float | None) -> str:
    """Bytes in GiB, or nothing where the compiler did not tell."""
    return "" if count is None else f"{count / 2**30:.2f}"


if __name__ == "__main__":
    main()
