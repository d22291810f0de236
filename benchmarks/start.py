"""Measures how long a run takes to its first step, and the memory of its process, as its user has them.

    python benchmarks/start.py --model=tiny --rounds=3

Each round starts the trainer's command twice with random batches: with nothing compiled before, and again. Prints one
line of JSON: for either, seconds from the process's start until the first step is on the record, and to its end; bytes
of memory at their peak.
"""

import argparse
import importlib.util
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from dataclasses import replace

from measure import about, add_model, configured, spread, tell

from lslm_jax.config import Config, EvalConfig, LogConfig, loading

ROOT = pathlib.Path(__file__).parent.parent


def main() -> None:
    """Prints one line of JSON."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(flags)
    flags.add_argument("--rounds", type=int, default=3)
    flags.add_argument("--steps", type=int, default=10)
    args, config = configured(flags)
    train = replace(config.train, steps=args.steps)
    # On a GPU machine there may be jax and little else; reading tensorflow in is then no part of beginning.
    log = LogConfig(every=1, tensorboard=importlib.util.find_spec("clu") is not None)
    config = replace(config, train=train, log=log, eval=EvalConfig(every=0))
    found: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as parent:
            for name, runs in found.items():
                runs.append(run(config, pathlib.Path(parent), name))
    figures = {name: {key: spread([each[key] for each in runs], 2) for key in runs[0]} for name, runs in found.items()}
    tell({"model": args.model, "changes": args.changes, "steps": args.steps} | about() | figures)


def run(config: Config, parent: pathlib.Path, name: str) -> dict[str, float]:
    """One run, in a process of its own."""
    file, record = parent / "config.json", parent / name / "metrics.jsonl"
    file.write_text(loading.to_json(config))
    command = [sys.executable, "-m", "lslm_jax.main", f"--config={file}", f"--workdir={parent / name}"]
    begun = time.perf_counter()
    fresh = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    process = subprocess.Popen(command, cwd=ROOT, env=fresh, stdout=subprocess.DEVNULL)
    first = None
    while True:
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        if first is None and record.exists() and record.stat().st_size:
            first = time.perf_counter() - begun
        if ended:
            break
        time.sleep(0.01)
    if status or first is None:
        sys.exit(f"{' '.join(command)} ended with {os.waitstatus_to_exitcode(status)}")
    whole = time.perf_counter() - begun
    return {"first_step_seconds": first, "seconds": whole, "peak_mib": usage.ru_maxrss / 1024}


if __name__ == "__main__":
    main()
