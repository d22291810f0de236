"""Beam search with models of every family: `test_beam.py` shows that the search is right, given right logits."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_models import text_logits

from lslm_jax.config import Config, GenerateConfig, MeshConfig
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.errors import ConfigError
from lslm_jax.generate import decode, prefill
from lslm_jax.generate.decode import generate, stream
from lslm_jax.parallel.sharding import make_mesh, shardings_of

BEAMS = GenerateConfig(max_tokens=12, beams=3, length_penalty=0.6)
GREEDY = GenerateConfig(max_tokens=12, temperature=0.0)
PROMPTS = [Bytes().encode(text).tolist() for text in ("To be, or not to be", "", "A", "that is the question: whether")]


def said(result, tokenizer):
    """Its tokens, the end of the text included."""
    return result.ids + [tokenizer.eos_id] * (result.ended == "eos")


def scores(model, tokenizer, texts, penalty):
    """The score of each prompt's text by the full forward pass."""
    log_probs = []
    for ids, logits_NV in zip(texts, text_logits(model, tokenizer, PROMPTS, texts), strict=True):
        logits_NV = logits_NV.astype(np.float64)
        log_probs_NV = logits_NV - np.log(np.exp(logits_NV).sum(axis=-1, keepdims=True))
        log_probs.append(log_probs_NV[np.arange(len(ids)), ids].sum())
    return [log_prob / ((5 + len(ids)) / 6) ** penalty for log_prob, ids in zip(log_probs, texts, strict=True)]


def assert_same(results, expected):
    """Scores are sums in another order on other devices and in other batches."""
    assert [r._replace(score=None) for r in results] == [r._replace(score=None) for r in expected]
    np.testing.assert_allclose([r.score for r in results], [r.score for r in expected], rtol=1e-5)


EVERY_MODEL = pytest.mark.parametrize(
    "model",
    ["llama", "t5", *(pytest.param(name, marks=pytest.mark.exhaustive) for name in ("gpt", "transformer"))],
    indirect=True,
)


@EVERY_MODEL
def test_a_score_is_what_reading_the_text_at_once_gives_and_better_than_greedy(model, tokenizer):
    greedy = [said(result, tokenizer) for result in generate(model, tokenizer, PROMPTS, GREEDY, 0)]
    results = generate(model, tokenizer, PROMPTS, BEAMS, 0)
    texts = [said(result, tokenizer) for result in results]
    for ids, result in zip(texts, results, strict=True):
        assert result.num_tokens == len(ids) <= 12 and result.text == tokenizer.decode(result.ids)
    found = [result.score for result in results]
    np.testing.assert_allclose(found, scores(model, tokenizer, texts, 0.6), rtol=1e-4)
    assert sum(found) - sum(scores(model, tokenizer, greedy, 0.6)) > 0.1


@EVERY_MODEL
def test_one_beam_says_what_greedy_decoding_says(model, tokenizer):
    rows = decode._rows(model.config, tokenizer, PROMPTS, GREEDY, 0, ())
    rules = decode._Rules(replace(BEAMS, beams=1), tokenizer.vocab_size, (tokenizer.eos_id,))
    prompts = prefill.pad(rows, 0, model.config)
    ids_BN, length_B, _ = map(np.asarray, decode._search(decode._unstacked(model), prompts, rules, 12))
    texts = [ids_N[:n].tolist() for ids_N, n in zip(ids_BN, length_B, strict=True)]
    assert texts == [said(result, tokenizer) for result in generate(model, tokenizer, PROMPTS, GREEDY, 0)]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name, tokenizer, request):
    model = request.getfixturevalue(name)
    together = generate(model, tokenizer, PROMPTS, BEAMS, 7)
    for i in (1, 2):  # which alone need less padding than beside longer ones
        assert_same(generate(model, tokenizer, [PROMPTS[i]], BEAMS, 8), together[i : i + 1])


@pytest.mark.parametrize(
    ("name", "rows"), [("llama", 1), pytest.param("llama", 4, marks=pytest.mark.exhaustive), ("t5", 4)]
)
def test_eight_devices_say_what_one_says(name, rows, tokenizer, request):
    model, prompts = request.getfixturevalue(name), PROMPTS[:rows]
    expected = generate(model, tokenizer, prompts, BEAMS, 0)
    mesh = make_mesh(Config(mesh=MeshConfig(data=2, fsdp=2, tensor=2)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, shardings_of(model, mesh))
        assert_same(generate(sharded, tokenizer, prompts, BEAMS, 0), expected)
        before = decode._search._cache_size()
        assert_same(generate(sharded, tokenizer, prompts[::-1], BEAMS, 1), expected[::-1])
        assert decode._search._cache_size() == before


def test_prompts_and_sources_of_like_length_compile_once(t5, tokenizer):
    generate(t5, tokenizer, PROMPTS, BEAMS, 0)
    before = decode._search._cache_size()
    generate(t5, tokenizer, [[*ids[:17], 4] for ids in PROMPTS], replace(BEAMS, stop=("x",), prompts=("y",)), 1)
    assert decode._search._cache_size() == before


def test_a_stop_string_cuts_the_text_that_was_found(llama, tokenizer):
    (free,) = generate(llama, tokenizer, PROMPTS[:1], BEAMS, 0)
    (cut,) = generate(llama, tokenizer, PROMPTS[:1], replace(BEAMS, stop=(free.text[2:4],)), 0)
    assert cut.text == free.text.split(free.text[2:4])[0] and cut.ended == "stop"
    assert cut.score == free.score and free.ids[: len(cut.ids)] == cut.ids


def test_a_text_may_end_at_once(gpt, tokenizer):
    first = text_logits(gpt, tokenizer, PROMPTS[:1], [[tokenizer.eos_id]])[0][0]
    tokenizer.eos_id = int(np.argmax(first))
    (result,) = generate(gpt, tokenizer, PROMPTS[:1], replace(BEAMS, length_penalty=0.0, max_tokens=1), 0)
    assert (result.ids, result.text, result.ended, result.num_tokens) == ([], "", "eos", 1)


def test_a_text_ends_at_the_longest_the_model_was_built_for(gpt, tokenizer):
    longest = gpt.config.max_length
    prompts = [[5] * (longest - 2), [5] * (longest - 4), [5] * 60]
    results = generate(gpt, tokenizer, prompts, BEAMS, 0)
    assert [(r.num_tokens, r.ended) for r in results] == [(1, "length"), (3, "length"), (12, "length")]


def test_a_stream_comes_in_one_part(llama, tokenizer):
    expected = generate(llama, tokenizer, PROMPTS[:1], BEAMS, 0)[0].text
    assert list(stream(llama, tokenizer, PROMPTS[0], BEAMS, 0)) == [expected]


@pytest.mark.parametrize("drawing", [{"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.9}, {"repetition_penalty": 1.1}])
def test_beams_do_not_go_with_sampling(llama, tokenizer, drawing):
    with pytest.raises(ConfigError, match=rf"^generate\.beams=3 .* generate\.{next(iter(drawing))} "):
        generate(llama, tokenizer, [[5]], replace(BEAMS, **drawing), 0)


def test_with_beams_a_temperature_of_zero_changes_nothing(llama, tokenizer):
    warm, cold = (generate(llama, tokenizer, [[5]], replace(BEAMS, temperature=t), 0) for t in (1.0, 0.0))
    assert warm == cold
