"""Pipelines of transformers on exported directories give the answers that `generate` gives on the imported ones.

Version 5 has no pipelines for questions and for text to text; `test_import` and `test_parity` compare these models.
"""

import json

import numpy as np
import pytest
import tokenizers as package
from test_parity import CASES, LABELS, V, make

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

TEXTS = ["the cat sat on the mat", "naive dogs sat"]
NAMES = ["one", "zero", "b c", "é", "last"]  # not in order of the alphabet
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "on", "mat", "na", "##ive", "dog", "##s"]
PIECES += [f"x{i}" for i in range(V - len(PIECES))]  # one for each row of the output layer


def word_pieces(directory):
    (directory / "vocab.txt").write_text("\n".join(PIECES))
    transformers.BertTokenizer(vocab=str(directory / "vocab.txt")).save_pretrained(directory)


def byte_level(directory):
    made = package.ByteLevelBPETokenizer()
    made.train_from_iterator(TEXTS * 9, vocab_size=131, special_tokens=["<s>", "</s>"], show_progress=False)
    alphabet = {token: i for i, token in enumerate(["<s>", "</s>", *sorted(set("".join(TEXTS).replace(" ", "Ġ")))])}
    alphabet |= {f"x{i}": i for i in range(len(alphabet), V)}
    content = json.loads(made.to_str())
    content["model"] |= {"vocab": alphabet, "merges": []}
    content["added_tokens"] = [token | {"id": alphabet[token["content"]]} for token in content["added_tokens"]]
    (directory / "tokenizer.json").write_text(json.dumps(content))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture
def answered(tmp_path, command):
    """Makes a directory, imports and exports it; a pipeline on the export, and the answers of `generate` before."""

    def run(name, kind, prompts, **changes):
        directory, out = tmp_path / "in", tmp_path / "out"
        make(CASES[name]).eval().save_pretrained(directory)
        (byte_level if kind == "text-generation" else word_pieces)(directory)
        for file, settings in changes.items():
            path = directory / f"{file}.json"
            known = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps(known | settings))
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
        asked = command("generate", f"--pretrained={directory}", f"--prompts={tmp_path}/prompts.jsonl", "--json")
        command("import", f"--pretrained={directory}", f"--workdir={tmp_path}/run")
        command("export", f"--workdir={tmp_path}/run", f"--to={out}")
        return transformers.pipeline(kind, model=str(out)), [json.loads(line) for line in asked.splitlines()]

    return run


def labeled():
    return {"id2label": {str(i): name for i, name in enumerate(NAMES)}, "label2id": {n: i for i, n in enumerate(NAMES)}}


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_text_classification(kind, answered):
    assert len(NAMES) == LABELS
    prompts = [*({"prompt": text} for text in TEXTS), {"prompt": TEXTS[0], "target": TEXTS[1]}]
    pipe, answers = answered(
        "bert-classification", "text-classification", prompts, config=labeled() | {"problem_type": kind}
    )
    for prompt, answer in zip(prompts, answers, strict=True):
        pair = {"text_pair": prompt["target"]} if "target" in prompt else {}
        found = {each["label"]: each["score"] for each in pipe({"text": prompt["prompt"]} | pair, top_k=None)}
        assert found == pytest.approx(answer["probabilities"], abs=1e-5)


def test_token_classification(answered):
    pipe, answers = answered(
        "bert-tagging", "token-classification", [{"prompt": text} for text in TEXTS], config=labeled()
    )
    for text, answer in zip(TEXTS, answers, strict=True):
        tokens = [each for each in pipe(text, ignore_labels=[]) if not each["word"].startswith("##")]
        assert [f"{text[each['start'] :].split()[0]}/{each['entity']}" for each in tokens] == answer["tags"]


def test_fill_mask(answered):
    prompts = [{"prompt": "the [MASK] sat on"}, {"prompt": "[MASK] dogs [MASK]"}]
    pipe, answers = answered("bert-masked", "fill-mask", prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        found = pipe(prompt["prompt"])
        for fills, each in zip(answer["fills"], [found] if isinstance(found[0], dict) else found, strict=True):
            assert [pipe.tokenizer.convert_ids_to_tokens(one["token"]) for one in each] == list(fills)
            np.testing.assert_allclose([one["score"] for one in each], list(fills.values()), atol=1e-5)


def test_text_generation(answered):
    settings = {"max_new_tokens": 12, "eos_token_id": [1, 9], "no_repeat_ngram_size": 2, "repetition_penalty": 1.2}
    pipe, answers = answered(
        "llama3", "text-generation", [{"prompt": text} for text in TEXTS], generation_config=settings,
        config={"vocab_size": 131, "bos_token_id": 0, "eos_token_id": 1},
    )  # fmt: skip
    for text, answer in zip(TEXTS, answers, strict=True):
        [found] = pipe(text, return_full_text=False)
        assert found["generated_text"] == answer["text"] != ""
