"""Beam search with models of every family: `test_beam.py` shows that the search is right, given right logits."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from tiny_models import text_logits

from lslm_jax.config import Config, GenerateConfig, MeshConfig
from lslm_jax.data.tokenizer import Bytes
from lslm_jax.errors import ConfigError
from lslm_jax.generate import decode, reading
from lslm_jax.generate.decode import generate, stream
from lslm_jax.sharding import make_mesh, shardings_of

BEAMS = GenerateConfig(max_tokens=12, beams=3, length_penalty=0.6)
GREEDY = GenerateConfig(max_tokens=12, temperature=0.0)
PROMPTS = [Bytes().encode(text).tolist() for text in ("To be, or not to be", "", "A", "that is the question: whether")]


def said(result, tokenizer):
    """Its tokens, the end of the text included."""
    return result.ids + [tokenizer.eos_id] * (result.ended == "eos")


def score(model, tokenizer, prompt, ids, penalty):
    """What the full forward pass makes of a text."""
    log_probs_TV = jax.nn.log_softmax(text_logits(model, tokenizer, prompt, ids), axis=-1)
    return sum(float(row_V[id]) for row_V, id in zip(log_probs_TV, ids, strict=True)) / ((5 + len(ids)) / 6) ** penalty


def assert_same(results, expected):
    """Scores are sums in another order on other devices and in other batches."""
    assert [r._replace(score=None) for r in results] == [r._replace(score=None) for r in expected]
    np.testing.assert_allclose([r.score for r in results], [r.score for r in expected], rtol=1e-5)


def test_a_score_is_what_reading_the_text_at_once_gives_and_better_than_greedy(model, tokenizer):
    greedy = generate(model, tokenizer, PROMPTS, GREEDY, 0)
    results = generate(model, tokenizer, PROMPTS, BEAMS, 0)
    gain = 0.0
    for prompt, plain, result in zip(PROMPTS, greedy, results, strict=True):
        ids = said(result, tokenizer)
        assert result.num_tokens == len(ids) <= 12 and result.text == tokenizer.decode(result.ids)
        np.testing.assert_allclose(result.score, score(model, tokenizer, prompt, ids, 0.6), rtol=1e-4)
        gain += result.score - score(model, tokenizer, prompt, said(plain, tokenizer), 0.6)
    assert gain > 0.1


def test_one_beam_says_what_greedy_decoding_says(model, tokenizer):
    rows = decode._rows(model.config, tokenizer, PROMPTS, GREEDY, 0, ())
    rules = decode._Rules(replace(BEAMS, beams=1), tokenizer.vocab_size, (tokenizer.eos_id,))
    ids_BN, length_B, _ = decode._search(model.unstacked(), reading.pad(rows, 0, model.config), rules, 12)
    texts = [ids_N[:n].tolist() for ids_N, n in zip(np.asarray(ids_BN), length_B, strict=True)]
    assert texts == [said(result, tokenizer) for result in generate(model, tokenizer, PROMPTS, GREEDY, 0)]


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_a_row_does_not_depend_on_the_rows_beside_it(name, tokenizer, request):
    model = request.getfixturevalue(name)
    together = generate(model, tokenizer, PROMPTS[:2], BEAMS, 7)
    alone = [generate(model, tokenizer, [prompt], BEAMS, 8)[0] for prompt in PROMPTS[:2]]
    assert_same(together, alone)


@pytest.mark.parametrize(("name", "rows"), [("llama", 1), ("llama", 4), ("t5", 4)])
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
    (free,) = generate(gpt, tokenizer, PROMPTS[:1], GREEDY, 0)
    tokenizer.eos_id = free.ids[0]
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
