"""Evaluations give one prediction per example, in input order; their losses and answers are those of the metrics."""

import json
import random

import jax
import numpy as np
import pytest
from etils import epath

from lslm_jax.config import loading, validation
from lslm_jax.data import dataloader
from lslm_jax.data.prepare import held_out_files
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.special_tokens import resolve
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.evaluate import evaluators
from lslm_jax.evaluate.types import Setting
from lslm_jax.models import attention
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh

WORDS = ("film", "plot", "cast", "end", "a", "the", "scene")
COUNT = 13
MODEL = {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 48}
KINDS = {
    "causal": ("decoder", {"document": "line", "packing": "stream"}),
    "masked": ("encoder", {"document": "line", "packing": "bins"}),
    "span_corruption": ("encoder_decoder", {"document": "line"}),
    "classification": ("encoder", {"example": "label"}),
    "regression": ("encoder", {"example": "label"}),
    "tagging": ("encoder", {"example": "tags", "text_key": "words", "label_key": "tags"}),
    "qa": ("encoder", {"example": "qa"}),
    "seq2seq": ("encoder_decoder", {"example": "pair", "text_key": "de", "target_key": "en", "packing": "bins"}),
    "seq2seq_decoder": ("decoder", {"example": "pair", "text_key": "de", "target_key": "en", "packing": "bins"}),
}


def record(kind: str, rng: random.Random, number: int) -> dict:
    words = rng.choices(WORDS, k=rng.randint(2, 6))
    match kind:
        case "causal" | "masked" | "span_corruption":
            return {"text": f"{number} {' '.join(words)}"}
        case "classification":
            return {"text": " ".join(words), "label": ("bad", "good", "so so")[number % 3]}
        case "regression":
            return {"text": " ".join(words), "label": number / 4}
        case "tagging":
            return {"words": words, "tags": [("O", "B-X")[word == "film"] for word in words]}
        case "qa":
            context = " ".join(rng.choices(WORDS, k=20)) + " Rome"
            answers = [{"text": "Rome", "answer_start": context.index("Rome")}]
            return {"context": context, "qas": [{"id": f"q{number}", "question": "Where?", "answers": answers}]}
    return {"de": " ".join(words), "en": " ".join(words).upper()}


