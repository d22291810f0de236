"""Bounds of 8B and 70B models on TPU pods and GPU clusters, from the compiled train step: `plan`, case by case.

    python benchmarks/scaling.py [--only=NAME] [--write]

Needs the compilers: pip install -e '.[tpu,plan-gpu]'. A case takes some minutes of one core, in its own process.
Each is kept in benchmarks/results/scaling.json, and done again only where --only names it. With --write, the table goes
into benchmarks/scaling.md, between its two marks.
"""

import argparse
import json
import pathlib
import subprocess
import sys
import time
from typing import NamedTuple

import pages

HERE = pathlib.Path(__file__).parent
KEPT = HERE / "results/scaling.json"
MARK = "<!-- table -->"
SIZES = {
    "8B": [],
    "70B": ["num_layers=80", "d_model=8192", "num_heads=64", "num_kv_heads=8", "d_ff=28672"],
}


class Case(NamedTuple):
    """A model on hardware: rows of 8,192 tokens in a step, and the mesh, the rest of which is fsdp."""

    model: str
    topology: str
    rows: int
    mesh: str = ""

    @property
    def name(self) -> str:
        """What it is kept under."""
        return f"{self.model} {self.topology} {self.mesh}".strip()


CASES = [
    *(Case("8B", f"v5p:{shape}", 2 * n) for shape, n in (("4x4x4", 64), ("4x8x8", 256))),
    Case("8B", "v5p:4x4x4", 128, "data=4"),
    Case("8B", "v5p:4x8x8", 512, "data=4"),
    Case("8B", "v5p:8x8x16", 2048, "data=16"),
    Case("8B", "v5p:16x16x16", 8192, "data=64"),
    Case("70B", "v5p:4x4x4", 64, "data=4"),
    Case("70B", "v5p:4x8x8", 256, "data=4"),
    Case("70B", "v5p:8x8x16", 1024),
    Case("70B", "v5p:8x8x16", 1024, "data=16"),
    Case("70B", "v5p:16x16x16", 4096, "data=16"),
    *(Case("8B", f"{kind}:8", 16) for kind in ("h100", "h200")),
    *(Case("8B", f"h200:{hosts}x8", 16 * hosts, f"dcn_data={hosts}") for hosts in (8, 32, 128)),
    *(Case("8B", f"h100:{hosts}x8", 16 * hosts, f"dcn_data={hosts}") for hosts in (8, 128)),
    *(Case("70B", f"h200:{hosts}x8", 8 * hosts, f"dcn_data={hosts // 8},dcn_fsdp=8") for hosts in (8, 32, 128)),
    Case("70B", "h100:128x8", 1024, "dcn_data=8,dcn_fsdp=16"),
]


def main() -> None:
    """Plans what is missing, prints the table."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--only", default="", help="cases whose name has this in it, again")
    flags.add_argument("--write", action="store_true", help="put the table into scaling.md")
    args = flags.parse_args()
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for case in CASES:
        if args.only not in case.name or (case.name in kept and not args.only):
            continue
        found = plan(case)
        if found is None:
            continue
        kept[case.name] = found
        KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    shown = table(kept)
    print(shown)
    if args.write:
        pages.write(HERE / "scaling.md", MARK, shown)


def plan(case: Case) -> dict | None:
    """The figures that are shown of a case; None where it cannot be planned here."""
    settings = [f"model.{setting}" for setting in SIZES[case.model]] + [f"train.batch_size={case.rows}"]
    settings += [f"mesh.{setting}" for setting in filter(None, case.mesh.split(","))]
    command = [sys.executable, "-m", "lslm_jax.main", "plan", "--config=configs/llama_8b.py"]
    command += [f"--topology={case.topology}", *(f"--config.{setting}" for setting in settings)]
    begun = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, cwd=HERE.parent)
    lines = done.stdout.splitlines()
    if not lines:
        print(f"{case.name}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return None
    found = json.loads(lines[-1])
    print(f"{case.name}: {time.monotonic() - begun:.0f} s", file=sys.stderr)
    names = ("devices", "mesh", "tokens_per_step", "flops_per_step", "memory", "per_device", "seconds", "bound")
    return {name: found.get(name) for name in (*names, "expected_mfu", "compile_seconds")}


def table(kept: dict[str, dict]) -> str:
    """A row a case, in their order."""
    heads = [
        "model",
        "hardware",
        "mesh",
        "tokens a device",
        "memory a device",
        "compute",
        "memory",
        "network",
        "bound by",
    ]
    heads += ["MFU at most", "as the compiler counts"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for case in CASES:
        found = kept.get(case.name)
        if not found:
            continue
        mesh = " x ".join(f"{axis} {size:,}" for axis, size in found["mesh"].items())
        tokens = f"{found['tokens_per_step'] // found['devices']:,}"
        memory = found["memory"]
        room = f"{(memory['needed'] or 0) / 2**30:.1f} of {memory['limit'] / 2**30:.0f} GiB"
        cells = [case.model, f"{case.topology} ({found['devices']:,})", mesh, tokens, room]
        if found["bound"]:
            cells += [f"{found['seconds'][name]:.2f} s" for name in ("compute", "memory", "network")]
            cells += [found["bound"]["by"], f"{found['bound']['mfu']:.1%}"]
            cells += ["" if found["expected_mfu"] is None else f"{found['expected_mfu']:.1%}"]
        else:
            cells += ["does not fit", *[""] * 5]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
