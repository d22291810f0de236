import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_models import GPT, T5, make_model, text_logits

from lslm_jax.config import Config, GenerateConfig, MeshConfig, ModelConfig
from lslm_jax.config.mesh_axes import mesh_axes
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.errors import ConfigError
from lslm_jax.generate import decode
from lslm_jax.generate.decode import generate, stream
from lslm_jax.models.weight_quantization import quantize
from lslm_jax.parallel.sharding import make_mesh, shardings_of

GREEDY = GenerateConfig(max_tokens=24, temperature=0.0)
WARM = GenerateConfig(max_tokens=24, temperature=1.0, top_k=40, repetition_penalty=1.2)
PROMPTS = [Bytes().encode(text).tolist() for text in ("To be, or not to be", "", "A", "that is the question: whether")]


def streamed(*args, **kwargs):
    parts, text = stream(*args, **kwargs), []
    while True:
        try:
            text.append(next(parts))
        except StopIteration as end:
            return text, end.value


def drawn_ids(results, tokenizer):
    """The tokens of each text, the end of the text included."""
    return [result.ids + [tokenizer.eos_id] * (result.ended == "eos") for result in results]


def test_each_token_is_the_likeliest_after_those_before_it(model, tokenizer):
    results = generate(model, tokenizer, PROMPTS, GREEDY, 0)
    texts = drawn_ids(results, tokenizer)
    logits = text_logits(model, tokenizer, PROMPTS, texts)
    for result, drawn, logits_NV in zip(results, texts, logits, strict=True):
        assert drawn == np.argmax(logits_NV, axis=-1).tolist()
        assert len(drawn) == result.num_tokens and (result.ended == "eos" or len(drawn) == 24)
        assert result.text == tokenizer.decode(result.ids) and result.score is None
        assert len(set(drawn)) > 3  # a model that says one thing only would prove nothing


@pytest.mark.parametrize(
    ("name", "kind"),
    [("llama", "int8"), pytest.param("t5", "int8", marks=pytest.mark.exhaustive), ("t5", "int4")],
)
def test_weights_of_a_few_bits_are_read_token_by_token_as_all_at_once(name, kind, tokenizer, request):
    pytest.importorskip("qwix")
    model = quantize(jax.tree.map(jnp.copy, request.getfixturevalue(name)), kind)
    texts = drawn_ids(generate(model, tokenizer, PROMPTS, GREEDY, 0), tokenizer)
    for drawn, logits_NV in zip(texts, text_logits(model, tokenizer, PROMPTS, texts), strict=True):
        assert drawn == np.argmax(logits_NV, axis=-1).tolist()


@pytest.mark.parametrize(
    ("name", "settings"),
    [("gpt", GREEDY), ("llama", WARM), ("t5", GREEDY)],
    ids=["gpt, greedy", "llama, sampled", "t5, greedy"],
)
def test_a_row_does_not_depend_on_the_rows_beside_it(name, tokenizer, settings, request):
    model = request.getfixturevalue(name)
    together = generate(model, tokenizer, PROMPTS, settings, 7)
    for i in (1, 2):  # which alone need less padding than beside longer ones
        assert generate(model, tokenizer, [PROMPTS[i]], settings, 7, first=i) == [together[i]]


