"""Documents of 100 MB are cleaned and tokenized in parts, with the result of the whole and in little memory."""

import os
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

import lslm_jax
from lslm_jax.config import CleanConfig, Config, DataConfig, TokenizerConfig
from lslm_jax.data.prepare import cleaning, long_documents
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.shards import Shards
from lslm_jax.data.tokenizers import train
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.huggingface import HuggingFace
from lslm_jax.errors import DataError

ENGLISH = 'The quick (brown) fox, 42 times,  jumped over\u00e9 the lazy dog\'s back;\t"why?" he said -- naturally.'
PIECES = [
    ENGLISH,
    "\n",
    "\n\n",
    "\r\n",
    "   \n",
    "\n\n\n\n  ",
    "e\u0301",
    "\u3000\u65e5\u672c\u8a9e\u3002",
    "\U0001f600",
    "\x07",
    "1,234.5\n",
]
CJK = "\u65e5\u672c\u8a9e\u306e\u6587\u7ae0\u304c\u3001\u7d9a\u304f\u3002\u3042\u3044\u3046\u3048\u304a"


def text_of(seed: int, pieces=PIECES, count: int = 3000) -> str:
    return "".join(random.Random(seed).choices(pieces, k=count))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(long_documents, "_PART", 2000)
    monkeypatch.setattr(long_documents, "LONG", 5000)


@pytest.mark.parametrize(
    "config",
    [
        CleanConfig(),
        CleanConfig(whitespace="collapse", unicode="NFKC"),
        CleanConfig(whitespace="trim", unicode="NFD", control="keep"),
    ],
    ids=["default", "collapse", "trim"],
)
@pytest.mark.parametrize("as_bytes", [True, False])
def test_cleaning_in_parts_is_cleaning_the_whole(config, as_bytes):
    texts = [text_of(seed) for seed in range(5)]
    texts += ["  \n " * 3000 + "x" + " \n" * 3000, CJK * 800, "e\u0301" * 5000, "\r" * 9000, " " * 9000]
    for text in texts:
        content = text.encode() if as_bytes else text
        found = long_documents.cleaned(content, config, "strict", "f")
        expected = cleaning.clean_text(text, config)
        assert b"".join(found.parts).decode() == expected
        assert found.length == len(expected) and found.digest == cleaning.digest(expected)


@pytest.mark.parametrize("policy", ["strict", "replace", "skip"])
def test_bad_bytes_in_a_long_text_are_treated_as_in_any(policy):
    content = (text_of(0).encode() + b"\xff\n" + text_of(1).encode()).replace(CJK[:2].encode(), CJK[:2].encode()[:4])
    try:
        expected = cleaning.decode(content, policy, "f")
    except DataError as error:
        with pytest.raises(DataError) as found:
            long_documents.cleaned(content, CleanConfig(), policy, "f")
        assert str(found.value) == str(error)
        return
    found = long_documents.cleaned(content, CleanConfig(), policy, "f")
    if expected is None:
        assert found is None
    else:
        assert b"".join(found.parts).decode() == cleaning.clean_text(expected, CleanConfig())


def trained(model: str) -> Tokenizer:
    texts = [cleaning.clean_text(text_of(seed, count=300), CleanConfig()) for seed in range(5)] + [CJK]
    return train.train(iter(texts), TokenizerConfig(model=model, vocab_size=400))


def byte_level() -> Tokenizer:
    package = pytest.importorskip("tokenizers")
    model = package.Tokenizer(package.models.BPE())
    model.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|endoftext|>"], show_progress=False)
    model.train_from_iterator([text_of(seed, count=300) for seed in range(5)], trainer)
    return HuggingFace(model.to_str().encode(), {})


def with_prefix() -> Tokenizer:
    """As those of Llama 2: a blank is put before each text."""
    package = pytest.importorskip("tokenizers")
    model = package.Tokenizer(package.models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    model.normalizer = package.normalizers.Sequence(
        [package.normalizers.Prepend("\u2581"), package.normalizers.Replace(" ", "\u2581")]
    )
    special = ["<unk>", "<s>", "</s>"]
    trainer = package.trainers.BpeTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    model.train_from_iterator([line for seed in range(3) for line in text_of(seed, count=60).split("\n")], trainer)
    return HuggingFace(model.to_str().encode(), {})


@pytest.mark.parametrize(
    "make",
    [Bytes, lambda: trained("bpe"), lambda: trained("unigram"), byte_level, with_prefix],
    ids=["bytes", "bpe", "unigram", "byte-level", "prefix"],
)
def test_tokens_in_parts_are_those_of_the_whole(make):
    tokenizer = make()
    for text in [text_of(9), CJK * 700, ENGLISH * 100, "a" * 7000, "\n" * 7000, "word " * 1000]:
        found = long_documents.encode((text[i : i + 1500] for i in range(0, len(text), 1500)), tokenizer)
        np.testing.assert_array_equal(found, tokenizer.encode(text))
        assert found.dtype == np.uint16


@pytest.mark.parametrize("near", ["exact", "near"])
def test_a_long_document_is_prepared_as_a_short_one(tmp_path, monkeypatch, near):
    path = tmp_path / "book.txt"
    path.write_text(text_of(3), "utf-8", newline="")
    data = DataConfig(files=(str(path),), valid_fraction=0.3)
    config = Config(data=data, tokenizer=TokenizerConfig(kind="bytes"), clean=CleanConfig(deduplicate=near))
    prepare(config, epath.Path(tmp_path / "parts"), lambda line: None, workers=1)
    monkeypatch.setattr(long_documents, "LONG", 1 << 30)
    prepare(config, epath.Path(tmp_path / "whole"), lambda line: None, workers=1)
    for split in ("train", "valid"):
        parts, whole = (Shards.open(epath.Path(tmp_path / name / split), verify=True) for name in ("parts", "whole"))
        np.testing.assert_array_equal(*(each.take(np.arange(each.num_tokens)) for each in (parts, whole)))
        assert parts.num_bytes.tolist() == whole.num_bytes.tolist()


PROGRAM = """if True:
    import resource, sys
    import jax
    from etils import epath
    from lslm_jax import config
    from lslm_jax.data import prepare

    settings = config.Config(
        data=config.DataConfig(files=(sys.argv[1],), valid_fraction=float(sys.argv[3])),
        tokenizer=config.TokenizerConfig(kind="bytes"),
    )
    summary = prepare.prepare(settings, epath.Path(sys.argv[2]), lambda line: None)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print(summary["tokens"], *peaks)
"""


def peak(path: pathlib.Path, out: pathlib.Path, fraction: float) -> tuple[int, int]:
    """Tokens, and the largest resident size of a process in KiB."""
    root = pathlib.Path(lslm_jax.__file__).parents[1]
    command = [sys.executable, "-c", PROGRAM, str(path), str(out), str(fraction)]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True, check=True
    )
    tokens, *peaks = map(int, done.stdout.split())
    return tokens, max(peaks)


@pytest.mark.exhaustive
@pytest.mark.parametrize("fraction", [0.0, 0.1])
def test_a_text_of_106_mb_takes_less_than_a_gibibyte(tmp_path, fraction):
    path = tmp_path / "book.txt"
    lines = "".join(f"line {i} of a long book \U0001f600\r\n" for i in range(100_000)).encode()
    path.write_bytes(lines * (106_000_000 // len(lines)))
    tokens, kibibytes = peak(path, tmp_path / "out", fraction)
    assert tokens == path.stat().st_size - path.read_bytes().count(b"\r")
    assert kibibytes < 1 << 20