def write(path, kind: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    records = [record(kind, rng, number) for number in range(count)]
    if kind == "qa":
        path.write_text(json.dumps({"data": [{"title": "T", "paragraphs": records}]}))
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return records


LONG = ("masked", "span_corruption", "regression", "seq2seq_decoder")  # which differ little from the others
SCORED = ("classification", "regression", "tagging", "qa", "seq2seq", "seq2seq_decoder")  # by more than loss
PARAMS = [pytest.param(kind, marks=[pytest.mark.exhaustive] * (kind in LONG)) for kind in KINDS]


@pytest.fixture(scope="module", params=PARAMS)
def evaluated(request, tmp_path_factory):
    """Kind, records, report of the prepared split, and what else is needed to evaluate files in the same way."""
    kind, root = request.param, tmp_path_factory.mktemp(request.param)
    family, data = KINDS[kind]
    suffix = "json" if kind == "qa" else "jsonl"
    write(root / f"train.{suffix}", kind, 9, 0)
    records = write(root / f"valid.{suffix}", kind, COUNT, 1)
    tree = {
        "model": MODEL | {"family": family} | ({"token_types": 2} if kind == "qa" else {}),
        "data": {
            "packing": "pad",
            "seq_len": 48,
            "files": [f"{root}/train.{suffix}"],
            "valid_files": [f"{root}/valid.{suffix}"],
        }
        | data,
        "task": {"objective": kind.removesuffix("_decoder"), "stride": 16, "mask_rate": 0.3},
        "tokenizer": {"kind": "bytes"},
        "train": {"batch_size": 8},
        "generate": {"max_tokens": 4},
    }
    config = validation.validate(loading.from_dict(tree))
    prepare(config, epath.Path(root) / "data", lambda line: None, workers=1)
    manifest = json.loads((root / "data" / "manifest.json").read_text())
    config, facts = resolve(config, manifest)
    mesh = make_mesh(config, jax.devices()[:1])
    with jax.set_mesh(mesh):
        model = jax.jit(lambda: build_model(config.model, jax.random.key(1), config.task.objective))()
        held_out = dataloader.open_eval(config, epath.Path(root) / "data", config.model.vocab_size)
        setting = Setting(config, Bytes(), manifest["labels"], facts["special"], attention.XLA, mesh)
        evaluate = lambda data: evaluators.make(setting, data, by_example=True)(model)
        plain = evaluators.make(setting, held_out)(model)
        return kind, records, plain, evaluate(held_out), (root, suffix, config, manifest, facts, evaluate, mesh)


def test_there_is_a_line_for_each_example_in_order(evaluated):
    kind, records, _, report, _ = evaluated
    lines = list(report.predictions())
    if kind == "span_corruption":  # of which a short document may have no span
        assert len(lines) > COUNT / 2
        records = [records[line["example"]] for line in lines]
    else:
        assert [line["example"] for line in lines] == list(range(COUNT))
    assert report.facts["examples"] == COUNT
    expected = {
        "causal": lambda one: {"text": one["text"]},
        "span_corruption": lambda one: {"text": one["text"]},
        "masked": lambda one: {"text": one["text"]},
        "classification": lambda one: {"text": one["text"], "gold": one["label"]},
        "regression": lambda one: {"text": one["text"], "gold": one["label"]},
        "tagging": lambda one: {"words": one["words"], "gold": one["tags"]},
        "qa": lambda one: {"context": one["context"], "gold": ["Rome"], "id": one["qas"][0]["id"]},
        "seq2seq": lambda one: {"source": one["de"], "gold": one["en"]},
    }[kind.removesuffix("_decoder")]
    assert [line | expected(one) for line, one in zip(lines, records, strict=True)] == lines
    json.dumps(lines)


def test_losses_of_the_lines_add_up_to_the_loss(evaluated):
    kind, _, plain, report, _ = evaluated
    assert report.metrics == plain.metrics  # the same numbers whether or not they are told by example
    lines = list(report.predictions())
    weights = [line.get("tokens", len(line["words"]) if kind == "tagging" else 1) for line in lines]
    if kind == "qa":  # one line per question, several windows each
        assert all(line["loss"] > 0 for line in lines)
        return
    if "tokens" in report.metrics:
        assert sum(weights) == report.metrics["tokens"]
    mean = np.average([line["loss"] for line in lines], weights=weights)
    assert mean == pytest.approx(report.metrics["loss"], rel=1e-5)


@pytest.mark.parametrize("evaluated", [one for one in PARAMS if one.values[0] in SCORED], indirect=True)
def test_predictions_are_those_that_are_scored(evaluated):
    kind, _, _, report, _ = evaluated
    lines = list(report.predictions())
    match kind:
        case "classification":
            hits = [line["gold"] == line["predicted"] for line in lines]
            assert np.mean(hits) == pytest.approx(report.metrics["accuracy"])
            for line in lines:
                assert sum(line["probabilities"].values()) == pytest.approx(1.0)
                assert max(line["probabilities"], key=line["probabilities"].get) == line["predicted"]
                assert -np.log(line["probabilities"][line["gold"]]) == pytest.approx(line["loss"], rel=1e-5)
        case "regression":
            errors = [(line["gold"] - line["predicted"]) ** 2 for line in lines]
            assert np.mean(errors) == pytest.approx(report.metrics["mse"], rel=1e-5)
        case "tagging":
            hits = [a == b for line in lines for a, b in zip(line["gold"], line["predicted"], strict=True)]
            assert np.mean(hits) == pytest.approx(report.metrics["accuracy"])
        case "qa":
            answers = json.loads(report.files["answers.json"])
            assert {line["id"]: line["predicted"] for line in lines} == answers
            assert all(line["context"][line["begin"] : line["end"]] == line["predicted"] for line in lines)
        case "seq2seq" | "seq2seq_decoder":
            for line in lines:
                assert (
                    f"source:     {line['source']}\nhypothesis: {line['predicted']}\n"
                    in report.files["translations.txt"]
                )


def prepared(evaluated, tmp_path, *patterns: str, **changes):
    root, suffix, config, manifest, facts, _, _ = evaluated[-1]
    config = loading.override(config, list(changes.pop("settings", {}).items()))
    source = held_out_files.source_of(config, None)
    paths = manifest, epath.Path(root) / "data", epath.Path(tmp_path)
    patterns = patterns or (f"{root}/valid.{suffix}",)
    log = changes.pop("log", lambda line: None)
    return held_out_files.prepare_files(config, source, patterns, *paths, facts["special"], None, log)


def test_files_are_scored_as_the_split_that_was_prepared_of_them(evaluated, tmp_path):
    _, _, _, report, (root, suffix, _, _, _, evaluate, mesh) = evaluated
    with jax.set_mesh(mesh):
        found = prepared(evaluated, tmp_path)
        assert evaluate({found.source: found.data}).metrics == report.metrics
    assert len(found.origins) == COUNT and found.origins[0].startswith(f"{root}/valid.{suffix}") and not found.dropped


@pytest.mark.parametrize("evaluated", ["classification", "tagging"], indirect=True)
def test_an_unknown_label_of_a_file_is_an_error(evaluated, tmp_path):
    (tmp_path / "other.jsonl").write_text('{"text": "a", "label": "new", "words": ["a"], "tags": ["new"]}\n')
    with pytest.raises(DataError, match=r"other.jsonl:1: unknown label 'new'"):
        prepared(evaluated, tmp_path / "out", f"{tmp_path}/other.jsonl")


@pytest.mark.parametrize("evaluated", ["classification"], indirect=True)
def test_bad_records_of_a_file_are_counted_where_they_are_skipped(evaluated, tmp_path):
    label = evaluated[-1][3]["labels"][0]
    lines = [json.dumps({"text": "a b", "label": label}), "{", json.dumps({"text": "c"})]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"other.jsonl:2: not JSON"):
        prepared(evaluated, tmp_path / "strict", f"{tmp_path}/other.jsonl")
    settings = {"clean.bad_records": "skip"}
    found = prepared(evaluated, tmp_path / "skip", f"{tmp_path}/other.jsonl", settings=settings)
    assert found.dropped == {"bad_record": 2} and found.origins == [f"{tmp_path}/other.jsonl:1"]


