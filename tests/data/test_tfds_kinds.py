"""TFDS's own builders, offline: only the download is replaced, by files in the layout of the real archives."""

import json
import pathlib
import unittest.mock

import pytest
from etils import epath

from lslm_jax.config import Config, DataConfig, TaskConfig, TokenizerConfig
from lslm_jax.data import label_names
from lslm_jax.data.prepare.prepare import prepare
from lslm_jax.data.readers import sources
from lslm_jax.data.shards import Shards
from lslm_jax.errors import DataError

tfds = pytest.importorskip("tensorflow_datasets")

PAIRS = [(f"sch\u00f6ner Satz {i}", f"English sentence {i}") for i in range(30)]


def write(path: pathlib.Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")


def sgm(sentences: list[str]) -> str:
    return "\n".join(f'<seg id="{i}">{sentence}</seg>' for i, sentence in enumerate(sentences, 1))


def squad(count: int, first: int = 0, impossible: bool = False) -> str:
    """SQuAD's JSON: three questions on each context, of which the last may be unanswerable."""
    paragraphs = []
    for i in range(first, first + count):
        context = f"Caf\u00e9 number {i} stands in town {i}, since {1900 + i}."
        answers = [
            {"text": f"town {i}", "answer_start": context.index("town")},
            {"text": "Caf\u00e9", "answer_start": 0},
        ]
        questions = [{"id": f"{i}-{j}", "question": f"Where is {j} of {i}?", "answers": answers} for j in range(3)]
        if impossible:
            questions = [question | {"is_impossible": False} for question in questions]
            questions[2] |= {"is_impossible": True, "answers": [], "plausible_answers": answers}
        paragraphs.append({"context": context, "qas": questions})
    return json.dumps({"version": "x", "data": [{"title": "t", "paragraphs": paragraphs}]})


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> pathlib.Path:
    """What the three data sets would have downloaded and unpacked."""
    raw = tmp_path_factory.mktemp("raw")
    for name, part in [("train", PAIRS[:20]), ("dev", PAIRS[20:25]), ("test", PAIRS[25:])]:
        rows = [f"{english}\t{i % 2}" for i, (_, english) in enumerate(part)]
        write(raw / "SST-2" / f"{name}.tsv", "\n".join(["sentence\tlabel", *rows]) + "\n")
    for language, side in [("de", 0), ("en", 1)]:
        sentences, kind = [pair[side] for pair in PAIRS], "src" if language == "de" else "ref"
        write(raw / f"training/europarl-v7.de-en.{language}", "\n".join(sentences[:8]))
        write(raw / f"commoncrawl.de-en.{language}", "\n".join(sentences[8:16]))
        write(raw / f"training-parallel-nc-v11/news-commentary-v11.de-en.{language}", "\n".join(sentences[16:20]))
        write(raw / f"dev/newstest2015-deen-{kind}.{language}.sgm", sgm(sentences[20:25]))
        write(raw / f"dev/newstest2016-deen-{kind}.{language}.sgm", sgm(sentences[25:]))
    write(raw / "train-v1.1.json", squad(10))
    write(raw / "dev-v1.1.json", squad(3, 10))
    write(raw / "train-v2.0.json", squad(10, 0, True))
    write(raw / "dev-v2.0.json", squad(3, 10, True))
    return raw


@pytest.fixture(scope="module")
def data_dir(archives, tmp_path_factory) -> str:
    """Where all of them are prepared: the first use does it."""
    directory = str(tmp_path_factory.mktemp("tfds"))

    def download(self, urls):
        if isinstance(urls, dict):
            return {key: download(self, url) for key, url in urls.items()}
        if isinstance(urls, list):
            return [download(self, url) for url in urls]
        return str(archives / urls.rpartition("/")[2]) if urls.endswith(".json") else str(archives)

    with unittest.mock.patch.object(tfds.download.DownloadManager, "download_and_extract", download):
        for name in ("glue/sst2", "squad/v1.1", "squad/v2.0", "wmt16_translate/de-en"):
            tfds.builder(name, data_dir=directory).download_and_prepare()
    return directory


def source(data_dir: str, name: str, **settings) -> DataConfig:
    return DataConfig(source="tfds", tfds=name, data_dir=data_dir, **settings)


def sst2(data_dir: str, **settings) -> DataConfig:
    keys = {"example": "label", "text_key": "sentence", "valid_split": "validation"}
    return source(data_dir, "glue/sst2", **keys | settings)


def contents(source: DataConfig, split="train") -> list[dict]:
    return [document.content for document in sources.documents(source, split)]


def test_pairs_of_wmt(data_dir):
    wmt = source(
        data_dir, "wmt16_translate/de-en", example="pair", text_key="en", target_key="de", valid_split="validation"
    )
    expected = [{"source": english.encode(), "target": german.encode()} for german, english in PAIRS]
    assert sorted(map(str, contents(wmt))) == sorted(map(str, expected[:20]))
    assert sorted(map(str, contents(wmt, "valid"))) == sorted(map(str, expected[20:25]))


def test_labels_of_glue_have_their_names(data_dir):
    config = Config(data=sst2(data_dir), task=TaskConfig(objective="classification"))
    assert label_names.names(config, {"": config.data}) == {"": ["negative", "positive"]}
    found = contents(config.data)
    assert sorted((content["text"], content["label"]) for content in found) == sorted(
        (english.encode(), i % 2) for i, (_, english) in enumerate(PAIRS[:20])
    )


@pytest.mark.parametrize("version", ["v1.1", "v2.0"])
def test_questions_of_squad_have_answers_at_their_places(data_dir, version):
    found = contents(source(data_dir, f"squad/{version}", example="qa", valid_split="validation"), "valid")
    assert len(found) == 9
    for content in found:
        last = content["id"].endswith(b"-2") and version == "v2.0"
        assert len(content["answers"]) == (0 if last else 2)
        for answer in content["answers"]:
            text = answer["text"].decode()
            assert content["context"].decode()[answer["start"] :].startswith(text)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        (
            "glue/sst2",
            {"example": "label", "text_key": "text"},
            "glue/sst2/2.0.0 has no feature 'text' (data.text_key)",
        ),
        (
            "glue/sst2",
            {"example": "label", "text_key": "sentence", "label_key": "class"},
            "glue/sst2/2.0.0 has no feature 'class' (data.label_key); it has: ",
        ),
        (
            "glue/sst2",
            {"example": "pair", "text_key": "sentence", "target_key": "idx"},
            "glue/sst2/2.0.0: feature 'idx' (data.target_key) is not text",
        ),
        (
            "glue/sst2",
            {"example": "tags", "text_key": "sentence"},
            "glue/sst2/2.0.0: feature 'sentence' (data.text_key) is not a list of texts",
        ),
        ("glue/sst2", {"example": "qa"}, "glue/sst2/2.0.0 has no feature 'question'; it has: "),
    ],
)
def test_a_feature_that_does_not_fit_is_told_in_one_line(data_dir, name, settings, message):
    with pytest.raises(DataError) as error:
        contents(source(data_dir, name, **settings))
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_words_and_tags_of_a_sequence(tmp_path):
    features = {
        "tokens": tfds.features.Sequence(tfds.features.Text()),
        "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-PER"])),
    }
    tfds.dataset_builders.store_as_tfds_dataset(
        name="ner",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": [(0, {"tokens": ["Ann", "sings"], "tags": [1, 0]}), (1, {"tokens": [], "tags": []})]},
        data_dir=str(tmp_path),
    )
    ner = source(str(tmp_path), "ner:1.0.0", example="tags", text_key="tokens", label_key="tags")
    assert sorted(map(str, contents(ner))) == sorted(
        map(str, [{"words": [b"Ann", b"sings"], "tags": [1, 0]}, {"words": [], "tags": []}])
    )
    config = Config(data=ner, task=TaskConfig(objective="tagging"))
    assert label_names.names(config, {"": ner}) == {"": ["O", "B-PER"]}


