"""Every vocabulary trained here gives any text back; those of others keep special ids out of text."""

import functools
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import tokenizers as package
from etils import epath

import lslm_jax
from lslm_jax.config import TokenizerConfig
from lslm_jax.data.tokenizers import to_hf, train
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.loading import load_tokenizer
from lslm_jax.data.tokenizers.sentencepiece import SentencePiece
from lslm_jax.errors import ConfigError, DataError, InputMissing

LIBRARY = pathlib.Path(os.__file__).parent
AWKWARD = [
    *("", " ", "  ", "a", " a", "a  ", "  a   b  ", "\n", "\n\n\n", "\r\n", "\r", "\t\tx\n\t", "\x00\x01\x7f"),
    *("\u2581", "\u2581\u2581a \u2581 ", "a\u2581 b", "\u2047", "\u2585", "\ufeffx", "\u3000x\u2028y\u00a0"),
    *(
        "e\u0301\u00e9",
        "\U0001f600\U0001f469\u200d\U0001f469\u200d\U0001f467",
        "\u05d0\u05d1\u0639",
        "\ud55c\uad6d\u8a9e",
    ),
    *("<s>", "</s><pad>", "<unk>", "<0x41>", "    def f():\n        return 1\n", "\U0010ffff\u0000\uffff"),
]


@pytest.fixture(scope="module")
def sources() -> list[str]:
    """The top level of the standard library, as text."""
    return [path.read_bytes().decode() for path in sorted(LIBRARY.glob("*.py"))]


