"""Evaluators: each takes a model and yields (name, value) pairs; the loop knows no more of them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from lslm_jax.config import Config
from lslm_jax.data import prefetch
from lslm_jax.data.pipeline import EvalInput
from lslm_jax.evaluate import metrics, runner
from lslm_jax.models.attention import Backend
from lslm_jax.train.step import make_eval_step

Evaluator = Callable[[Any], Iterator[tuple[str, float]]]


def language_modelling(config: Config, data: Mapping[str, EvalInput], backend: Backend, mesh: Mesh) -> Evaluator:
    """Loss (nats a token), perplexity, bits per byte of the original text, and accuracy of the likeliest token.

    Each held-out document counts exactly once, whatever the batch and the mesh.
    """
    step = jax.jit(make_eval_step(config, backend))
    num_bytes = sum(part.num_bytes() for part in data.values())

    def evaluate(model: Any) -> Iterator[tuple[str, float]]:
        parts = (prefetch.batches(part.batch, 0, part.num_batches, through="threads") for part in data.values())
        sums = runner.total(step, model, itertools.chain.from_iterable(parts), mesh)
        yield "loss", sums.nll / sums.weight
        yield "perplexity", metrics.perplexity(sums.nll, sums.weight)
        yield "bits_per_byte", metrics.bits_per_byte(sums.nll, num_bytes)
        yield "accuracy", sums.correct / sums.weight
        yield "tokens", sums.weight

    return evaluate
