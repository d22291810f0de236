"""Marian's vocabularies as the Hub has them: ids and texts are those of transformers' MarianTokenizer."""

import io
import json
import warnings

import jax
import numpy as np
import pytest
import sentencepiece
from etils import epath

from lslm_jax.config import Config, DataConfig, ModelConfig, TaskConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import generation, pretrained
from lslm_jax.convert.export import Exporter, export
from lslm_jax.data import encode_examples
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.models.build_model import build_model

ENGLISH = [f"the {animal} sat on mat number {i} and slept" for i in range(40) for animal in ("cat", "small dog")]
FRENCH = [
    f"le {animal} était assis sur le tapis {i} et dormait" for i in range(40) for animal in ("chat", "petit chien")
]
CODES = [">>fra<<", ">>por<<"]
SOURCES = [
    "the cat sat on mat 7",
    ">>fra<< the dog  slept ",
    ">>por<<cat",
    ">>xyz<< an unknown language",
    ">> no language",
    "naïve ✓ 漢字 \u2581 marks",
    "  two  blanks\tand a tab\n",
    "a </s> b <pad> c <unk>",
    "",
]
TARGETS = ["le chat était assis", ">>fra<< le petit chien", "le cat ✓", ""]


def model(texts, size):
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=out, vocab_size=size, hard_vocab_limit=False, minloglevel=2
    )
    return out.getvalue()