def test_the_seed_decides(llama, tokenizer):
    first, again, other = (generate(llama, tokenizer, PROMPTS, WARM, seed) for seed in (1, 1, 2))
    assert first == again
    assert all(a.ids != b.ids for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize(
    "settings",
    [{}, {"stop": ("e",)}, pytest.param({"repetition_penalty": 1.0}, marks=pytest.mark.exhaustive)],
    ids=str,
)
def test_one_row_is_read_twice_on_gpus_and_says_the_same(settings, llama, tokenizer, monkeypatch):
    settings, prompt = replace(WARM, **settings), tokenizer.encode("the")
    alone = generate(llama, tokenizer, [prompt], settings, 5)
    read = []
    pad = decode.prefill.pad
    monkeypatch.setattr(decode.prefill, "pad", lambda rows, *rest: read.append(len(rows)) or pad(rows, *rest))
    monkeypatch.setattr(decode, "platform", lambda: "gpu")
    assert generate(llama, tokenizer, [prompt], settings, 5) == alone and read == [2]
    assert "".join(stream(llama, tokenizer, prompt, settings, 5)) == alone[0].text
    assert len(generate(llama, tokenizer, PROMPTS, settings, 5)) == 4 and read == [2, 2, 4]


def test_equal_prompts_in_a_batch_draw_differently(llama, tokenizer):
    results = generate(llama, tokenizer, [PROMPTS[0]] * 4, WARM, 0)
    assert len({tuple(result.ids) for result in results}) == 4


def test_a_repetition_penalty_hears_the_prompt_and_the_new_tokens_but_no_padding(llama, tokenizer):
    settings = replace(GREEDY, repetition_penalty=1e6)
    texts = [result.ids for result in generate(llama, tokenizer, PROMPTS, settings, 0)]
    logits = text_logits(llama, tokenizer, PROMPTS, texts)
    for prompt, ids, logits_NV in zip(PROMPTS, texts, logits, strict=True):
        seen = {tokenizer.bos_id, *prompt}
        for id, row_V in zip(ids, logits_NV.copy(), strict=True):
            again_V = row_V[list(seen)]
            row_V[list(seen)] = np.where(again_V > 0, again_V / 1e6, again_V * 1e6)
            assert id == row_V.argmax() and id not in seen
            seen.add(id)


def test_the_parts_of_a_stream_are_the_text_of_the_batch(llama, tokenizer):
    for i, (prompt, result) in enumerate(zip(PROMPTS, generate(llama, tokenizer, PROMPTS, GREEDY, 3), strict=True)):
        parts, end = streamed(llama, tokenizer, prompt, GREEDY, 3, first=i)
        assert "".join(parts) == result.text and end == result
        assert len(parts) > 2


def test_a_stop_string_ends_its_row_and_no_other(llama, tokenizer):
    free = generate(llama, tokenizer, PROMPTS, GREEDY, 0)
    stop = free[1].text[8:11]
    settings = replace(GREEDY, stop=(stop,))
    stopped = generate(llama, tokenizer, PROMPTS, settings, 0)
    assert stopped[1].ended == "stop" and stopped[1].num_tokens < 24
    for i, (a, b) in enumerate(zip(free, stopped, strict=True)):
        assert b.text == a.text.split(stop)[0]
        assert b.ended == ("stop" if stop in a.text else a.ended)
        assert streamed(llama, tokenizer, PROMPTS[i], settings, 0)[1] == b
    assert any(b.ended == "length" for b in stopped)


@pytest.mark.parametrize("by", ["the vocabulary", "the settings"])
def test_the_end_of_text_ends_its_row_and_no_other(by, llama, tokenizer):
    free = generate(llama, tokenizer, PROMPTS, GREEDY, 0)
    eos_id = free[0].ids[5]
    if by == "the vocabulary":
        tokenizer.eos_id = eos_id
    ended = generate(llama, tokenizer, PROMPTS, replace(GREEDY, stop_ids=(eos_id,) * (by == "the settings")), 0)
    for a, b in zip(free, ended, strict=True):
        end = a.ids.index(eos_id) if eos_id in a.ids else None
        assert b.ids == a.ids[:end]
        assert (b.ended, b.num_tokens) == (("length", 24) if end is None else ("eos", end + 1))
    assert ended[0].ended == "eos"


def test_a_model_that_never_saw_bos_reads_the_prompt_alone(llama, tokenizer):
    asked = replace(GREEDY, bos=False)
    same = generate(llama, tokenizer, [[tokenizer.bos_id, 5, 6]], asked, 0)
    assert same[0].ids == generate(llama, tokenizer, [[5, 6]], GREEDY, 0)[0].ids
    assert generate(llama, tokenizer, [[5, 6]], asked, 0)[0].ids != same[0].ids
    # Something must be read.
    assert generate(llama, tokenizer, [[]], asked, 0)[0].ids == generate(llama, tokenizer, [[]], GREEDY, 0)[0].ids


def test_text_stops_at_the_longest_the_model_was_built_for(gpt, tokenizer):
    longest = gpt.config.max_length
    prompts = [[5] * (longest - 2), [5] * (longest - 4), [5] * 60]
    results = generate(gpt, tokenizer, prompts, GREEDY, 0)
    assert [(r.num_tokens, r.ended) for r in results] == [(1, "length"), (3, "length"), (24, "length")]
    assert generate(gpt, tokenizer, prompts[2:] * 3, GREEDY, 0) == results[2:] * 3


def test_a_prompt_without_room_for_a_token_is_refused_in_one_line(llama, tokenizer):
    with pytest.raises(ConfigError, match=r"^prompt 1 has 96 tokens with bos, but model.max_length=96 .* at most 95$"):
        generate(llama, tokenizer, [[5], [5] * 95], GREEDY, 0)


def test_an_empty_stop_string_is_refused(llama, tokenizer):
    with pytest.raises(ConfigError, match=r"generate\.stop"):
        generate(llama, tokenizer, [[5]], replace(GREEDY, stop=("",)), 0)


def test_no_prompts_no_results(llama, tokenizer):
    assert generate(llama, tokenizer, [], GREEDY, 0) == []


@pytest.mark.parametrize(
    "config", [replace(GPT, vocab_size=300), pytest.param(T5, marks=pytest.mark.exhaustive)], ids=["gpt", "t5"]
)
def test_only_tokens_of_the_tokenizer_are_drawn(tokenizer, config):
    model = make_model(replace(config, dtype="bfloat16"))  # 300, or 359, and padded to 384
    settings = GenerateConfig(max_tokens=64, temperature=1000.0)
    ids = [id for result in generate(model, tokenizer, [[5]] * 16, settings, 0) for id in result.ids]
    assert max(ids) < tokenizer.vocab_size and len(ids) > 500


def test_prompts_of_like_length_compile_once(llama, tokenizer):
    def programs():
        return decode._prefill._cache_size(), decode._decode._cache_size()

    generate(llama, tokenizer, PROMPTS, WARM, 0)
    before = programs()
    generate(llama, tokenizer, PROMPTS[::-1], WARM, 5)
    generate(llama, tokenizer, [PROMPTS[0][:18], [4], [5], [6]], replace(WARM, stop=("\n\n\n",), prompts=("x",)), 5)
    assert programs() == before


def test_a_source_is_cut_before_its_end(t5, tokenizer):
    long = [3 + n % 50 for n in range(200)]
    whole = long[: t5.config.max_length - 1]
    settings = GenerateConfig(max_tokens=4, beams=2)  # whose scores tell sources apart
    cut, full, shorter = (generate(t5, tokenizer, [ids], settings, 0) for ids in (long, whole, whole[:-1]))
    assert cut == full and full[0].score != shorter[0].score


def test_the_text_after_a_suffix_is_one_of_its_own(llama, t5, tokenizer):
    bos, prompt = tokenizer.bos_id, PROMPTS[0]
    (after,) = generate(llama, tokenizer, [prompt], GREEDY, 0, suffix_ids=(bos,))
    assert [after] == generate(llama, tokenizer, [[*prompt, bos]], GREEDY, 0)
    assert after.ids != generate(llama, tokenizer, [prompt], GREEDY, 0)[0].ids
    assert streamed(llama, tokenizer, prompt, GREEDY, 0, suffix_ids=(bos,))[1] == after
    # An encoder-decoder goes on from what it would have said.
    free = generate(t5, tokenizer, PROMPTS, GREEDY, 0)[0]
    (rest,) = generate(t5, tokenizer, [prompt], replace(GREEDY, max_tokens=20), 0, suffix_ids=free.ids[:4])
    assert rest.ids == free.ids[4:]


CUBE = MeshConfig(data=2, fsdp=2, tensor=2)
LONG = MeshConfig(data=1, fsdp=2, context=2, tensor=2)
DEEP = MeshConfig(data=2, stage=2)


@pytest.mark.parametrize(
    ("name", "rows", "settings", "mesh"),
    [
        ("llama", 1, GREEDY, CUBE),
        ("llama", 4, WARM, CUBE),
        ("t5", 4, GREEDY, LONG),
        ("t5", 4, GREEDY, DEEP),
        pytest.param("t5", 4, GREEDY, CUBE, marks=pytest.mark.exhaustive),
    ],
    ids=["one row", "four rows, sampled", "rows are split", "in stages", "an encoder-decoder"],
)
def test_several_devices_say_what_one_says(name, tokenizer, settings, rows, mesh, request):
    model, prompts = request.getfixturevalue(name), PROMPTS[:rows]
    settings = replace(settings, stop=("\x00\x00\x00\x00",))
    expected = generate(model, tokenizer, prompts, settings, 0)
    mesh = make_mesh(Config(mesh=mesh), jax.devices()[: math.prod(mesh_axes(mesh).values())])
    with jax.set_mesh(mesh):
        sharded = jax.device_put(model, shardings_of(model, mesh))
        results = generate(sharded, tokenizer, prompts, settings, 0)
        before = decode._decode._cache_size()
        assert generate(sharded, tokenizer, prompts, settings, 0) == results == expected
        assert decode._decode._cache_size() == before


def test_texts_that_the_model_is_too_short_for_are_counted(tokenizer, capsys):
    model = ModelConfig(max_length=20)
    settings = replace(GREEDY, max_tokens=9)
    rows = [decode.Row(tokenizer, number, [1], limit, settings) for number, limit in enumerate((2, 2, 9, 3))]
    for row in rows[:3]:  # the last one ends by itself
        for _ in range(row.limit):
            row.push(tokenizer.encode("a")[0])
    rows[3].push(tokenizer.eos_id)
    decode._report_limit(model, rows, settings)
    decode._report_limit(model, rows[:1], settings)
    decode._report_limit(model, rows[2:], settings)
    reached = "before generate.max_tokens=9, where model.max_length=20 is reached"
    assert capsys.readouterr().err == f"2 of 4 texts end {reached}\nthe text ends {reached}\n"
