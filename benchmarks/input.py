"""Measures the input pipeline: tokens a second, time to the first batch after a resume, fill, memory.

    python benchmarks/input.py --tokens=200000000 --packing=stream --seq_len=1024 --batch_size=64

Writes a set of random tokens, in documents of log-normal length around 400, to a temporary directory, reads batches
from it, and prints one line of JSON.
"""

import argparse
import json
import os
import resource
import tempfile
import time

import numpy as np
from etils import epath

from lslm_jax.config import Config, DataConfig, TrainConfig
from lslm_jax.data import dataloader, prefetch
from lslm_jax.data.shards import ShardWriter

VOCAB_SIZE = 50_257


def main() -> None:
    """Prints one line of JSON."""
    args = parse_args()
    config = Config(
        data=DataConfig(source="shards", packing=args.packing, seq_len=args.seq_len, mask_documents=not args.unmasked),
        train=TrainConfig(batch_size=args.batch_size),
    )
    with tempfile.TemporaryDirectory() as name:
        directory = epath.Path(args.directory or name)
        if not (directory / "manifest.json").exists():
            write_set(directory, args.tokens, args.shard_tokens)
        print(json.dumps(vars(args) | {"cores": len(os.sched_getaffinity(0))} | measure(config, directory, args)))


def measure(config: Config, directory: epath.Path, args: argparse.Namespace) -> dict[str, float]:
    """Opens the set as a resumed run does, then reads for `args.seconds`."""
    memory = resident_bytes()
    began = time.perf_counter()
    rows = dataloader.open_train(config, directory, VOCAB_SIZE)
    opened = time.perf_counter() - began
    max_segments = rows.max_segments()
    searched = time.perf_counter() - began
    rows.batch(args.resume)
    first = time.perf_counter() - began
    grown = resident_bytes() - memory

    stream = prefetch.batches(rows.batch, args.resume, args.resume + 1_000_000, through=args.through)
    for _ in range(3):
        next(stream)  # starts the threads, imports tensorflow
    began, cpu, steps = time.perf_counter(), time.process_time(), 0
    while (seconds := time.perf_counter() - began) < args.seconds:
        next(stream)
        steps += 1
    cpu = time.process_time() - cpu
    stream.close()
    tokens = steps * config.train.batch_size * config.data.seq_len
    return {
        "tokens_per_second": round(tokens / seconds),
        "tokens_per_cpu_second": round(tokens / cpu),
        "open_seconds": round(opened, 4),
        "max_segments_seconds": round(searched - opened, 4),
        "first_batch_seconds": round(first, 4),
        "opened_bytes": grown,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "num_rows": rows.num_rows,
        "max_segments": max_segments,
        "fill": round(rows.fill, 5),
    }


def write_set(directory: epath.Path, num_tokens: int, shard_tokens: int) -> None:
    """Random tokens in documents of random length, as prepare would write them."""
    rng = np.random.default_rng(0)
    writer = ShardWriter(directory / "train", VOCAB_SIZE, shard_tokens)
    written = document = 0
    while written < num_tokens:
        length = min(num_tokens - written, 1 + int(rng.lognormal(np.log(400), 1.0)))
        document += 1
        written += length
        writer.add([rng.integers(2, VOCAB_SIZE, length, np.int32)], 4 * length, document)
    writer.finish()
    (directory / "manifest.json").write_text(
        json.dumps({"tokenizer": {"bos_id": 0, "eos_id": 1, "vocab_size": VOCAB_SIZE}})
    )


def resident_bytes() -> int:
    """Memory of this process that is its own, without mapped files."""
    with open("/proc/self/statm") as file:
        _, resident, shared, *_ = map(int, file.read().split())
    return (resident - shared) * resource.getpagesize()


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--shard_tokens", type=int, default=DataConfig().shard_tokens)
    parser.add_argument("--packing", choices=("stream", "bins", "pad"), default="stream")
    parser.add_argument("--unmasked", action="store_true", help="let attention cross documents")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--resume", type=int, default=1_000_000, help="step to start at")
    parser.add_argument("--through", choices=("auto", "tf.data", "threads"), default="auto")
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--directory", default="", help="keep the set here, and read it where it exists")
    return parser.parse_args()


if __name__ == "__main__":
    main()
