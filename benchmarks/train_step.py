"""Measures the trainer's own step on random tokens, with nothing around it.

    python benchmarks/train_step.py --model=gpt2_small --config.train.batch_size=32 --config.model.remat=full

Prints one line of JSON: seconds to trace and to compile; milliseconds a step, of windows of steps, and those until its
call returns to the host, which waits for nothing; tokens/s; the share of the device's published peak (`mfu`), and of
what a large product reaches in this process; bytes at their peak, as the allocator and as the compiler say, and how
many of the state's are reused in place; with --kernels, milliseconds a step of the busiest ones and of all the others.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from measure import about, add_model, busiest, configured, matmul_rate, spread, tell, windows

from lslm_jax.config import Config
from lslm_jax.data.synthetic_data import SyntheticInput
from lslm_jax.evaluate.types import choose_backend
from lslm_jax.models.flops import flops_per_token
from lslm_jax.parallel.sharding import make_mesh, to_global, use
from lslm_jax.runtime import huge_pages
from lslm_jax.train import metrics_logging
from lslm_jax.train.optimizers import make_optimizer
from lslm_jax.train.train_state import abstract_state, init_state, num_parameters
from lslm_jax.train.train_step import compile_for, lower, whole_batch


def main() -> None:
    """Prints one line of JSON."""
    args, config = parse_args()
    tell(
        {"model": args.model, "changes": args.changes, "options": dict(args.options)} | about() | measured(args, config)
    )


def measured(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """What is found of one config."""
    mesh = make_mesh(config)
    with use(mesh, config.mesh):
        data = SyntheticInput(config, config.model.vocab_size)
        backend = choose_backend(config, mesh, [data])
        optimizer = make_optimizer(config.optimizer, config.train.steps)
        begun = time.perf_counter()
        shapes = abstract_state(config, optimizer, mesh), whole_batch(config, data.batch(0), mesh)
        lowered = lower(config, optimizer, backend, *shapes, mesh)
        traced = time.perf_counter()
        step = compile_for(mesh, lowered, dict(args.options))
        compiled = time.perf_counter()

        leaves = jax.tree.leaves(init_state(config, optimizer, mesh))
        batches = [to_global(data.batch(n), mesh) for n in range(4)]
        metrics = {"loss": None}

        def advance() -> jax.Array:
            nonlocal leaves, metrics
            leaves, metrics = step(leaves, batches[0])
            batches.append(batches.pop(0))
            return metrics["loss"]

        times = windows(advance, warm=3, count=args.windows, length=args.steps)
        calls = [call(advance) for _ in range(args.steps)]
        kernels = busiest(advance, args.kernels) if args.kernels else {}
        rate = matmul_rate(config.model.activations)

    seconds = statistics.median(times)
    tokens = config.train.batch_size * config.data.seq_len
    predictions = batches[0].targets_BT.shape[1]
    task = config.task.objective
    flops = flops_per_token(config.model, config.data.seq_len, config.data.source_len, task, predictions)
    kind = mesh.devices.flat[0].device_kind
    memory = step.memory_analysis()
    return {
        "attention": backend.name,
        "parameters": num_parameters(shapes[0].model),
        "trace_seconds": round(traced - begun, 2),
        "compile_seconds": round(compiled - traced, 2),
        "step_ms": spread([1e3 * each for each in times]),
        "dispatch_ms": spread([1e3 * each for each in calls]),
        "tokens_per_second": round(tokens / seconds),
        "flops_per_token": flops,
        "mfu": metrics_logging.mfu(tokens / seconds, flops, mesh.size, kind),
        "matmul_tflops": round(rate / 1e12, 3),
        "share_of_matmul": round(tokens / seconds * flops / (mesh.size * rate), 4),
        "loss": float(metrics["loss"]),
        "allocator": metrics_logging.device_memory(),
        "compiler": {
            name: getattr(memory, f"{name}_size_in_bytes") for name in ("argument", "output", "temp", "alias")
        },
    } | kernels


def call(advance: Callable[[], jax.Array]) -> float:
    """Seconds that the host is kept by a step which it does not wait for."""
    begun = time.perf_counter()
    loss = advance()
    returned = time.perf_counter()
    jax.block_until_ready(loss)
    return returned - begun


def parse_args() -> tuple[argparse.Namespace, Config]:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(flags)
    flags.add_argument("--windows", type=int, default=5)
    flags.add_argument("--steps", type=int, default=10, help="of a window")
    flags.add_argument("--kernels", type=int, default=0, help="list so many of a GPU's kernels, busiest first")
    flags.add_argument("--option", dest="options", type=option, action="append", default=[], help="NAME=VALUE, for XLA")
    return configured(flags)


def option(text: str) -> tuple[str, str | bool]:
    """What XLA is told besides the program."""
    name, _, value = text.partition("=")
    return name, {"true": True, "false": False}.get(value, value)


if __name__ == "__main__":
    huge_pages.ensure_large_pages()
    main()
