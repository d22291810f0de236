"""Classes of tokenizers that transformers builds by other rules than those of tokenizer.json."""

import json
import os

import pytest
import tokenizers as package
from etils import epath

from lslm_jax.config import TokenizerConfig
from lslm_jax.data.tokenizers import base, hf_classes, to_hf, train
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, DataError

DIGITS = {"type": "Digits", "individual_digits": True}
METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
PREPEND = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}]}


@pytest.fixture(scope="module")
def content():
    """A tokenizer.json as GPT2Tokenizer has it."""
    made = package.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat sat"] * 9, vocab_size=270, special_tokens=["<|end|>"], show_progress=False)
    return json.loads(made.to_str())


def load(directory, content, settings, model_type="llama"):
    (directory / "tokenizer.json").write_text(json.dumps(content))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"} | settings))
    (directory / "config.json").write_text(json.dumps({"model_type": model_type}))
    return load_tokenizer(epath.Path(directory / "tokenizer.json"))


DIFFERENT = {  # changes of the file, its class, the type of the model, the part that transformers replaces
    "as the class": ({}, "GPT2Tokenizer", "llama", None),
    "digits apart": ({"pre_tokenizer": DIGITS}, "GPT2TokenizerFast", "llama", "pre_tokenizer"),
    "lower case": ({"normalizer": {"type": "Lowercase"}}, "GPT2Tokenizer", "llama", "normalizer"),
    "class of the model": ({"pre_tokenizer": DIGITS}, None, "gpt2", "pre_tokenizer"),
    "class of the model in spite of another": ({}, "PreTrainedTokenizerFast", "qwen2", "normalizer"),
    "a class that reads the file": ({"pre_tokenizer": DIGITS}, "PreTrainedTokenizerFast", "gpt2", None),
    "a model whose class reads the file": ({"pre_tokenizer": DIGITS}, "GPT2Tokenizer", "mistral", None),
    "byte-level Llama": ({}, "LlamaTokenizer", "llama", None),
    "Llama of version 4": ({"normalizer": PREPEND, "pre_tokenizer": None}, "LlamaTokenizer", "llama", "normalizer"),
    "Llama of version 5": ({"pre_tokenizer": METASPACE}, "LlamaTokenizer", "llama", None),
}


@pytest.mark.parametrize("case", DIFFERENT)
def test_rules_that_transformers_replaces_are_reported(case, content, tmp_path, capsys):
    changes, name, model_type, part = DIFFERENT[case]
    load(tmp_path, content | changes, {"tokenizer_class": name} if name else {}, model_type)
    found = capsys.readouterr().err
    assert (f"{tmp_path}/tokenizer.json: its {part} is used as it is" in found) if part else not found


CONTRADICTIONS = {
    "add_prefix_space": ({"pre_tokenizer": METASPACE}, {"add_prefix_space": False}),
    "legacy": ({"pre_tokenizer": METASPACE}, {"legacy": True}),
    "additional_special_tokens": ({}, {"additional_special_tokens": ["<|turn|>"]}),
    "extra_special_tokens": ({}, {"extra_special_tokens": {"turn": {"content": "<|turn|>"}}}),
}


@pytest.mark.parametrize("key", CONTRADICTIONS)
def test_settings_that_contradict_the_file_are_rejected_by_name(key, content, tmp_path):
    changes, settings = CONTRADICTIONS[key]
    with pytest.raises(ConfigError, match=rf"tokenizer_config\.json: {key}"):
        load(tmp_path, content | changes, {"tokenizer_class": "LlamaTokenizer"} | settings)


@pytest.mark.parametrize("key", ["bos_token", "eos_token", "pad_token", "mask_token"])
@pytest.mark.parametrize("form", ["text", "object"])
def test_a_special_token_that_the_vocabulary_lacks_is_rejected_by_its_key(key, form, content, tmp_path):
    token = "<gone>" if form == "text" else {"content": "<gone>", "lstrip": False}
    with pytest.raises(ConfigError) as error:
        load(tmp_path, content, {"tokenizer_class": "GPT2Tokenizer", key: token})
    assert f"{key} '<gone>' is not in the vocabulary" in str(error.value)


@pytest.mark.parametrize("key", ["cls_token", "sep_token"])
def test_a_special_token_of_an_encoder_that_the_vocabulary_lacks_is_rejected_by_its_key(key, content, tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    roles = {"cls_token": "<|end|>", "sep_token": "<|end|>"} | {key: "<gone>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | roles))
    with pytest.raises(ConfigError, match=rf"{key} '<gone>' is not in the vocabulary"):
        load_tokenizer(epath.Path(tmp_path / "tokenizer.json"))


def test_an_exported_tokenizer_that_transformers_would_build_otherwise_is_reported(capsys):
    words = train.train(iter(["the cat sat on the mat"] * 9), TokenizerConfig(vocab_size=270))
    to_hf.files(words, "decoder", "llama", 64)
    assert not capsys.readouterr().err
    hf_classes._report.cache_clear()
    to_hf.files(words, "decoder", "qwen2", 64)  # whose tokenizer is always Qwen2Tokenizer
    assert "AutoTokenizer of transformers 5 replaces it by that of Qwen2Tokenizer" in capsys.readouterr().err


def test_a_panic_of_the_library_is_one_line_and_other_output_is_kept(content, tmp_path, capfd):
    with base.without_panic_text():
        os.write(2, b"kept")
    assert capfd.readouterr().err == "kept"
    broken = content | {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer\.json"):
        load(tmp_path, broken, {})
    assert capfd.readouterr().err == ""