@pytest.fixture(scope="module", params=["bpe", "unigram"])
def model(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def trained(model, sources) -> Tokenizer:
    return train.train(iter(sources[:12]), TokenizerConfig(model=model, vocab_size=1024))


def test_a_trained_vocabulary_gives_every_text_back(trained, sources):
    for text, ids in zip(AWKWARD + sources, trained.encode_batch(AWKWARD + sources), strict=True):
        assert trained.decode(ids) == text
        assert ids.dtype == np.int32
        assert not np.isin(ids, [trained.pad_id, trained.bos_id, trained.eos_id, 3]).any()


def test_a_trained_vocabulary_has_the_promised_ids_and_size(trained):
    assert (trained.pad_id, trained.bos_id, trained.eos_id) == (0, 1, 2)
    assert [trained.piece(i) for i in range(4)] == ["<pad>", "<s>", "</s>", "<unk>"]
    assert trained.vocab_size == 1024
    assert trained.decode([1, *trained.encode("x = 1"), 2, 0, 0]) == "x = 1"


def test_runs_of_spaces_and_newlines_are_single_pieces(trained):
    assert len(trained.encode("        ")) == 1
    assert len(trained.encode("\n\n")) == 1
    assert len(trained.encode("def f():\n        return None\n")) <= 12


def test_training_depends_on_the_text_alone(model, trained):
    """Another process, on one core, makes the same file, and says nothing."""
    program = """if True:
        import os, pathlib, sys
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        from lslm_jax.config import TokenizerConfig
        from lslm_jax.data.tokenizers import train
        paths = sorted(pathlib.Path(os.__file__).parent.glob("*.py"))[:12]
        texts = [path.read_bytes().decode() for path in paths]
        config = TokenizerConfig(model=sys.argv[1], vocab_size=1024)
        print(train.train(iter(texts), config).sha256)
    """
    command = [sys.executable, "-c", program, model]
    root = pathlib.Path(lslm_jax.__file__).parents[1]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [trained.sha256]
    assert run.stderr == ""


def test_long_documents_and_odd_characters_are_trained_on():
    text = "word " * 5000 + "x" * 20_000 + "\n" * 9000 + "\x00\u2581\u2585\t" * 100
    tokenizer = train.train(iter([text, ""]), TokenizerConfig(vocab_size=285))
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_size_of_a_trained_vocabulary_is_an_upper_bound(model):
    texts = ["the cat sat on the mat with another cat that sat"] * 3
    made = train.train(iter(texts), TokenizerConfig(model=model, vocab_size=5000))
    assert 270 < made.vocab_size < 400
    assert made.decode(made.encode(texts[0])) == texts[0]


@pytest.mark.parametrize("model", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "text", ["我们 今天去公园散步的时候看见了一只猫" * 30, "ACGTACGTTGCA" * 40], ids=["one space", "no space"]
)
def test_rare_spaces_are_spaces(model, text):
    coverage = {"character_coverage": 0.98} if " " in text else {}
    made = train.train(iter([text]), TokenizerConfig(model=model, vocab_size=300, **coverage))
    for other in (text, "A C  G", " x", "a\u2581b "):
        assert made.decode(made.encode(other)) == other
    theirs = package.Tokenizer.from_str(json.dumps(to_hf.convert(made, "decoder")))
    assert theirs.decode(theirs.encode("A C  G", add_special_tokens=False).ids) == "A C  G"


def test_user_symbols_are_one_token_and_text():
    symbols = ("<|turn|>", "def ")
    texts = ["def add(a, b): return a <|turn|> b"] * 20
    made = train.train(iter(texts), TokenizerConfig(vocab_size=320, user_symbols=symbols))
    for symbol in symbols:
        assert len(made.encode(symbol)) == 1 and made.decode(made.encode(f"x{symbol}y")) == f"x{symbol}y"
    converted = to_hf.convert(made, "decoder")
    theirs = package.Tokenizer.from_str(json.dumps(converted))
    for text in ("def f <|turn|>", "a<|turn|>b def "):
        assert theirs.encode(text, add_special_tokens=False).ids == made.encode(text).tolist()
        assert theirs.decode(theirs.encode(text).ids) == text


def test_characters_beyond_the_coverage_are_spelt_in_bytes():
    texts = ["abcdefgh" * 200 + "é"]
    kept, left = (
        train.train(iter(texts), TokenizerConfig(vocab_size=300, character_coverage=share)) for share in (1.0, 0.99)
    )
    assert len(kept.encode("é")) == 1 and len(left.encode("é")) == 2 and left.decode(left.encode("é")) == "é"


def test_a_vocabulary_too_small_for_the_characters_is_refused():
    with pytest.raises(ConfigError, match=r"^tokenizer.vocab_size is 100, but .* need at least 2\d\d$"):
        train.train(iter(["abcdefgh"]), TokenizerConfig(vocab_size=100))


def test_without_byte_fallback_unknown_characters_are_unknown():
    config = TokenizerConfig(vocab_size=12, byte_fallback=False)
    tokenizer = train.train(iter(["aab aab ab ba"] * 9), config)
    assert 3 in tokenizer.encode("a\u00e9")


def test_no_text_is_no_vocabulary():
    with pytest.raises(InputMissing, match=r"^there is no text to train a vocabulary on$"):
        train.train(iter([]), TokenizerConfig())


def test_bytes_are_bytes():
    tokenizer = Bytes()
    assert tokenizer.encode("a\u00e9").tolist() == [3 + 0x61, 3 + 0xC3, 3 + 0xA9]
    assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in AWKWARD)
    assert tokenizer.decode([1, 3 + 0x61, 2, 0]) == "a"
    assert tokenizer.decode([3 + 0xC3]) == "\ufffd"
    assert [tokenizer.piece(id) for id in (0, 1, 2, 3 + 0x61, 3 + 0x0A)] == ["<pad>", "<s>", "</s>", "a", "<0x0A>"]
    assert tokenizer.vocab_size == 259


def test_a_saved_tokenizer_is_the_same_one(trained, tmp_path, hugging_face):
    for tokenizer in (trained, Bytes(), load_tokenizer(hugging_face())):
        path = epath.Path(tmp_path) / tokenizer.save(epath.Path(tmp_path))
        again = load_tokenizer(path)
        assert again.kind == tokenizer.kind
        assert again.sha256 == tokenizer.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ("vocab_size", "pad_id", "bos_id", "eos_id", "mask_id", "sentinel_ids"):
            assert getattr(again, name) == getattr(tokenizer, name)
        assert np.array_equal(again.encode("a b"), tokenizer.encode("a b"))


