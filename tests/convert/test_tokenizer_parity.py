"""Exported tokenizers through AutoTokenizer: pairs are framed, typed and named as our own rows are."""

import json

import numpy as np
import pytest
from etils import epath

from lslm_jax.config import Config, DataConfig, TaskConfig, TokenizerConfig
from lslm_jax.convert import pretrained
from lslm_jax.data.objectives import classification_rows
from lslm_jax.data.shards import Shards, ShardWriter
from lslm_jax.data.tokenizers import hf_classes, to_hf, train
from lslm_jax.data.tokenizers import special_tokens as special
from lslm_jax.data.tokenizers.loading import load_tokenizer

transformers = pytest.importorskip("transformers")

QUESTION, CONTEXT = "who sat on the mat", "the cat sat on the mat and slept"


def exported(words, kind, directory, family="encoder"):
    (directory / "config.json").write_text(json.dumps({"model_type": kind}))
    for name, content in to_hf.files(words, family, kind, 64).items():
        (directory / name).write_bytes(content)
    return transformers.AutoTokenizer.from_pretrained(directory)


def own_row(words, tmp_path):
    """Ids and types of a question and a context as a model trained here reads them."""
    writer = ShardWriter(epath.Path(tmp_path / "train"), 1 << 12, 1 << 20, 2, 2)
    writer.add([words.encode(QUESTION), words.encode(CONTEXT)], 0, 1, (0.0, 0.0))
    writer.finish()
    config = Config(data=DataConfig(seq_len=64), task=TaskConfig(objective="qa"))
    rows = classification_rows.AnswerRows(
        Shards.open(epath.Path(tmp_path / "train")), config, special.special_ids(words.facts(), "encoder")
    )
    batch = rows.batch(np.array([0]), np.array([0]))
    assert batch.segments_BT is not None and batch.types_BT is not None
    length = int(batch.segments_BT.sum())
    return batch.tokens_BT[0, :length].tolist(), batch.types_BT[0, :length].tolist()


def test_a_question_and_its_context_are_what_a_bert_trained_here_reads(tmp_path):
    words = train.train(iter([QUESTION, CONTEXT] * 9), TokenizerConfig(vocab_size=300))
    theirs = exported(words, "bert", tmp_path)
    ids, types = own_row(words, tmp_path)
    encoded = theirs(QUESTION, CONTEXT)
    assert encoded["input_ids"] == ids and encoded["token_type_ids"] == types
    assert (theirs.cls_token_id, theirs.sep_token_id, theirs.pad_token_id) == (words.bos_id, words.eos_id, words.pad_id)
    assert theirs.unk_token == "<unk>" and theirs.model_max_length == 64
    assert "token_type_ids" not in exported(words, "distilbert", tmp_path)(QUESTION)


@pytest.mark.parametrize("kind", ["roberta", "bert"])
def test_a_pair_of_a_given_tokenizer_is_what_transformers_makes_of_it(kind, tmp_path):
    if kind == "roberta":
        import tokenizers as package

        made = package.ByteLevelBPETokenizer()
        special_tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
        made.train_from_iterator([QUESTION, CONTEXT] * 9, vocab_size=290, special_tokens=special_tokens)
        made.save_model(str(tmp_path))
        settings = {"vocab": f"{tmp_path}/vocab.json", "merges": f"{tmp_path}/merges.txt"}
        theirs = transformers.RobertaTokenizer(**settings)
    else:
        pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *QUESTION.split(), *CONTEXT.split()]
        (tmp_path / "vocab.txt").write_text("\n".join(dict.fromkeys(pieces)))
        theirs = transformers.BertTokenizer(vocab=str(tmp_path / "vocab.txt"))
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    theirs.save_pretrained(tmp_path / "in")
    (tmp_path / "in" / "config.json").write_text(json.dumps({"model_type": kind}))
    words = load_tokenizer(tmp_path / "in" / "tokenizer.json")
    ids, types = own_row(words, tmp_path)
    again = exported(words, kind, tmp_path / "out")
    for tokenizer in (theirs, again):
        encoded = tokenizer(QUESTION, CONTEXT)
        assert encoded["input_ids"] == ids
        assert kind == "roberta" or encoded["token_type_ids"] == types
    assert type(again) is type(theirs)


@pytest.mark.parametrize("name", sorted(hf_classes._RULES))
def test_rules_of_a_class_are_those_of_transformers(name):
    made = json.loads(getattr(transformers, name)().backend_tokenizer.to_str())
    for part, rules in hf_classes._RULES[name].items():
        assert hf_classes._agrees(rules, made[part]), made[part]


def test_registered_classes_are_those_of_transformers():
    from transformers.models.auto import tokenization_auto

    registered = tokenization_auto.TOKENIZER_MAPPING_NAMES
    incorrect = tokenization_auto.MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS
    kinds = {family.model_type for family in pretrained.FAMILIES} - {"marian"}  # Marian's is not a tokenizer.json
    for kind in kinds:
        name = (registered.get(kind) or "").removesuffix("Fast")
        assert ("" if name == "TokenizersBackend" else name) == hf_classes._REGISTERED.get(kind, ""), kind
        assert (name == "TokenizersBackend") == (kind in hf_classes._GENERIC), kind
        assert (kind in incorrect and kind not in hf_classes._GENERIC) == (kind in hf_classes._FORCED)
