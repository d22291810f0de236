"""Directories as users have them, in and out: tokenizer, template, settings of generation and labels come back."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tokenizers as package
from etils import epath
from safetensors.numpy import load_file
from test_import import SIZES, save

from lslm_jax.config import TokenizerConfig
from lslm_jax.convert import generation, pretrained
from lslm_jax.data.chat import chat_template
from lslm_jax.data.tokenizers import hf_metadata, train
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.models import model_configs

TEXT = "The cat sat, the dog (naïve) slept: 1234 <|end|>\n"
TEMPLATE = "{% for m in messages %}<|turn|>{{ m.content }}<|end|>{% endfor %}"
END, PAD = "<|end|>", "<pad>"


def byte_level(directory, *more):
    """A tokenizer.json without bos, as GPT-2, Qwen and SmolLM2 have it."""
    made = package.ByteLevelBPETokenizer()
    made.train_from_iterator([TEXT] * 20, vocab_size=280, special_tokens=[END, PAD, *more], show_progress=False)
    made.save(str(directory / "tokenizer.json"))
    return {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": None, "eos_token": END, "pad_token": PAD}


def with_bos(directory):
    settings = byte_level(directory, "<s>")
    content = json.loads((directory / "tokenizer.json").read_text())
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [2], "tokens": ["<s>"]}},
    }
    (directory / "tokenizer.json").write_text(json.dumps(content))
    return settings | {"bos_token": "<s>"}


def roberta(directory):
    settings = byte_level(directory, "<s>", "</s>", "<mask>")
    content = json.loads((directory / "tokenizer.json").read_text())
    frame = {"sep": ["</s>", 3], "cls": ["<s>", 2], "trim_offsets": True, "add_prefix_space": False}
    (directory / "tokenizer.json").write_text(
        json.dumps(content | {"post_processor": {"type": "RobertaProcessing"} | frame})
    )
    roles = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    return settings | roles | {"tokenizer_class": "RobertaTokenizer", "add_prefix_space": False}


def word_pieces(directory):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "##s", *map(chr, range(33, 127))]
    made = package.BertWordPieceTokenizer({piece: i for i, piece in enumerate(dict.fromkeys(pieces))}, lowercase=True)
    made.save(str(directory / "tokenizer.json"))
    roles = {"cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]", "pad_token": "[PAD]"}
    return roles | {"mask_token": "[MASK]", "tokenizer_class": "BertTokenizer", "do_lower_case": True}


def pieces(directory):
    """A tokenizer.model with tokens behind its pieces, as chat models have them."""
    made = train.train(iter([TEXT] * 20), TokenizerConfig(vocab_size=290))
    (directory / "tokenizer.model").write_bytes(made.content)
    (directory / "added_tokens.json").write_text(json.dumps({"<|turn|>": made.vocab_size, END: made.vocab_size + 1}))
    return {"tokenizer_class": "LlamaTokenizer", "eos_token": END, "additional_special_tokens": ["<|turn|>"]}


def bare(directory):
    byte_level(directory)
    return {}


def added(directory):
    settings = byte_level(directory)
    size = package.Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab_size()
    token = {"content": "<|turn|>", "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    return settings | {"added_tokens_decoder": {str(size): token | {"special": True}}}


LLAMA, BERT = model_configs.LLAMA, model_configs.BERT
GREEDY = {"eos_token_id": [0, 5], "max_new_tokens": 9}
CASES = {  # the tokenizer, the preset, the objective, generation_config.json, and further changes
    "no bos": (byte_level, LLAMA, "causal", GREEDY, {}),
    "bos": (with_bos, LLAMA, "causal", {"eos_token_id": 0, "repetition_penalty": 1.3}, {}),
    "template in a file": (byte_level, LLAMA, "causal", GREEDY, {"file": TEMPLATE}),
    "template in the settings": (byte_level, LLAMA, "causal", GREEDY, {"settings": {"chat_template": TEMPLATE}}),
    "sampling": (with_bos, LLAMA, "causal", {"do_sample": True, "temperature": 0.6, "eos_token_id": 0}, {}),
    "beams": (byte_level, LLAMA, "causal", {"num_beams": 3, "length_penalty": 0.5, "eos_token_id": 0}, {}),
    "added tokens": (added, LLAMA, "causal", GREEDY | {"suppress_tokens": [7]}, {"file": TEMPLATE}),
    "tokenizer.model": (pieces, LLAMA, "causal", GREEDY, {"file": TEMPLATE}),
    "ends in config.json": (byte_level, LLAMA, "causal", None, {"config": {"eos_token_id": [0, 5]}}),
    "untied": (with_bos, LLAMA, "causal", GREEDY, {"tied": True}),
    "labels": (word_pieces, BERT, "classification", None, {}),
    "several labels at once": (
        roberta, BERT, "classification", None, {"config": {"problem_type": "multi_label_classification"}},
    ),
}  # fmt: skip


def make(directory, case):
    kind, preset, objective, settings, changes = CASES[case]
    sizes = SIZES | {"num_layers": 1, "num_labels": 3 if objective == "classification" else 0, "vocab_size": 400}
    save(directory, replace(preset, **sizes, dtype="float32"), objective)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        (directory / name).unlink(missing_ok=True)
    roles = kind(directory) | changes.get("settings", {})
    if roles:
        (directory / "tokenizer_config.json").write_text(json.dumps(roles | {"model_max_length": 64}))
    if "file" in changes:
        (directory / "chat_template.jinja").write_text(changes["file"])
    if settings is not None:
        (directory / "generation_config.json").write_text(json.dumps(settings))
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes.get("config", {})
    if objective == "classification":
        names = ["neutral", "contradiction", "entailment"]  # not in order of the alphabet
        config |= {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    if changes.get("tied"):
        config["tie_word_embeddings"] = True
    path.write_text(json.dumps(config))


def contents(directory):
    """All that a directory defines besides its weights, as our readers and the files have it."""
    directory = epath.Path(directory)
    source = pretrained.describe(directory)
    words = load_tokenizer(pretrained.vocabulary(directory))
    beside = hf_metadata.read(directory)
    objective = pretrained.task_of(source)
    ids = [words.encode(text).tolist() for text in (TEXT, "<|turn|>x", "")]
    framed = words.encode_framed(f"<|turn|>the cat{END}").ids.tolist()
    roles = {role: getattr(words, f"{role}_id") for role in ("bos", "eos", "pad", "mask")}
    return {
        "model": source.model,
        "labels": pretrained.labels(source, objective),
        "apart": pretrained.judges_apart(source, objective),
        "ids": [ids, framed, roles, words.adds_bos, words.prefix_id, words.separators, words.vocab_size],
        "template": beside.settings.get("chat_template"),
        "generation": generation.read(directory, source.settings, words) if objective == "causal" else None,
        "tokenizer": json.loads(file.read_text()) if (file := directory / "tokenizer.json").is_file() else None,
    }


FAST = ("no bos", "template in the settings", "tokenizer.model", "untied", "labels")


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.exhaustive) for case in CASES]
)
def test_a_directory_comes_back_as_it_was(case, tmp_path, command):
    directory, run, out = (tmp_path / name for name in ("in", "run", "out"))
    directory.mkdir()
    make(directory, case)
    before = contents(directory)
    command("import", f"--pretrained={directory}", f"--workdir={run}")
    shutil.move(directory, tmp_path / "away")  # a run holds what it needs
    command("export", f"--workdir={run}", f"--to={out}")
    after = contents(out)
    if case == "added tokens":  # they are now in tokenizer.json, too
        before["tokenizer"] = after["tokenizer"]
    if case == "ends in config.json":
        assert before["generation"].stop_ids == (5,)
    if case == "untied":
        assert not before["model"].tie_embeddings, "the file has an output layer of its own"
    assert after == before
    old, new = (load_file(path / "model.safetensors") for path in (tmp_path / "away", out))
    assert old.keys() == new.keys()
    for name, array in old.items():
        np.testing.assert_array_equal(new[name], array, err_msg=name)


def test_the_tokenizer_and_the_template_of_an_adapter_come_before_those_of_its_model(tmp_path):
    base, own = tmp_path / "base", tmp_path / "adapter"
    for directory in (base, own):
        directory.mkdir()
    make(base, "template in a file")
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(base), "target_modules": ["q_proj"]}
    (own / "adapter_config.json").write_text(json.dumps(settings))

    def chosen():
        config = pretrained.default_config(pretrained.describe(own))
        chat = replace(config, data=replace(config.data, example="chat"))
        words = load_tokenizer(epath.Path(config.tokenizer.path))
        return config.tokenizer.path, chat_template.choose(chat, words).text

    assert chosen() == (f"{base}/tokenizer.json", TEMPLATE)
    roles = with_bos(own)
    (own / "tokenizer_config.json").write_text(json.dumps(roles | {"chat_template": TEMPLATE + "own"}))
    assert chosen() == (f"{own}/tokenizer.json", TEMPLATE + "own")