@pytest.fixture
def hugging_face(tmp_path):
    return functools.partial(hugging_face_file, tmp_path)


def hugging_face_file(
    root: pathlib.Path, beside: dict[str, dict] | None = None, special: tuple[str, ...] = ("<s>", "</s>")
) -> epath.Path:
    """Makes a directory with a unigram tokenizer.json, whose model itself spells its special tokens as T5's does."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz<>/\u2581"]
    vocabulary = [("<unk>", 0.0), *((token, -0.1) for token in special), *letters]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never", split=False)
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    tokenizer.enable_truncation(4)
    directory = epath.Path(root / "hf")
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in (beside or {}).items():
        (directory / name).write_text(json.dumps(content))
    return directory / "tokenizer.json"


@pytest.mark.parametrize(
    ("beside", "special", "ids"),
    [
        (
            {"tokenizer_config.json": {"bos_token": "<go>", "eos_token": {"content": "<stop>"}}},
            ("<go>", "<stop>"),
            (1, 2),
        ),
        ({"special_tokens_map.json": {"eos_token": "<stop>"}}, ("<go>", "<stop>"), (2, 2)),
        ({}, ("<s>", "</s>"), (1, 2)),
        ({}, ("x", "<|endoftext|>"), (2, 2)),
        ({"tokenizer_config.json": {"bos_token": None, "eos_token": "</s>"}}, ("</s>", "<pad>"), (1, 1)),
    ],
)
def test_special_ids_are_found_where_hugging_face_files_say(hugging_face, beside, special, ids):
    tokenizer = load_tokenizer(hugging_face(beside, special))
    assert (tokenizer.bos_id, tokenizer.eos_id) == ids


def test_a_special_token_in_text_is_text(hugging_face):
    tokenizer = load_tokenizer(hugging_face(special=("<s>", "</s>")))
    for text in ("<s>", "a</s>b <s>c", "</s></s>", "plain and long enough"):
        ids = tokenizer.encode(text)
        assert not np.isin(ids, [1, 2]).any()
        assert tokenizer.decode(ids) == text
    assert tokenizer.decode([1, *tokenizer.encode("a b"), 2]) == "a b"


def test_the_shared_llama_tokenizer_is_read(shared):
    tokenizer = load_tokenizer(shared / "models" / "stories260K" / "tokenizer.json")
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (512, 1, 2)
    text = "<s> Once upon a time</s>, \U0001f600!"
    assert not np.isin(tokenizer.encode(text), [0, 1, 2]).any()
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_models_of_others_keep_their_own_ids(shared):
    directory = shared / "tokenizers" / "sentencepiece_tests"
    google = load_tokenizer(directory / "sentencepiece_test.model")
    assert (google.pad_id, google.bos_id, google.eos_id) == (2, 1, 2)
    t5 = load_tokenizer(directory / "seqio_test.model")
    assert (t5.pad_id, t5.bos_id, t5.eos_id) == (0, 1, 1)
    assert google.decode(google.encode("This is a test")) == "This is a test"


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("none.model", None, InputMissing, "tokenizer {path} does not exist"),
        ("empty.model", "", DataError, "tokenizer {path} is empty"),
        ("text.model", "hello", DataError, "{path} is not a SentencePiece model"),
        ("tokenizer.json", "{}", DataError, "{path} is not a tokenizer.json"),
        ("bytes.json", "{}", DataError, "{path} defines other bytes than this program's"),
    ],
)
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, name, content, kind, message):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(kind) as error:
        load_tokenizer(path)
    assert str(error.value) == message.format(path=path)


def test_a_tokenizer_without_begin_and_end_is_refused(hugging_face):
    with pytest.raises(ConfigError, match=r"tokenizer.json: no token begins or ends a text"):
        load_tokenizer(hugging_face(special=("x1", "x2")))


# Places in the text, words, and the special ids of encoders and encoder-decoders.


def word_piece(tmp_path) -> epath.Path:
    """A BERT in small: lower case, no accents, word pieces, and a mask."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##able", "able", "to", ".", *"abcdefe", "##e", "##b"]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens([AddedToken(token) for token in ("[PAD]", "[CLS]", "[SEP]", "[MASK]")])
    path = epath.Path(tmp_path) / "bert.json"
    tokenizer.save(str(path))
    return path


