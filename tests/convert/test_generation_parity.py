"""Constraints of generation_config.json: texts of transformers, greedy and searched, and its logits processors."""

import json
import random

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_keys_parity import Words, adapted, their_text
from test_parity import CASES, load, make

from lslm_jax.convert import generation
from lslm_jax.generate import constraints, decode
from lslm_jax.generate.constraints import Text

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from transformers.generation import logits_process  # noqa: E402

V = 12


def banned(processor, ids_BL):
    return (processor(torch.tensor(ids_BL), torch.zeros(len(ids_BL), V)) == -torch.inf).numpy()


def test_masks_are_those_of_the_processors():
    rng = np.random.default_rng(0)
    words = [[1, 2], [3, 3, 0], [4], [0, 1, 2, 3], [5, 6]]
    for length in (1, 2, 4, 9):
        ids_BL = rng.integers(0, 7, (64, length))
        text = Text(jnp.pad(jnp.asarray(ids_BL), ((0, 0), (2, 3))), jnp.full(64, 2), jnp.int32(2 + length))
        for n in (1, 2, 3):
            expected = banned(logits_process.NoRepeatNGramLogitsProcessor(n), ids_BL)
            np.testing.assert_array_equal(constraints.repeats(text, n, V), expected)
        expected = banned(logits_process.NoBadWordsLogitsProcessor(words), ids_BL)
        np.testing.assert_array_equal(constraints.completes(text, tuple(map(tuple, words)), V), expected)


COMMON = {"eos_token_id": [2, 9], "max_new_tokens": 16, "pad_token_id": 0, "bos_token_id": 1}
ALONE = {  # what is added, each alone and all together
    "no_repeat_ngram_size": 2,
    "min_new_tokens": 12,
    "repetition_penalty": 1.7,
    "bad_words_ids": [[first, last] for first in range(20, 60) for last in range(40, 60)],
    "begin_suppress_tokens": list(range(0, 131, 2)),
}
SETTINGS = {"all": ALONE, "renormalized": ALONE | {"renormalize_logits": True}}
LONG = {key: {key: value} for key, value in ALONE.items()}
CHOICES = [("all", 1), ("all", 3), ("renormalized", 3)]
CHOICES += [pytest.param(key, beams, marks=pytest.mark.exhaustive) for key in LONG for beams in (1, 3)]


@pytest.fixture(scope="module", params=["llama3", "marian"])
def directory(request, tmp_path_factory):
    """A model of theirs and the same as one of ours."""
    path, case = tmp_path_factory.mktemp(request.param), CASES[request.param]
    make(case).save_pretrained(path)
    return path, case, *load(path, case.objective)


@pytest.mark.parametrize(("label", "beams"), CHOICES)
def test_constraints_give_the_texts_of_transformers(label, beams, directory):
    path, case, source, model = directory
    content = COMMON | (SETTINGS | LONG)[label] | {"num_beams": beams, "early_stopping": True}
    content |= {"decoder_start_token_id": 0} if case.objective == "seq2seq" else {}
    changed = False
    for seed in range(3):
        ids = [random.Random(seed).randrange(3, 131) for _ in range(6)]
        words = Words()
        words.eos_id, words.bos_id = (ids[-1], 0) if case.objective == "seq2seq" else (2, 1)
        given = ids[:-1] if case.objective == "seq2seq" else ids
        (path / "generation_config.json").write_text(json.dumps(content))
        ours = adapted(generation.read(epath.Path(path), source.settings, Words()), words)  # type: ignore[arg-type]
        found = decode.generate(model, words, [given], ours, 0)[0]
        expected = texts_of(path, case, ids)
        assert [int(id) for id in found.text.split()] == expected, seed
        (path / "generation_config.json").write_text(json.dumps({**content, **dict.fromkeys(ALONE)}))
        changed |= expected != texts_of(path, case, ids)
    assert changed, "a setting that changes no text proves nothing"


def texts_of(path, case, ids):
    """Tokens that transformers writes before the first that ends a text."""
    written, _ = their_text(path, case, ids)
    assert written is not None
    end = next((i for i, id in enumerate(written) if id in COMMON["eos_token_id"]), len(written))
    return written[:end]
