"""A trained Llama, 260,000 parameters, and the sentence it is known to begin with."""

from dataclasses import replace

import jax
import pytest

from lslm_jax.config import Config, GenerateConfig
from lslm_jax.convert import pretrained
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.generate.decode import generate, stream
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.train.train_state import abstract_model

BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def directory(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(directory):
    return load_tokenizer(directory / "tokenizer.json")


@pytest.fixture(scope="module")
def model(directory):
    source = pretrained.describe(directory)
    config = Config(model=source.model)
    return pretrained.load(source, "causal", abstract_model(config, make_mesh(config, jax.devices()[:1]))).model


@pytest.mark.parametrize("scan", [True, False])
def test_the_trained_llama_tells_its_story(model, tokenizer, scan):
    model.config = replace(model.config, scan_layers=scan)
    settings = GenerateConfig(max_tokens=60, temperature=0.0)
    assert generate(model, tokenizer, [[]], settings, 0)[0].text.startswith(BEGINNING)


def test_it_goes_on_from_any_word_of_it_alone_and_in_a_batch(model, tokenizer):
    settings = GenerateConfig(max_tokens=60, temperature=0.0, stop=(" park",))
    begun = [" ".join(BEGINNING.split()[:words]) for words in (1, 4, 10, 13)]
    results = generate(model, tokenizer, [tokenizer.encode(text) for text in begun], settings, 0)
    assert [a + b.text for a, b in zip(begun, results, strict=True)] == [BEGINNING.removesuffix(" park.")] * 4
    assert {result.ended for result in results} == {"stop"}


def test_a_reader_sees_the_story_grow(model, tokenizer):
    parts = list(
        stream(model, tokenizer, tokenizer.encode("Once upon"), GenerateConfig(max_tokens=60, temperature=0.0), 0)
    )
    assert ("Once upon" + "".join(parts)).startswith(BEGINNING)
    assert len(parts) > 10