def byte_level(shared, tmp_path) -> epath.Path:
    from tokenizers import ByteLevelBPETokenizer

    gpt2 = shared / "tokenizers" / "gpt2"
    path = epath.Path(tmp_path) / "gpt2.json"
    ByteLevelBPETokenizer(str(gpt2 / "vocab.json"), str(gpt2 / "merges.txt")).save(str(path))
    return path


@pytest.fixture(scope="module")
def others(shared, tmp_path_factory) -> dict[str, Tokenizer]:
    """Vocabularies that were not trained here: with normalisation, a blank before each text, or bytes in pieces."""
    root = tmp_path_factory.mktemp("others")
    paths = {
        "google": shared / "tokenizers" / "sentencepiece_tests" / "sentencepiece_test.model",
        "t5": shared / "tokenizers" / "sentencepiece_tests" / "seqio_test.model",
        "llama": shared / "models" / "stories260K" / "tokenizer.json",
        "gpt2": byte_level(shared, root),
        "unigram": hugging_face_file(root),
        "bert": word_piece(root),
    }
    return {name: load_tokenizer(path) for name, path in paths.items()}


ODD = [*AWKWARD, "caf\u00e9 \U0001f600x\ufb01  a\u2581b\n\nfoo \ud55c", "\u1e9b\u0323 \u00bd\u2460 e\u0301"]


def check_offsets(tokenizer: Tokenizer, text: str) -> None:
    ids, begins, ends = tokenizer.encode_with_offsets(text)
    np.testing.assert_array_equal(ids, tokenizer.encode(text))
    assert (ids.dtype, begins.dtype, ends.dtype) == (np.int32, np.int64, np.int64)
    assert len(begins) == len(ends) == len(ids)
    assert (begins >= 0).all() and (ends <= len(text)).all() and (begins <= ends).all()
    assert (np.diff(begins) >= 0).all() and (np.diff(ends) >= 0).all()


def test_each_token_spells_the_characters_it_says(trained, sources):
    for tokenizer in (trained, Bytes()):
        for text in [*ODD, sources[0][:3000]]:
            check_offsets(tokenizer, text)
            ids, begins, ends = tokenizer.encode_with_offsets(text)
            assert set(np.concatenate([np.arange(*span) for span in zip(begins, ends, strict=True)] or [[]])) == set(
                range(len(text))
            )
            for first, end in {*zip(begins, ends, strict=True)}:
                inside = (begins >= first) & (ends <= end)
                assert tokenizer.decode(ids[inside]) == text[first:end]


@pytest.mark.parametrize("name", ["google", "t5", "llama", "gpt2", "unigram", "bert"])
def test_offsets_of_other_vocabularies_go_with_the_ids_of_encode(others, name):
    for text in ODD:
        check_offsets(others[name], text)


@pytest.mark.parametrize("name", ["google", "llama", "gpt2", "unigram", "bert"])
@pytest.mark.parametrize("text", ["unable to", "to  able"])
def test_the_tokens_of_a_word_are_found_by_its_characters(others, name, text):
    ids, _, ends = others[name].encode_with_offsets(text)
    assert others[name].decode(ids[ends > text.index(" ") + 1]).strip() == text.split()[1]


def test_the_bytes_of_one_character_share_its_place(trained):
    for tokenizer in (trained, Bytes()):
        ids, begins, ends = tokenizer.encode_with_offsets("a\u2581\U0001f600")
        assert begins.tolist() == [0] + [1] * 3 + [2] * 4
        assert (ends - begins).tolist() == [1] * len(ids)


def words(tokenizer: Tokenizer, text: str) -> list[str]:
    ids = tokenizer.encode(text)
    cuts = np.flatnonzero(tokenizer.word_starts(ids))
    return [tokenizer.decode(part) for part in np.split(ids, cuts)[1:]]


