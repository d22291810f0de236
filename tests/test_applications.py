"""The applications from files to answers: each is trained, evaluated and asked, by the commands a user types."""

import json
import pathlib
import random

import numpy as np
import pytest

from lslm_jax.evaluate import squad_metrics
from lslm_jax.main import main

pytestmark = pytest.mark.usefixtures("one_device")

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "dull")
NEUTRAL = ("film", "plot", "cast", "end", "scene", "the", "a", "one")
BODY = {"family": "encoder", "num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 48}
PAIR = {"family": "encoder_decoder", "num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 48}
REST = {
    "tokenizer": {"kind": "bytes"},
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
    "checkpoint": {"every": 1000},
    "eval": {"every": 0},
    "log": {"tensorboard": False},
}
FAST = {"learning_rate": 1e-2, "warmup_steps": 5}  # fewer steps are enough than at the rate of REST


def run(workdir: pathlib.Path, capsys, *arguments: str, code: int = 0) -> str:
    """Runs a command; returns its stdout, or the one line on stderr of one that must fail."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, f"--workdir={workdir}"])
    output = capsys.readouterr()
    assert stop.value.code == code, output.err
    return output.out if code == 0 else output.err.strip().splitlines()[-1].removeprefix("lslm: ")


def trained(workdir: pathlib.Path, capsys, **sections: object) -> dict:
    """Trains by these settings; returns the summary. What the run said stays in WORKDIR/said.txt."""
    workdir.mkdir(exist_ok=True)
    (workdir / "given.json").write_text(json.dumps(REST | sections))
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([f"--config={workdir}/given.json", f"--workdir={workdir}"])
    output = capsys.readouterr()
    (workdir / "said.txt").write_text(output.err)
    assert stop.value.code == 0, output.err
    return json.loads(output.out)


def asked(workdir: pathlib.Path, capsys, *arguments: str) -> list[dict]:
    return [json.loads(line) for line in run(workdir, capsys, "generate", "--json", *arguments).splitlines()]


def sentences(count: int, seed: int) -> list[tuple[str, int]]:
    """Sentences of neutral words around one that tells the label."""
    rng = random.Random(seed)
    found = []
    for i in range(count):
        words = [*rng.choices(NEUTRAL, k=3), rng.choice((BAD, GOOD)[i % 2])]
        rng.shuffle(words)
        found.append((" ".join(words), i % 2))
    return found


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> pathlib.Path:
    root = tmp_path_factory.mktemp("reviews")
    for name, count, seed in (("train", 600, 0), ("valid", 61, 1), ("test", 10, 2)):
        lines = [f"{text}\t{label}" for text, label in sentences(count, seed)]
        (root / f"{name}.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    return root


def data_of(root: pathlib.Path, suffix: str = "tsv", **more: object) -> dict:
    files = {
        f"{split}files": [f"{root}/{name}.{suffix}"]
        for split, name in (("", "train"), ("valid_", "valid"), ("test_", "test"))
        if (root / f"{name}.{suffix}").exists()
    }
    return files | {"seq_len": 48, "packing": "pad"} | more


def test_sentiment_is_learnt_told_in_every_measure_and_asked_for(reviews, tmp_path, capsys):
    result = trained(
        tmp_path,
        capsys,
        model=BODY | {"pool": "mean"},
        data=data_of(reviews, example="label", labels=["negative", "positive"]),
        task={"objective": "classification"},
        train={"steps": 100, "batch_size": 32},
        optimizer=FAST,
        generate={"prompts": ["a good film"]},
    )
    assert result["eval/accuracy"] == 1.0 == result["eval/f1_macro"] == result["eval/matthews"]
    assert result["eval/confusion"] == [[31, 0], [0, 30]] and result["eval/labels"] == ["negative", "positive"]
    assert result["eval/loss"] < 0.2
    assert "negative" in (tmp_path / "samples" / "100-classes.txt").read_text()
    assert "label: positive" in (tmp_path / "samples" / "100.txt").read_text()

    again = json.loads(run(tmp_path, capsys, "evaluate"))
    measured = {name: again[name] for name in again if name not in ("split", "evaluation", "predictions")}
    assert measured == {name: result[name] for name in measured} and again["eval/examples"] == 61
    lines = [json.loads(line) for line in pathlib.Path(again["predictions"]).read_text().splitlines()]
    assert [line["text"] for line in lines] == [text for text, _ in sentences(61, 1)]
    assert all(line["predicted"] == line["gold"] for line in lines)
    named = tmp_path / "evaluations" / f"100-valid-{pathlib.Path(again['evaluation']).stem.rpartition('-')[2]}"
    assert "negative" in pathlib.Path(f"{named}-classes.txt").read_text()
    on_test = json.loads(run(tmp_path, capsys, "evaluate", "--split=test"))
    assert on_test["eval/accuracy"] == 1.0 and sum(map(sum, on_test["eval/confusion"])) == 10

    good, bad = asked(tmp_path, capsys, "--prompt=one great plot", "--prompt=the dull end")
    assert (good["label"], bad["label"]) == ("positive", "negative")
    assert sum(good["probabilities"].values()) == pytest.approx(1.0)
    assert "label: positive" in run(tmp_path, capsys, "generate", "--prompt=one great plot")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fine cast"}\n')
    assert asked(tmp_path, capsys, f"--prompts={tmp_path}/prompts.jsonl")[0]["label"] == "positive"
    message = run(tmp_path, capsys, "generate", "--prompt=x", f"--context={reviews}/test.tsv", code=2)
    assert message == "this model does not answer questions: leave out the context"


def test_a_masked_model_fills_in_and_lends_its_body_to_another_head(reviews, tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text, _ in sentences(600, 3)))
    result = trained(
        tmp_path / "body",
        capsys,
        model=BODY,
        data={"files": [str(texts)], "document": "line", "valid_fraction": 0.1, "seq_len": 48},
        task={"objective": "masked"},
        train={"steps": 20, "batch_size": 32},
    )
    assert {"eval/loss", "eval/pseudo_perplexity", "eval/accuracy"} <= set(result)
    [found] = asked(tmp_path / "body", capsys, "--prompt=the f[MASK]lm is go[MASK]d")
    assert len(found["fills"]) == 2 and all(0 < share <= 1 for fill in found["fills"] for share in fill.values())
    message = run(tmp_path / "body", capsys, "generate", "--prompt=nothing", code=2)
    assert message == "a masked model fills in [MASK]: put it into the prompt"

    sections = {
        "model": BODY | {"num_labels": 3},  # one more than the data have
        "data": data_of(reviews, example="label"),
        "task": {"objective": "classification"},
        "train": {"steps": 2, "batch_size": 32, "init_from": str(tmp_path / "body")},
    }
    trained(tmp_path / "head", capsys, **sections)
    said = (tmp_path / "head" / "said.txt").read_text()
    assert len(asked(tmp_path / "head", capsys, "--prompt=a good film")[0]["probabilities"]) == 2
    assert "started from 20 of 24 parameters in" in said
    assert "fresh: top.bias, top.head, top.pooler.dense.b, top.pooler.dense.w" in said
    assert "left behind: top.transform.dense.b, top.transform.dense.w, top.transform.norm.bias" in said

    other = sections | {"tokenizer": {"kind": "sentencepiece", "vocab_size": 300}}
    (tmp_path / "given.json").write_text(json.dumps(REST | other))
    message = run(tmp_path / "other", capsys, f"--config={tmp_path}/given.json", code=76)
    assert "was made with another tokenizer" in message and message.endswith("set tokenizer.path to that run's")
    longer = sections | {"model": BODY | {"max_length": 64}}
    (tmp_path / "given.json").write_text(json.dumps(REST | longer))
    message = run(tmp_path / "longer", capsys, f"--config={tmp_path}/given.json", code=76)
    assert "positions as float32[48, 32], the config wants float32[64, 32]" in message


def write_pairs(root: pathlib.Path) -> None:
    rng = random.Random(4)
    for name, count in (("train", 300), ("valid", 21)):
        sources = [" ".join(rng.choices(NEUTRAL, k=rng.randint(1, 4))) for _ in range(count)]
        (root / f"{name}.en").write_text("\n".join(sources) + "\n")
        (root / f"{name}.de").write_text("\n".join(text.upper() for text in sources) + "\n")


@pytest.mark.parametrize("family", ["encoder_decoder", pytest.param("decoder", marks=pytest.mark.exhaustive)])
def test_translations_are_scored_as_they_are_written_down(family, tmp_path, capsys):
    write_pairs(tmp_path)
    result = trained(
        tmp_path / "run",
        capsys,
        model=PAIR | {"family": family},
        data={
            "example": "pair",
            "files": [f"{tmp_path}/train.en", f"{tmp_path}/train.de"],
            "valid_files": [f"{tmp_path}/valid.en", f"{tmp_path}/valid.de"],
            "document": "line",
            "prefix": "loud: " if family == "decoder" else "",
            "seq_len": 48,
            "packing": "bins",
        },
        task={"objective": "seq2seq"},
        train={"steps": 30, "batch_size": 16},
        generate={"max_tokens": 12, "temperature": 0.0, "prompts": ["the end"]},
    )
    assert result["eval/tokens"] == sum(len(line) for line in (tmp_path / "valid.de").read_bytes().splitlines()) + 21
    written = (tmp_path / "run" / "samples" / "30-translations.txt").read_text().splitlines()
    parts = {
        name: [line.partition(":")[2].strip() for line in written if line.startswith(name)]
        for name in ("source", "hypothesis", "reference")
    }
    assert parts["reference"] == (tmp_path / "valid.de").read_text().splitlines()
    assert parts["source"] == (tmp_path / "valid.en").read_text().splitlines()
    sacrebleu = pytest.importorskip("sacrebleu")
    assert result["eval/chrf"] == pytest.approx(sacrebleu.corpus_chrf(parts["hypothesis"], [parts["reference"]]).score)
    assert "tok:13a" in result["eval/bleu_signature"]

    [one] = asked(tmp_path / "run", capsys, "--prompt=the end")
    streamed = run(tmp_path / "run", capsys, "generate", "--prompt=the end")
    assert streamed.rstrip("\n") == one["text"].rstrip("\n")
    [best] = asked(tmp_path / "run", capsys, "--prompt=the end", "--config.generate.beams=3")
    assert best["score"] < 0


def write_squad(root: pathlib.Path) -> None:
    rng = random.Random(5)
    for name, count in (("train", 30), ("valid", 7)):
        paragraphs = []
        for i in range(count):
            words = [*rng.choices(NEUTRAL, k=12), "Rome", *rng.choices(NEUTRAL, k=12)]
            context = " ".join(words)
            answer = [] if i % 3 == 2 else [{"text": "Rome", "answer_start": context.index("Rome")}]
            questions = [{"id": f"{name}{i}", "question": "Where?", "answers": answer, "is_impossible": not answer}]
            paragraphs.append({"context": context, "qas": questions})
        (root / f"{name}.json").write_text(json.dumps({"data": [{"title": "T", "paragraphs": paragraphs}]}))


def test_questions_are_answered_from_windows_and_scored_as_squad_does(tmp_path, capsys):
    write_squad(tmp_path)
    result = trained(
        tmp_path / "run",
        capsys,
        model=BODY | {"token_types": 2},
        data=data_of(tmp_path, "json", example="qa"),
        task={"objective": "qa", "stride": 16},
        train={"steps": 60, "batch_size": 16},
    )
    assert result["eval/f1/has_answer"] >= result["eval/exact_match/has_answer"]
    predicted = json.loads((tmp_path / "run" / "samples" / "60-answers.json").read_text())
    gold = [
        (q["id"], q["answers"])
        for p in json.loads((tmp_path / "valid.json").read_text())["data"][0]["paragraphs"]
        for q in p["qas"]
    ]
    exact = np.mean([squad_metrics.normalise(predicted[id]) == ("rome" if answers else "") for id, answers in gold])
    assert result["eval/exact_match"] == pytest.approx(100 * exact)

    context = " ".join(random.Random(6).choices(NEUTRAL, k=3000)) + " Rome the film"
    (tmp_path / "context.txt").write_text(context)
    [found] = asked(tmp_path / "run", capsys, "--prompt=Where?", f"--context={tmp_path}/context.txt")
    assert {"answer", "score", "begin", "end"} <= set(found)
    if found["answer"]:
        assert context[found["begin"] : found["end"]] == found["answer"]
    message = run(tmp_path / "run", capsys, "generate", "--prompt=Where?", code=2)
    assert message == "a question is answered from a context: add --context=FILE"


def test_words_are_tagged_and_texts_are_rated(tmp_path, capsys):
    rng = random.Random(7)
    for name, count in (("train", 200), ("valid", 20)):
        rows = [rng.choices(NEUTRAL + GOOD, k=4) for _ in range(count)]
        tagged = [{"words": words, "tags": ["B-X" if word in GOOD else "O" for word in words]} for words in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tagged))
        rated = [f"{' '.join(words)}\t{sum(word in GOOD for word in words) / 4}" for words in rows]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["text\tlabel", *rated]) + "\n")
    keys = {"text_key": "words", "label_key": "tags"}
    result = trained(
        tmp_path / "tags",
        capsys,
        model=BODY,
        data=data_of(tmp_path, "jsonl", example="tags", **keys),
        task={"objective": "tagging"},
        train={"steps": 40, "batch_size": 32},
        optimizer=FAST,
    )
    assert result["eval/accuracy"] > 0.9 and "eval/entity_f1" in result
    [found] = asked(tmp_path / "tags", capsys, "--prompt=the great plot")
    assert [pair.partition("/")[0] for pair in found["tags"]] == ["the", "great", "plot"]

    result = trained(
        tmp_path / "value",
        capsys,
        model=BODY | {"pool": "mean"},
        data=data_of(tmp_path, example="label"),
        task={"objective": "regression"},
        train={"steps": 160, "batch_size": 32},
    )
    assert result["eval/pearson"] > 0.8
    low, high = asked(tmp_path / "value", capsys, "--prompt=the plot a scene", "--prompt=good great fine good")
    assert low["value"] < high["value"]


def test_a_decoder_names_classes_in_words_and_a_mixture_is_told_apart(reviews, tmp_path, capsys):
    write_pairs(tmp_path)
    review = {"name": "mood", "weight": 1.0, "example": "label", "labels": ["no", "yes"], "prefix": "mood: "}
    loud = {"name": "loud", "weight": 1.0, "example": "pair", "document": "line", "prefix": "loud: "}
    review |= {"files": [f"{reviews}/train.tsv"], "valid_files": [f"{reviews}/valid.tsv"]}
    loud |= {
        key: [f"{tmp_path}/{name}.en", f"{tmp_path}/{name}.de"]
        for key, name in (("files", "train"), ("valid_files", "valid"))
    }
    result = trained(
        tmp_path / "run",
        capsys,
        model=PAIR | {"family": "decoder"},
        data={"mixture": [review, loud], "seq_len": 48, "packing": "bins"},
        task={"objective": "seq2seq"},
        train={"steps": 40, "batch_size": 16},
        generate={"max_tokens": 6, "temperature": 0.0},
    )
    named = {"eval/mood/accuracy", "eval/mood/invalid", "eval/loud/bleu", "eval/mood/loss", "eval/loud/loss"}
    assert named | {"eval/loss", "eval/accuracy"} <= set(result)
    assert (tmp_path / "run" / "samples" / "40-mood-classes.txt").exists()
    assert asked(tmp_path / "run", capsys, "--prompt=mood: a good film")[0]["tokens"] <= 6


def test_a_model_of_spans_is_for_fine_tuning(tmp_path, capsys):
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(text for text, _ in sentences(300, 8)))
    result = trained(
        tmp_path / "run",
        capsys,
        model=PAIR | {"positions": "relative", "norm": "rmsnorm", "gated": True, "bias": False},
        data={"files": [str(texts)], "document": "line", "valid_fraction": 0.1, "seq_len": 24, "source_len": 48},
        task={"objective": "span_corruption"},
        train={"steps": 4, "batch_size": 8},
    )
    assert {"eval/loss", "eval/accuracy"} <= set(result)
    message = run(tmp_path / "run", capsys, "generate", "--prompt=x", code=2)
    assert message.startswith("a model of task.objective=span_corruption is for fine-tuning")