@pytest.mark.parametrize(
    ("objective", "data", "counts", "tokenizer"),
    [
        ("classification", {"tfds": "glue/sst2", "example": "label", "text_key": "sentence"}, (20, 5), "bytes"),
        ("seq2seq", {"tfds": "glue/sst2", "example": "label", "text_key": "sentence"}, (20, 5), "bytes"),
        ("qa", {"tfds": "squad/v2.0", "example": "qa"}, (30, 9), "bytes"),
        (
            "seq2seq",
            {"tfds": "wmt16_translate/de-en", "example": "pair", "text_key": "de", "target_key": "en"},
            (20, 5),
            "sentencepiece",  # trained on a sample of the data set
        ),
        pytest.param(
            "classification",
            {"tfds": "glue/sst2", "example": "label", "text_key": "sentence"},
            (20, 5),
            "sentencepiece",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "seq2seq",
            {"tfds": "glue/sst2", "example": "label", "text_key": "sentence"},
            (20, 5),
            "sentencepiece",
            marks=pytest.mark.exhaustive,
        ),
        pytest.param(
            "qa",
            {"tfds": "squad/v2.0", "example": "qa"},
            (30, 9),
            "sentencepiece",
            marks=pytest.mark.exhaustive,
        ),
    ],
)
def test_each_is_prepared(data_dir, tmp_path, objective, data, counts, tokenizer):
    config = Config(
        data=DataConfig(source="tfds", data_dir=data_dir, valid_split="validation", **data),
        task=TaskConfig(objective=objective),
        tokenizer=TokenizerConfig(kind=tokenizer, vocab_size=300),
    )
    summary = prepare(config, tmp_path, lambda line: None, workers=1)
    assert tuple(summary["splits"][split]["documents"] for split in ("train", "valid")) == counts
    assert len(list(Shards.open(tmp_path / "valid").examples())) == counts[1]


