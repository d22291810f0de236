"""Small prepared data for every objective, in which no token of a text occurs twice: each tells where it comes from."""

import itertools
import json
from typing import NamedTuple

import numpy as np
from etils import epath

from lslm_jax.config import Config, DataConfig, EvalConfig, ModelConfig, TaskConfig, TrainConfig
from lslm_jax.data.shards import ShardWriter

BOS, EOS, VOCAB_SIZE = 1, 2, 20_000
NUM_LABELS = 5


class Case(NamedTuple):
    """An objective, the family that learns it, and what its examples are made of."""

    objective: str
    family: str
    fields: int = 1
    numbers: int = 0

    @property
    def id(self) -> str:
        return f"{self.objective}-{self.family}-{self.fields}"


CASES = [
    Case("causal", "decoder"),
    Case("masked", "encoder"),
    Case("span_corruption", "encoder_decoder"),
    Case("seq2seq", "encoder_decoder", 2),
    Case("seq2seq", "decoder", 2),
    Case("classification", "encoder", 1, 1),
    Case("classification", "encoder", 2, 1),
    Case("regression", "encoder", 2, 1),
    Case("tagging", "encoder", 2),
    Case("qa", "encoder", 2, 2),
]
PACKINGS = ("stream", "bins", "pad")


def config_of(case: Case, packing="stream", batch_size=8, seed=3, mixture=(), eval_batches=0, task=None, **data):
    data = {"seq_len": 24, "source_len": 32 if case.family == "encoder_decoder" else 0} | data
    return Config(
        seed=seed,
        model=ModelConfig(family=case.family, num_labels=NUM_LABELS),
        data=DataConfig(source="shards", packing=packing, mixture=mixture, **data),
        task=TaskConfig(objective=case.objective, **{"stride": 5, **(task or {})}),
        train=TrainConfig(batch_size=batch_size),
        eval=EvalConfig(batches=eval_batches),
    )


def write_examples(directory, examples, shard_tokens=400):
    """Writes a split of (fields, numbers) and returns it."""
    fields, numbers = len(examples[0][0]), len(examples[0][1])
    writer = ShardWriter(epath.Path(directory), VOCAB_SIZE, shard_tokens, fields, numbers)
    for i, (texts, values) in enumerate(examples):
        writer.add([np.asarray(text, np.int64) for text in texts], 5 * len(texts[-1]) + 1, i + 1, values)
    writer.finish()
    return examples


def write_manifest(directory, **more):
    entry = {"bos_id": BOS, "eos_id": EOS, "vocab_size": VOCAB_SIZE} | more
    (directory / "manifest.json").write_text(json.dumps({"tokenizer": entry}))


def examples_of(case: Case, count, first_token=3, longest=40):
    """Examples with texts of up to `longest` tokens, one without any."""
    rng = np.random.default_rng(count)
    made = []
    for i in range(count):
        lengths = [0 if i == 1 else int(rng.integers(1, longest)) for _ in range(case.fields)]
        if case.objective == "tagging":
            lengths[1] = 0
        ends = first_token + np.cumsum([0, *lengths])
        texts = [np.arange(begin, end) for begin, end in itertools.pairwise(ends)]
        first_token = int(ends[-1])
        numbers = [float(rng.integers(NUM_LABELS))] * case.numbers
        if case.objective == "tagging":
            texts[1] = np.where(rng.random(lengths[0]) < 0.6, rng.integers(1, NUM_LABELS + 1, lengths[0]), 0)
        if case.objective == "qa":
            first = int(rng.integers(-1, lengths[1])) if lengths[1] else -1
            last = min(first + int(rng.integers(0, 4)), lengths[1] - 1) if first >= 0 else -1
            numbers = [first, last]
        made.append((texts, numbers))
    return made


def write_all(directory, case: Case):
    """A training split of 40 examples and a held-out one of 11, and the manifest above them."""
    splits = {
        "train": write_examples(directory / "train", examples_of(case, 40)),
        "valid": write_examples(directory / "valid", examples_of(case, 11)),
    }
    write_manifest(directory)
    return splits