def pieces_of(content):
    processor = sentencepiece.SentencePieceProcessor(model_proto=content)
    return [processor.id_to_piece(i) for i in range(3, processor.vocab_size())]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny Marian as the Hub has them: ids are the pieces of both models in an order of their own, padding last."""
    directory = tmp_path_factory.mktemp("marian")
    files = {"source.spm": model(ENGLISH, 60), "target.spm": model(FRENCH, 60)}
    for name, content in files.items():
        (directory / name).write_bytes(content)
    pieces = sorted({*pieces_of(files["source.spm"])[:-4], *pieces_of(files["target.spm"])})
    ids = {piece: i for i, piece in enumerate(["</s>", "<unk>", *CODES, *pieces, "<pad>"])}
    (directory / "vocab.json").write_text(json.dumps(ids))
    named = {"source_lang": "en", "target_lang": "fr", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(named | {"tokenizer_class": "MarianTokenizer"}))
    size = {"num_layers": 1, "d_model": 32, "num_heads": 2, "max_length": 64, "vocab_size": len(ids)}
    fixed = pretrained.hf_encoder_decoders.MARIAN.fixed | {"activation": "silu", "embed_scale": True}
    config = Config(
        model=fill_sizes(ModelConfig(**size, **fixed)),
        task=TaskConfig(objective="seq2seq"),
        data=DataConfig(example="pair"),
    )
    pad = len(ids) - 1
    (directory / "config.json").write_text(json.dumps({"is_encoder_decoder": True, "decoder_start_token_id": pad}))
    words = load_tokenizer(directory / "source.spm")
    made = jax.jit(lambda: build_model(config.model, jax.random.key(0), "seq2seq"))()
    export(epath.Path(directory), made, Exporter(config, words, []), {})
    settings = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(settings | {"bad_words_ids": [[pad]]}))
    return epath.Path(directory)


@pytest.fixture(scope="module")
def words(directory):
    return load_tokenizer(directory / "source.spm")


def test_ids_and_texts_are_those_of_transformers(directory, words):
    transformers = pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that sacremoses is not installed
        theirs = transformers.MarianTokenizer.from_pretrained(directory)
    for text in SOURCES:
        if "</s>" not in text:  # which here is text
            assert [*words.encode(text).tolist(), words.eos_id] == theirs(text)["input_ids"], text
    for text, ids in zip(TARGETS, words.encode_targets(TARGETS), strict=True):
        expected = theirs(text_target=text)["input_ids"]
        assert [*ids.tolist(), words.eos_id] == expected, text
        assert words.decode(expected) == theirs.decode(expected, skip_special_tokens=True)
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = rng.integers(0, words.vocab_size, rng.integers(1, 12)).tolist()
        assert words.decode(ids) == theirs.decode(ids, skip_special_tokens=True), ids
    assert (words.pad_id, words.eos_id, words.bos_id) == (theirs.pad_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert words.vocab_size == len(theirs)


def test_targets_are_cut_by_their_own_model_and_a_language_is_one_token(words):
    recipe = encode_examples.Recipe(DataConfig(example="pair"), "seq2seq", {})
    example = {"source": ">>fra<< the cat", "target": "le chat"}
    [[encoded]] = encode_examples.encode([example], recipe, words)
    source, target = encoded.fields
    assert words.piece(source[0]) == ">>fra<<" and words.decode(source) == ">>fra<< the cat"
    assert target.tolist() == words.encode_targets(["le chat"])[0].tolist() != words.encode("le chat").tolist()
    spans = words.encode_with_offsets(">>fra<< the cat")
    assert spans.ids.tolist() == source.tolist() and (spans.begins[0], spans.ends[0]) == (0, 7)
    assert spans.ends[-1] == len(">>fra<< the cat")


def test_no_text_spells_a_special_token(words):
    special = {words.eos_id, words.pad_id, words.bos_id}
    assert not special & {*words.encode("a </s> b <pad> c").tolist(), *words.encode(">></s><< <pad>").tolist()}


def test_it_is_saved_as_one_file_and_is_the_same(words, tmp_path):
    assert words.save(epath.Path(tmp_path)) == "marian.json"
    again = load_tokenizer(tmp_path / "marian.json")
    assert again.facts() == words.facts() and again.kind == "marian"
    for before, after in zip(words.encode_batch(SOURCES), again.encode_batch(SOURCES), strict=True):
        assert before.tolist() == after.tolist()


@pytest.mark.slow
def test_a_directory_translates_is_tuned_and_given_back(directory, words, tmp_path, command):
    asked = ["generate", "--prompt=the cat", "--json", "--config.generate.max_tokens=8"]
    found = json.loads(command(*asked, f"--pretrained={directory}"))
    assert "\N{REPLACEMENT CHARACTER}" not in found["text"] and "<pad>" not in found["text"]
    for name, texts in (("a.txt", ENGLISH), ("b.txt", FRENCH)):
        (tmp_path / name).write_text("\n".join(texts) + "\n")
    data = {"files": [f"{tmp_path}/a.txt", f"{tmp_path}/b.txt"], "example": "pair", "document": "line", "seq_len": 48}
    config = {
        "data": data | {"packing": "bins"},
        "task": {"objective": "seq2seq"},
        "train": {"steps": 3, "batch_size": 8},
    }
    (tmp_path / "given.json").write_text(json.dumps(config | {"log": {"tensorboard": False}, "eval": {"every": 0}}))
    command(f"--config={tmp_path}/given.json", f"--workdir={tmp_path}/run", f"--pretrained={directory}")
    command("export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/out")
    for name in ("source.spm", "target.spm"):
        assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()
    out = load_tokenizer(tmp_path / "out" / "source.spm")
    assert out.encode(">>fra<< the cat").tolist() == words.encode(">>fra<< the cat").tolist()
    assert (out.bos_id, out.eos_id, out.pad_id) == (words.bos_id, words.eos_id, words.pad_id)


def test_padding_is_never_written(directory):
    words = load_tokenizer(directory / "source.spm")
    assert generation.read(directory, pretrained.describe(directory).settings, words).never_ids == (words.pad_id,)


@pytest.mark.parametrize("name", ["target.spm", "vocab.json"])
def test_a_missing_file_is_told(name, directory, tmp_path):
    for path in directory.iterdir():
        if path.name != name:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(InputMissing, match=f"holds no {name}"):
        load_tokenizer(tmp_path / "source.spm")
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(DataError):
        load_tokenizer(tmp_path / "source.spm")


def test_targets_with_ids_of_their_own_are_refused(directory, tmp_path):
    for path in directory.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "target_vocab.json").write_text("{}")
    with pytest.raises(ConfigError, match="targets have ids of their own"):
        load_tokenizer(tmp_path / "source.spm")
