"""Measures generation with a cache: random weights, greedy, no text ends before its time.

    python benchmarks/decode.py --model=llama_1b --batch_sizes=1,32,128

Prints a line of JSON for each batch size: milliseconds to the first token; tokens/s of all rows together, without the
first; the share of the memory's bandwidth, as a copy reaches it, that reading the weights and the cache takes.
"""

import argparse
import statistics
import time
from typing import Any

import jax
import numpy as np
from measure import about, add_model, busiest, configured, copy_rate, spread, tell

from lslm_jax.config import Config, GenerateConfig
from lslm_jax.generate.decode import generate
from lslm_jax.models.build_model import build_model
from lslm_jax.models.weight_quantization import KINDS, quantize
from lslm_jax.parallel.sharding import make_mesh, use
from lslm_jax.runtime import huge_pages
from lslm_jax.train.train_state import num_parameters


class Words:
    """As much of a tokenizer as generation asks for; nothing is ever spelt."""

    bos_id, eos_id = 0, 1

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def decode(self, ids: Any) -> str:
        """No text."""
        return ""


def main() -> None:
    """Prints a line of JSON for each batch size."""
    args, config = parse_args()
    mesh = make_mesh(config)
    with use(mesh, config.mesh):
        model = jax.jit(lambda: build(config))()
        parameters = num_parameters(model)
        if args.weights:
            model = quantize(model, args.weights)
        rate, size = copy_rate(), sum(leaf.size * bits(leaf.dtype) / 8 for leaf in jax.tree.leaves(model))
        for batch_size in args.batch_sizes:
            first, rest, kernels = times(args, config, model, batch_size)
            a_token = (statistics.median(rest) - statistics.median(first)) / (args.tokens - 1)
            cache = cache_bytes(config) * batch_size * (args.prompt + args.tokens / 2)
            tell(
                {"model": args.model, "weights": args.weights or config.model.dtype, "changes": args.changes}
                | about()
                | {
                    "parameters": parameters,
                    "batch_size": batch_size,
                    "prompt": args.prompt,
                    "tokens": args.tokens,
                    "first_token_ms": spread([1e3 * seconds for seconds in first]),
                    "tokens_per_second": round(batch_size / a_token, 1),
                    "copy_gbs": round(rate / 1e9, 1),
                    "share_of_bandwidth": round((size + cache) / a_token / rate, 3),
                }
                | kernels
            )


def times(
    args: argparse.Namespace, config: Config, model: Any, batch_size: int
) -> tuple[list[float], list[float], dict[str, Any]]:
    """Seconds, of each round, to write one token a row; and to write all; and the kernels of that, if wanted."""
    prompts = np.random.default_rng(0).integers(2, config.model.vocab_size, (batch_size, args.prompt - 1))

    def seconds(tokens: int) -> float:
        settings = GenerateConfig(max_tokens=tokens, temperature=0.0, never_ids=(Words.eos_id,))
        begun = time.perf_counter()
        results = generate(model, Words(config.model.vocab_size), list(prompts), settings, 0)
        assert all(result.num_tokens == tokens for result in results)
        return time.perf_counter() - begun

    for tokens in (1, args.tokens):  # which compiles
        seconds(tokens)
    short, long = ([seconds(tokens) for _ in range(args.rounds)] for tokens in (1, args.tokens))
    return short, long, busiest(lambda: seconds(args.tokens), args.kernels, steps=1) if args.kernels else {}


def build(config: Config) -> Any:
    """A model with random weights in the type that it computes in."""
    model = build_model(config.model, jax.random.key(config.seed), config.task.objective)
    return jax.tree.map(lambda leaf: leaf.astype(config.model.activations), model)


def bits(dtype: Any) -> int:
    """Of one number in a device's memory; NumPy gives a byte to one of four bits."""
    return 4 if dtype == jax.numpy.int4 else 8 * np.dtype(dtype).itemsize


def cache_bytes(config: Config) -> int:
    """Of keys and values, for one token of a row."""
    model = config.model
    each = jax.numpy.dtype(model.activations).itemsize
    return 2 * model.num_layers * model.num_kv_heads * model.head_dim * each


def parse_args() -> tuple[argparse.Namespace, Config]:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model(flags)
    flags.add_argument("--batch_sizes", type=lambda text: [int(size) for size in text.split(",")], default=[1, 8])
    flags.add_argument("--prompt", type=int, default=16, help="tokens of a prompt, with bos")
    flags.add_argument("--tokens", type=int, default=128, help="to write")
    flags.add_argument("--rounds", type=int, default=5)
    flags.add_argument("--weights", choices=KINDS, default="", help="of fewer bits (needs qwix)")
    flags.add_argument("--kernels", type=int, default=0, help="list so many of a GPU's kernels, busiest first")
    return configured(flags)


if __name__ == "__main__":
    huge_pages.ensure_large_pages()
    main()