def test_words_are_what_blanks_separate_and_begin_with_them(trained):
    for tokenizer in (trained, Bytes()):
        assert words(tokenizer, "import os  and\n\nthe r\u00e9st") == [
            "import",
            " os",
            "  and",
            "\n\nthe",
            " r\u00e9st",
        ]
        assert words(tokenizer, "") == []
        assert words(tokenizer, "   return") == ["   return"]
        assert tokenizer.word_starts(np.array([tokenizer.vocab_size, *tokenizer.encode("ab")])).tolist()[0]


@pytest.mark.parametrize("name", ["google", "llama", "gpt2", "unigram", "bert"])
def test_words_of_other_vocabularies(others, name):
    assert [word.strip() for word in words(others[name], "unable to able")] == ["unable", "to", "able"]


def test_mask_and_sentinels_are_found_where_the_vocabulary_has_them(trained, others, hugging_face):
    for tokenizer in (trained, Bytes(), others["llama"], others["google"]):
        assert (tokenizer.mask_id, tokenizer.sentinel_ids) == (None, ())
    assert others["bert"].mask_id == 4
    assert not np.isin(others["bert"].encode("a [MASK] b"), [4]).any()
    special = ("</s>", "<extra_id_2>", "<extra_id_1>", "<extra_id_0>", "<mask>")
    tokenizer = load_tokenizer(hugging_face(special=special))
    assert (tokenizer.mask_id, tokenizer.sentinel_ids) == (5, (4, 3, 2))
    assert not np.isin(tokenizer.encode("a <mask> <extra_id_1>"), [2, 3, 4, 5]).any()


def test_a_sentencepiece_model_may_have_a_mask_and_sentinels_and_no_text_spells_them():
    import io

    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a man saw a dog with a mask"] * 9),
        model_writer=model,
        vocab_size=40,
        hard_vocab_limit=False,
        user_defined_symbols=["[MASK]", "<extra_id_1>", "<extra_id_0>"],
        control_symbols=["[CLS]", "[SEP]"],
        bos_id=-1,
        eos_id=-1,
        minloglevel=2,
    )
    tokenizer = SentencePiece(model.getvalue())
    cls, sep, mask, second, first = (
        tokenizer._find(f) for f in ("[CLS]", "[SEP]", "[MASK]", "<extra_id_1>", "<extra_id_0>")
    )
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (cls, sep, mask)
    assert tokenizer.sentinel_ids == (first, second)
    for text in ("a [MASK] dog", "<extra_id_1>", "[CLS] saw <extra_id_0>a", "a dog"):
        check_offsets(tokenizer, text)
        assert not np.isin(tokenizer.encode(text), [cls, sep, mask, first, second]).any()
    assert tokenizer.decode([cls, *tokenizer.encode("a dog"), mask, sep]) == "a dog"


PIECES = {"type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##"}
PIECES |= {"max_input_chars_per_word": 100, "vocab": {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2, "a": 3}}
BACKTRACKS = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
STRANGE = {
    "no unknown": ({"model": PIECES | {"vocab": {"[CLS]": 0, "[SEP]": 1, "a": 2}}}, "lacks its unk_token '[UNK]'"),
    "a huge id": ({"model": PIECES | {"vocab": PIECES["vocab"] | {"b": 2**31}}}, "has an id of 2147483648"),
    "an unknown piece out of range": (
        {"model": {"type": "Unigram", "unk_id": 7, "vocab": [["<s>", 0.0]]}},
        "is not a tokenizer.json",
    ),
    "a pattern that backtracks": ({"model": PIECES, "pre_tokenizer": BACKTRACKS}, "cannot encode a text: Onig"),
    "an added token with another id": ({"model": PIECES}, "gives '<x>' the id 99"),
}


