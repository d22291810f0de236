"""A vocabulary of ours and its tokenizer.json spell every text by the same ids."""

import itertools
import json
import pathlib

import pytest
import tokenizers as hugging_face

from lslm_jax.config import TokenizerConfig
from lslm_jax.data.tokenizers import huggingface, to_hf, train
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError

HARD = ["  two  spaces\n\n\ttab", "naïve €5 😀👩‍🚀 日本語", "", "a" * 37, " " * 19, "x = [1,2]\n" * 9, "\r\n\0"]
TOKENIZERS = pathlib.Path(huggingface.__file__).parent
SOURCES = [path.read_text() for path in sorted(TOKENIZERS.glob("*.py"))]
# To Hugging Face these are not text.
TEXTS = [text for text in SOURCES if not any(token in text for token in ("<s>", "</s>", "<unk>", "<0x", "\u2581"))]


def words(kind):
    if kind == "bytes":
        return Bytes()
    settings = TokenizerConfig(model=kind, vocab_size=500)
    return train.train(itertools.chain(TEXTS[::2], HARD), settings)


@pytest.mark.parametrize("kind", ["bpe", "unigram", "bytes"])
def test_ids_and_texts_are_the_same(kind):
    ours = words(kind)
    converted = to_hf.convert(ours, "decoder")
    theirs = hugging_face.Tokenizer.from_str(json.dumps(converted))
    likely = lambda ids: sum(converted["model"]["vocab"][id][1] for id in ids)
    assert theirs.get_vocab_size() == ours.vocab_size
    for text in TEXTS + HARD:
        ids = theirs.encode(text, add_special_tokens=False).ids
        if kind == "unigram":  # of two ways that are equally likely either may be taken
            assert likely(ids) == pytest.approx(likely(ours.encode(text)), rel=1e-6)
        else:
            assert ids == ours.encode(text).tolist()
        assert theirs.decode(ids) == text


@pytest.mark.parametrize(
    ("family", "single", "pair"),
    [
        ("decoder", ["<s>", "a"], ["<s>", "a", "b"]),
        ("encoder", ["<s>", "a", "</s>"], ["<s>", "a", "</s>", "b", "</s>"]),
        ("encoder_decoder", ["a", "</s>"], ["a", "</s>", "b", "</s>"]),
    ],
)
def test_texts_are_framed_as_models_of_the_family_read_them(family, single, pair):
    theirs = hugging_face.Tokenizer.from_str(json.dumps(to_hf.convert(words("bpe"), family)))
    assert theirs.encode("a").tokens == single
    assert theirs.encode("a", "b").tokens == pair


def test_a_given_tokenizer_without_bos_is_given_back_without_one(tmp_path):
    given = hugging_face.ByteLevelBPETokenizer()
    given.train_from_iterator(TEXTS, vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    given.save(str(tmp_path / "tokenizer.json"))
    ours = load_tokenizer(tmp_path / "tokenizer.json")
    assert not ours.adds_bos
    for family in ("decoder", "encoder", "encoder_decoder"):
        assert to_hf.convert(ours, family) == json.loads(ours.content)


def test_roles_are_named_and_read_back(tmp_path):
    ours = words("bpe")
    (tmp_path / "tokenizer.json").write_text(json.dumps(to_hf.convert(ours, "decoder")))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(to_hf.settings_of(ours, "decoder", "llama", 64)))
    again = load_tokenizer(tmp_path / "tokenizer.json")
    same = ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id", "adds_bos")
    assert {key: getattr(again, key) for key in same} == {key: getattr(ours, key) for key in same}
    assert to_hf.convert(again, "decoder") == to_hf.convert(ours, "decoder")


def test_a_tokenizer_that_changes_texts_is_given_back_as_it_was(shared):
    strange = load_tokenizer(shared / "tokenizers" / "sentencepiece_tests" / "sentencepiece_test.model")
    with pytest.raises(ConfigError, match=r"normalises text, which no tokenizer\.json does the same way"):
        to_hf.convert(strange, "decoder")
    files = to_hf.files(strange, "decoder", "llama", 64)
    assert files["tokenizer.model"] == strange.content and "tokenizer.json" not in files


def test_word_pieces_are_read_from_vocab_txt(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "##s", "cafe", "Cafe", "!"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    ours = load_tokenizer(tmp_path / "vocab.txt")
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.mask_id, ours.vocab_size) == (2, 3, 0, 4, len(pieces))
    assert [ours.piece(id) for id in ours.encode("Unables Café!")] == ["un", "##able", "##s", "cafe", "!"]
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    cased = load_tokenizer(tmp_path / "vocab.txt")
    assert [cased.piece(id) for id in cased.encode("Cafe cafe")] == ["Cafe", "cafe"]
    ours.save(tmp_path)
    assert load_tokenizer(tmp_path / "tokenizer.json").sha256 == ours.sha256
