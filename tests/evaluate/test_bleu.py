"""BLEU against its formula, worked out here, and both measures against what their definitions promise."""

import gzip
import math
import sys
from collections import Counter

import pytest

from lslm_jax.errors import ConfigError, DataError
from lslm_jax.evaluate.bleu import bleu


def by_formula(hypotheses: list[str], references: list[str]) -> float:
    """Brevity penalty times the geometric mean of the clipped precisions of 1 to 4 words; words parted by spaces."""
    logs = 0.0
    for n in range(1, 5):
        right = said = 0
        for hypothesis, reference in zip(hypotheses, references, strict=True):
            h, r = (
                Counter(zip(*(text.split()[i:] for i in range(n)), strict=False)) for text in (hypothesis, reference)
            )
            right += sum(min(count, r[gram]) for gram, count in h.items())
            said += sum(h.values())
        logs += math.log(right / said) / 4
    h, r = (sum(len(text.split()) for text in texts) for texts in (hypotheses, references))
    return 100 * math.exp(min(0.0, 1 - r / h)) * math.exp(logs)


@pytest.fixture(scope="module")
def references(shared) -> list[str]:
    paths = sorted((shared / "translation" / "multi30k_en_de").glob("*.de*"))
    path = paths[0]
    text = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return text.decode().splitlines()[:300]


def damaged(text: str) -> str:
    words = text.split()
    return " ".join(word for place, word in enumerate(words) if place % 6 != 4)


def test_bleu_is_that_of_the_formula(references):
    plain = ["".join(c for c in line if c.isalnum() or c == " ") for line in references]  # nothing to split off
    hypotheses = [damaged(line) for line in plain]
    score = bleu(hypotheses, plain)["bleu"]
    assert 20 < score < 90
    assert score == pytest.approx(by_formula(hypotheses, plain), rel=1e-9)


def test_a_perfect_translation_scores_100_and_a_worse_one_less(references):
    best, worse = bleu(references, references), bleu([damaged(line) for line in references], references)
    for name in ("bleu", "chrf"):
        assert best[name] == pytest.approx(100)
        assert 0 < worse[name] < 100


def test_punctuation_is_split_off_by_the_scorer_not_by_the_caller():
    raw = bleu(["Ein Hund läuft, springt (und bellt)!"], ["Ein Hund läuft, springt (und bellt)."])["bleu"]
    words = "Ein Hund läuft , springt ( und bellt ) "
    assert raw == pytest.approx(by_formula([words + "!"], [words + "."]))


def test_nothing_in_common_scores_next_to_nothing():
    scores = bleu(["x y z"], ["Ein Hund läuft ."])
    assert scores["bleu"] == 0 == scores["chrf"]


def test_an_empty_hypothesis_is_one_like_any_other():
    scores = bleu(["", "Ein Hund läuft schnell weg"], ["Zwei Katzen", "Ein Hund läuft schnell weg"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))


def test_the_signatures_tell_how_it_was_counted():
    scores = bleu(["ein Hund"], ["ein Hund"])
    assert {"nrefs:1", "case:mixed", "tok:13a", "smooth:exp"} <= set(scores["bleu_signature"].split("|"))
    assert {"nrefs:1", "case:mixed", "nc:6", "nw:0"} <= set(scores["chrf_signature"].split("|"))


@pytest.mark.parametrize(("hypotheses", "references"), [([], []), (["a"], []), (["a"], ["a", "b"])])
def test_what_cannot_be_compared_is_refused(hypotheses, references):
    with pytest.raises(DataError, match=f"{len(hypotheses)} translations and {len(references)} references"):
        bleu(hypotheses, references)


def test_without_sacrebleu_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    with pytest.raises(ConfigError, match="pip install sacrebleu"):
        bleu(["a"], ["a"])