@pytest.mark.parametrize(("parts", "message"), STRANGE.values(), ids=STRANGE)
def test_a_hostile_tokenizer_is_refused_in_a_line(parts, message, tmp_path):
    empty = dict.fromkeys(["normalizer", "pre_tokenizer", "post_processor", "decoder"])
    (tmp_path / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": []} | empty | parts))
    if "99" in message:
        added = {"added_tokens_decoder": {"99": {"content": "<x>", "special": True}}}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(added))
    with pytest.raises((DataError, ConfigError)) as error:
        load_tokenizer(tmp_path / "tokenizer.json").encode("a" * 40 + "!")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_sentencepiece_model_whose_pieces_are_not_utf_8_is_refused(tmp_path):
    made = train.train(iter(["the cat sat on the mat"] * 9), TokenizerConfig(vocab_size=300))
    (tmp_path / "tokenizer.model").write_bytes(made.content.replace("\u2581".encode(), b"\xff\xfe\xff"))
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "tokenizer.model")


CHAT = {"eos_token": "<|im_end|>", "bos_token": None, "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}


@pytest.mark.parametrize("where", ["added_tokens.json", "added_tokens_decoder"])
def test_tokens_added_behind_a_sentencepiece_model_are_tokens(where, tmp_path):
    made = train.train(iter(["user the cat sat on the mat"] * 9), TokenizerConfig(vocab_size=300))
    size = made.vocab_size
    ids = {"<|im_start|>": size, "<|im_end|>": size + 1, "<tool>": size + 2}
    (tmp_path / "tokenizer.model").write_bytes(made.content)
    settings = dict(CHAT)
    if where == "added_tokens.json":
        (tmp_path / where).write_text(json.dumps(ids))
    else:
        settings[where] = {str(id): {"content": name, "special": name != "<tool>"} for name, id in ids.items()}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = load_tokenizer(tmp_path / "tokenizer.model")
    assert (ours.eos_id, ours.vocab_size, ours.adds_bos) == (size + 1, size + 3, False)
    framed = ours.encode_framed("<|im_start|>user the cat<|im_end|>").ids.tolist()
    assert framed == [size, *made.encode("user the cat"), size + 1]
    assert size not in ours.encode("<|im_start|>"), "text is data"
    assert ours.encode("the<tool>cat").tolist() == [*made.encode("the"), size + 2, *made.encode("cat")]
    assert ours.decode([size, *made.encode("the"), size + 2, size + 1]) == "the<tool>"
    (tmp_path / "run").mkdir()
    again = load_tokenizer(tmp_path / "run" / ours.save(epath.Path(tmp_path / "run")))
    assert (again.facts(), again.special_tokens) == (ours.facts(), ours.special_tokens)
    assert ours.sha256 != made.sha256


def test_settings_that_contradict_each_other_are_refused(tmp_path):
    pieces = package.BertWordPieceTokenizer(PIECES["vocab"], lowercase=True)
    pieces.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"do_lower_case=False, but tokenizer\.json has True"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "[SEP]", "split_special_tokens": true}')
    with pytest.raises(ConfigError, match="split_special_tokens=True is not supported"):
        load_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text('{"sep_token": "[SEP]"}')
    (tmp_path / "special_tokens_map.json").write_text('{"sep_token": "[CLS]"}')
    with pytest.raises(ConfigError, match="sep_token='\\[CLS\\]' contradicts"):
        load_tokenizer(tmp_path / "tokenizer.json")


def test_a_pair_of_roberta_has_two_separators(tmp_path):
    made = package.ByteLevelBPETokenizer()
    made.train_from_iterator(["the cat"] * 9, vocab_size=270, special_tokens=["<s>", "</s>"], show_progress=False)
    for separators in (1, 2):
        frame = {"type": "RobertaProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
        frame |= {"trim_offsets": True, "add_prefix_space": False}
        if separators == 1:
            frame = {"type": "BertProcessing", "sep": ["</s>", 1], "cls": ["<s>", 0]}
        content = json.loads(made.to_str()) | {"post_processor": frame}
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        ours = load_tokenizer(tmp_path / "tokenizer.json")
        assert (ours.separators, ours.facts()["separators"]) == (separators, separators)
