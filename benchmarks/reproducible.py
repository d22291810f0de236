"""Measures what `train.reproducible` promises, and costs: real runs on 1 to 8 CPU devices, in one process and in two.

    python benchmarks/reproducible.py

Prints a line of JSON for each run: hashes of its losses, of its gradients' norms, and of its weights and moments at the
end, in all bits; and its median of tokens/s. The model is small and has dropout; its gradient is clipped at every step.
At the end come two runs without the setting. Exits with 1 unless the reproducible ones agree in all hashes.
"""

import argparse
import hashlib
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from orbax.checkpoint import v1 as ocp

CONFIG = """
from lslm_jax.config import *

def get_config():
    return Config(
        model=ModelConfig(num_layers=4, d_model=128, num_heads=4, vocab_size=2048, max_length=128, dropout=0.1),
        tokenizer=TokenizerConfig(vocab_size=2048),
        data=DataConfig(source="synthetic", seq_len=128),
        train=TrainConfig(steps=40, batch_size=16, reproducible=True),
        optimizer=OptimizerConfig(clip=0.1),
        mesh=MeshConfig(data=-1),
        checkpoint=CheckpointConfig(every=40),
        eval=EvalConfig(every=0),
        log=LogConfig(every=1, tensorboard=False),
    )
"""
RUNS = [(1, 8), (1, 4), (1, 2), (1, 1), (2, 2), (2, 8)]  # processes, devices of all of them
HASHES = ("losses", "gradient_norms", "weights_and_moments")


def main() -> None:
    """Prints a line of JSON for each run."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        directory = pathlib.Path(temporary)
        (directory / "config.py").write_text(CONFIG)
        found = [measure(directory, *where) for where in RUNS]
        for devices in (8, 1):
            measure(directory, 1, devices, "--config.train.reproducible=false")
    sys.exit(int(any(run[name] != found[0][name] for run in found for name in HASHES)))


def measure(directory: pathlib.Path, processes: int, devices: int, *flags: str) -> dict[str, Any]:
    """Trains once with the config in a directory; prints, and returns, what came out."""
    workdir = directory / "-".join(map(str, (processes, devices, *flags)))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        at = f"127.0.0.1:{probe.getsockname()[1]}"
    count = f"--xla_force_host_platform_device_count={devices // processes}"
    command = [sys.executable, "-m", "lslm_jax.main", f"--config={directory}/config.py", f"--workdir={workdir}", *flags]
    parts = []
    for process in range(processes):
        join = [f"--coordinator={at}", f"--processes={processes}", f"--process={process}"] if processes > 1 else []
        environ = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": count}
        parts.append(subprocess.Popen(command + join, env=environ, stdout=subprocess.DEVNULL))
    codes = [part.wait() for part in parts]
    if any(codes):
        sys.exit("a run failed: see above")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]
    result = {"processes": processes, "devices": devices, "reproducible": not flags, "steps": len(lines)}
    for name, of in (("losses", "loss"), ("gradient_norms", "grad_norm")):
        result[name] = digest(np.array([line[of] for line in lines]))
    saved = read(workdir / "checkpoints" / "40")
    result["weights_and_moments"] = digest(*(saved[name] for name in sorted(saved)))
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    result["tokens_per_second"] = round(statistics.median(rates))
    print(json.dumps(result), flush=True)
    return result


def read(checkpoint: pathlib.Path) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, whatever devices wrote them, by name."""
    found = {}
    for part in ("model", "optimizer"):
        stored: Any = ocp.metadata(checkpoint, part).metadata
        wanted = {name: np.empty(leaf.shape, leaf.dtype) for name, leaf in stored.items()}
        loaded = ocp.load_checkpointables(checkpoint, {part: wanted})[part]
        found |= {f"{part}.{name}": np.asarray(value) for name, value in loaded.items()}
    return found


def digest(*arrays: np.ndarray) -> str:
    """The beginning of their bytes' sha256."""
    return hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest()[:16]


if __name__ == "__main__":
    main()