@pytest.mark.parametrize("given", [(), ("bad", "good")])
def test_class_numbers_are_not_taken_for_names_that_are_numbers(tmp_path, given):
    """Yelp's classes are named 1 and 2: number 1 is the class named 2. A label of -1 is none."""
    features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["1", "2"])}
    examples = [(str(i), {"text": f"text {i}", "label": (0, 1, 1, -1)[i]}) for i in range(4)]
    tfds.dataset_builders.store_as_tfds_dataset(
        name="stars",
        version="1.0.0",
        features=tfds.features.FeaturesDict(features),
        split_datasets={"train": examples},
        data_dir=str(tmp_path / "tfds"),
    )
    stars = DataConfig(
        source="tfds", tfds="stars:1.0.0", data_dir=str(tmp_path / "tfds"), example="label", labels=given
    )
    config = Config(data=stars, task=TaskConfig(objective="classification"), tokenizer=TokenizerConfig(kind="bytes"))
    summary = prepare(config, epath.Path(tmp_path / "out"), lambda line: None, workers=1)
    assert summary["dropped"] == {"no_label": 1}
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["labels"] == list(given or ("1", "2"))
    assert sorted(Shards.open(epath.Path(tmp_path / "out" / "train")).numbers[:, 0]) == [0, 1, 1]


def test_conversations_are_read_in_the_form_that_tfds_keeps_lists_of_messages(tmp_path):
    said = [{"role": "user", "content": "2 < 3?"}, {"role": "assistant", "content": "Caf\u00e9"}]

    class TidyTalks(tfds.core.GeneratorBasedBuilder):
        """Conversations."""

        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
            features = {"messages": tfds.features.Sequence(message)}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            yield 0, {"messages": said}

    TidyTalks(data_dir=tmp_path).download_and_prepare()
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}{{ m.content + eos_token }}{% endfor %}")
    data = source(str(tmp_path), "tidy_talks", example="chat", text_key="messages", chat_template=str(template))
    config = Config(data=data, tokenizer=TokenizerConfig(kind="bytes"))
    prepare(config, epath.Path(tmp_path) / "out", lambda line: None, workers=1)
    shards = Shards.open(epath.Path(tmp_path) / "out" / "train")
    [[first, count]] = shards.numbers.tolist()
    assert (first, count) == (len("2 < 3?") + 1, len("Caf\u00e9".encode()) + 1)
    assert shards.num_bytes.tolist() == [len("Caf\u00e9".encode())]