def test_a_missing_file_and_a_source_that_there_is_not_are_named(tmp_path):
    mixture = {"mixture": [{"name": name, "files": [f"{name}.txt"]} for name in ("one", "two")]}
    config = loading.from_dict({"data": mixture})
    assert held_out_files.source_of(config, "two").files == ("two.txt",)
    with pytest.raises(ConfigError, match=r"--files needs --source=NAME of the mixture .* it has one, two"):
        held_out_files.source_of(config, None)
    with pytest.raises(ConfigError, match="--source=three names no source of the mixture"):
        held_out_files.source_of(config, "three")
    with pytest.raises(ConfigError, match="this run has one source"):
        held_out_files.source_of(loading.from_dict({}), "one")


@pytest.mark.parametrize("evaluated", ["causal"], indirect=True)
def test_a_file_that_matches_nothing_is_a_missing_input(evaluated, tmp_path):
    with pytest.raises(InputMissing, match=r"^--files: .*none.txt matches no file$"):
        prepared(evaluated, tmp_path, f"{tmp_path}/none.txt")


@pytest.mark.parametrize("evaluated", ["causal"], indirect=True)
def test_files_are_listed_with_what_they_are_read_as(evaluated, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x y"}\n')
    (tmp_path / "b.txt").write_text("x\ny\n")
    lines: list[str] = []
    prepared(evaluated, tmp_path / "out", f"{tmp_path}/a.jsonl", f"{tmp_path}/b.txt", log=lines.append)
    assert lines == ["files: 1 as JSON lines: a.jsonl; 1 as text with one document a line: b.txt"]
    with pytest.raises(ConfigError, match=r"^--files holds an empty name: "):
        prepared(evaluated, tmp_path / "none", "")
