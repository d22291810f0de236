"""Measures the same work here and in Hugging Face transformers on torch, turn by turn, each in a process of its own.

    python benchmarks/peers.py --model=tiny --what=train --rounds=3

Prints one line of JSON: the tokens/s of every turn, their medians, and ours over the best peer's. Needs torch and
transformers beside this project: pip install torch transformers.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import statistics
import subprocess
import sys

from measure import tell

from lslm_jax.runtime import huge_pages

HERE = pathlib.Path(__file__).parent


def main() -> None:
    """Prints one line of JSON."""
    args = parse_args()
    if missing := [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]:
        sys.exit(f"peers.py needs {' and '.join(missing)}: pip install torch transformers")
    plain, large = dict(os.environ), huge_pages.environment(os.environ)  # which the trainer gives itself; few peers do
    sides = {"ours": (ours(args), plain)}
    for name, more in variants(args).items():
        sides |= {name: (theirs(args, more), plain)}
        sides |= {} if args.gpu else {f"{name}, large pages": (theirs(args, more), large)}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    told: dict[str, dict] = {}
    for _ in range(args.rounds):
        for name, (command, environ) in sides.items():
            done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
            told[name] = json.loads(done.stdout.splitlines()[-1])
            found = told[name]["tokens_per_second"]
            rates[name].append(round(statistics.median(found) if isinstance(found, list) else found, 1))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(rate for name, rate in medians.items() if name != "ours")
    keep = ("device", "jax", "torch", "transformers", "first_step_seconds", "peak_bytes", "compile_seconds")
    facts = {name: {key: value for key, value in said.items() if key in keep} for name, said in told.items()}
    tell(vars(args) | {"rates": rates, "medians": medians, "ratio": round(medians["ours"] / best, 3), "facts": facts})


def ours(args: argparse.Namespace) -> list[str]:
    """The command that measures this trainer."""
    if args.what == "decode":
        sizes = [f"--batch_sizes={args.batch_size}", f"--tokens={args.tokens}"]
        return [sys.executable, str(HERE / "decode.py"), f"--model={args.model}", *sizes]
    size = [f"--config.train.batch_size={args.batch_size}", f"--config.data.seq_len={args.seq_len}"]
    return [sys.executable, str(HERE / "train_step.py"), f"--model={args.model}", "--steps=7", "--windows=3", *size]


def theirs(args: argparse.Namespace, more: list[str]) -> list[str]:
    """The command that measures a peer."""
    size = [f"--model={args.model}", f"--batch_size={args.batch_size}", f"--seq_len={args.seq_len}"]
    return [sys.executable, str(HERE / "peer_torch.py"), args.what, *size, f"--tokens={args.tokens}", *more]


def variants(args: argparse.Namespace) -> dict[str, list[str]]:
    """What a peer's user would try."""
    if args.what == "decode":
        return {"transformers": []}
    compiled = {"transformers, compiled": ["--compile"]}
    return compiled | (
        {"transformers, compiled, cuDNN": ["--compile", "--cudnn"]} if args.gpu else {"transformers": []}
    )


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--what", choices=("train", "decode"), default="train")
    flags.add_argument("--model", default="tiny")
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument("--seq_len", type=int, default=256)
    flags.add_argument("--tokens", type=int, default=128)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--gpu", action="store_true", help="try cuDNN's attention too, and nothing for CPUs alone")
    return flags.parse_args()


if __name__ == "__main__":
    main()
