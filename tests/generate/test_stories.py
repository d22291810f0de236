"""A trained Llama, 260,000 parameters, and the sentence it is known to begin with."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from lslm_jax.config import GenerateConfig, ModelConfig
from lslm_jax.config_checks import fill_sizes
from lslm_jax.data import tokenizer as tokenizers
from lslm_jax.generate.decode import generate, stream
from lslm_jax.models import presets

BEGINNING = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."


@pytest.fixture(scope="module")
def directory(shared):
    return shared / "models" / "stories260K"


@pytest.fixture(scope="module")
def tokenizer(directory):
    return tokenizers.load(directory / "tokenizer.json")


@pytest.fixture(scope="module")
def model(directory):
    theirs = json.loads((directory / "config.json").read_text())
    config = ModelConfig(
        num_layers=theirs["num_hidden_layers"],
        d_model=theirs["hidden_size"],
        num_heads=theirs["num_attention_heads"],
        num_kv_heads=theirs["num_key_value_heads"],
        d_ff=theirs["intermediate_size"],
        vocab_size=theirs["vocab_size"],
        max_length=theirs["max_position_embeddings"],
        rope_theta=theirs["rope_parameters"]["rope_theta"],
        norm_eps=theirs["rms_norm_eps"],
        positions="rotary",
        norm="rmsnorm",
        activation="silu",
        gated=True,
        bias=False,
    )
    return filled(fill_sizes(config), load_file(directory / "model.safetensors"))


def filled(config, weights):
    """Our model with their weights: theirs are [out, in], ours [in, *out] or [*in, out], heads apart."""
    names = {
        "attention_norm/scale": "input_layernorm",
        "attention/q/w": "self_attn.q_proj",
        "attention/k/w": "self_attn.k_proj",
        "attention/v/w": "self_attn.v_proj",
        "attention/o/w": "self_attn.o_proj",
        "mlp_norm/scale": "post_attention_layernorm",
        "mlp/gate/w": "mlp.gate_proj",
        "mlp/up/w": "mlp.up_proj",
        "mlp/down/w": "mlp.down_proj",
    }

    def theirs(path, shape):
        path = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        whole = {"embed": "model.embed_tokens.weight", "norm/scale": "model.norm.weight"}
        if path in whole:
            return weights[whole[path]]
        name = names[path.removeprefix("blocks/")]
        return np.stack([weights[f"model.layers.{i}.{name}.weight"].T for i in range(shape[0])]).reshape(shape)

    shapes = jax.eval_shape(lambda: presets.build(config, jax.random.key(0)))
    return jax.tree_util.tree_map_with_path(lambda path, leaf: theirs(path, leaf.shape), shapes)


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
