"""Heads of pretrained directories: labels in the model's order, ways of judging, pairs; tensors that contradict."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file
from test_import import LABELS, MODELS, SIZES, save

from lslm_jax.config import Config, DataConfig, TaskConfig
from lslm_jax.convert import export, pretrained
from lslm_jax.data import label_names
from lslm_jax.data.objectives import classification_rows
from lslm_jax.data.shards import Shards, ShardWriter
from lslm_jax.data.tokenizers import special_tokens
from lslm_jax.errors import ConfigError, DataError
from lslm_jax.models import model_configs
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.train_state import abstract_model

NAMES = ["neutral", "contradiction", "entailment"]


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    directory = tmp_path_factory.mktemp("classifier")
    save(directory, MODELS["classification"][0], "classification")
    edit(directory / "config.json", id2label=dict(enumerate(NAMES)), label2id={name: i for i, name in enumerate(NAMES)})
    return directory


def test_a_classifier_scores_all_of_its_own_answers(classifier, tmp_path, command):
    texts = [f"text {i} of a {animal}" for i in range(12) for animal in ("cat", "dog")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    asked = command("generate", f"--pretrained={classifier}", f"--prompts={tmp_path}/prompts.jsonl", "--json")
    answers = [json.loads(line)["label"] for line in asked.splitlines()]
    rows = "".join(f"{json.dumps(text)},{answer}\n" for text, answer in zip(texts, answers, strict=True))
    (tmp_path / "data.csv").write_text("text,label\n" + rows)
    (tmp_path / "train.csv").write_text("text,label\nof no matter,neutral\n")
    config = {
        "data": {"files": [f"{tmp_path}/train.csv"], "valid_files": [f"{tmp_path}/data.csv"], "example": "label"}
        | {"packing": "pad", "seq_len": 48},
        "task": {"objective": "classification"},
        "model": {"family": "encoder"},
        "train": {"batch_size": 8},
        "clean": {"deduplicate": "none"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = command(
        "evaluate", f"--pretrained={classifier}", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"
    )
    assert json.loads(found)["eval/accuracy"] == 1.0


def test_a_head_is_put_into_the_order_of_the_labels_of_the_data(classifier):
    source = pretrained.describe(classifier)
    config = Config(model=replace(source.model, num_labels=3), task=TaskConfig(objective="classification"))
    abstract = abstract_model(config, make_mesh(config))
    read = lambda names: flatten(pretrained.load(source, "classification", abstract, names=names).model)
    own, ordered = read(()), read(sorted(NAMES))
    rows = [NAMES.index(name) for name in sorted(NAMES)]
    for name in ("top.head", "top.bias"):
        np.testing.assert_array_equal(ordered[name][:3], np.asarray(own[name])[rows], err_msg=name)
    assert pretrained.label_rows(source, "classification", ["yes", "no", "maybe"]) is None, "made for other labels"


def test_labels_of_the_data_stand_in_the_order_of_the_model(classifier, tmp_path):
    found = {name: i for i, name in enumerate(NAMES)}
    assert label_names.pretrained_names(str(classifier)) == list(found)
    (tmp_path / "a.csv").write_text("text,label\nx,entailment\ny,neutral\n")
    data = DataConfig(files=(f"{tmp_path}/a.csv",), example="label")
    config = Config(data=data, task=TaskConfig(objective="classification"))
    assert label_names.names(config, {"": data}) == {"": ["entailment", "neutral"]}
    config = replace(config, train=replace(config.train, init_from=str(classifier)))
    assert label_names.names(config, {"": data}) == {"": NAMES}
    (tmp_path / "a.csv").write_text("text,label\nx,yes\ny,no\n")
    assert label_names.names(config, {"": data}) == {"": ["no", "yes"]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must number its 2 labels from 0 on"),
        ({"id2label": {"0": "a", "1": "a"}}, "id2label names one label twice"),
        ({"id2label": ["a", "b"]}, "id2label=['a', 'b'] is not dict or null"),
        ({"label2id": {"neutral": 2}}, "label2id contradicts id2label"),
        ({"problem_type": "ranking"}, "problem_type='ranking' is not supported"),
    ],
)
def test_labels_that_contradict_themselves_are_refused(changes, message, classifier, tmp_path):
    shutil.copytree(classifier, tmp_path / "model")
    edit(tmp_path / "model" / "config.json", **changes)
    with pytest.raises(ConfigError) as error:
        pretrained.default_config(pretrained.describe(tmp_path / "model"))
    assert message in str(error.value)


@pytest.mark.parametrize("kind", ["multi", "one"])
def test_classes_that_are_judged_apart_have_a_sigmoid_each(kind, classifier, tmp_path, command):
    model = tmp_path / "model"
    shutil.copytree(classifier, model)
    names = NAMES if kind == "multi" else NAMES[:1]
    edit(model / "config.json", id2label=dict(enumerate(names)), label2id={}, num_labels=len(names))
    edit(model / "config.json", problem_type="multi_label_classification" if kind == "multi" else None)
    arrays = load_file(model / "model.safetensors")
    arrays |= {name: arrays[name][: len(names)] for name in ("classifier.weight", "classifier.bias")}
    save_file(arrays, model / "model.safetensors")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a cat", "target": "a dog"}\n')
    ask = ["generate", f"--prompts={tmp_path}/prompts.jsonl", "--json"]
    single, pair = (json.loads(line) for line in command(*ask, f"--pretrained={model}").splitlines())
    shares = single["probabilities"]
    assert list(shares) == names and not np.isclose(sum(shares.values()), 1.0)
    assert pair["probabilities"] != shares, "a pair of texts is answered"
    if kind == "one":
        return
    logits = {name: np.log(share / (1 - share)) for name, share in shares.items()}
    edit(model / "config.json", problem_type="single_label_classification")
    softmax = json.loads(command(*ask, f"--pretrained={model}").splitlines()[0])["probabilities"]
    scores = np.exp([logits[name] for name in names])
    np.testing.assert_allclose(list(softmax.values()), scores / scores.sum(), rtol=1e-4)


def test_problem_type_is_exported():
    sizes = SIZES | {"num_labels": 3, "num_kv_heads": 2, "head_dim": 16, "d_ff": 64, "num_decoder_layers": 3}
    model = replace(model_configs.BERT, **sizes)
    family = export.family_of(model, "masked")
    write = lambda **more: export.export_settings(
        family, model, "classification", "float32", {"bos": 1, "eos": 2, "pad": 0}, LABELS, **more
    )
    assert write()["problem_type"] == "single_label_classification"
    assert write(multi_label=True)["problem_type"] == "multi_label_classification"


def test_a_model_that_counts_positions_from_another_padding_token_is_not_exported():
    sizes = SIZES | {"num_kv_heads": 2, "head_dim": 16, "d_ff": 64, "num_decoder_layers": 3}
    model = replace(model_configs.BERT, **sizes, position_offset=2, token_types=1)
    family = export.family_of(model, "masked")
    assert family.model_type == "roberta"
    tokens = {"bos": 0, "eos": 2, "pad": 1}
    assert export.export_settings(family, model, "masked", "float32", tokens)["pad_token_id"] == 1
    with pytest.raises(ConfigError, match=r"padding token on, which is 0: model.position_offset=2 must be 1"):
        export.export_settings(family, model, "masked", "float32", tokens | {"pad": 0})


def test_two_separators_stand_between_the_texts_of_a_pair(tmp_path):
    writer = ShardWriter(epath.Path(tmp_path / "train"), 300, 1 << 20, 2, 1)
    writer.add([np.array([11, 12], np.int32), np.array([21, 22, 23], np.int32)], 0, 1, (1.0,))
    writer.finish()
    shards = Shards.open(epath.Path(tmp_path / "train"))
    config = Config(data=DataConfig(seq_len=12), task=TaskConfig(objective="classification"))
    facts = {"vocab_size": 300, "bos_id": 0, "eos_id": 2, "mask_id": 4}
    for separators, expected in ((1, [0, 11, 12, 2, 21, 22, 23, 2]), (2, [0, 11, 12, 2, 2, 21, 22, 23, 2])):
        ids = special_tokens.special_ids(facts | {"separators": separators}, "encoder")
        batch = classification_rows.LabelRows(shards, config, ids).batch(np.array([0]), np.array([0]))
        assert batch.segments_BT is not None and batch.types_BT is not None
        length = int(batch.segments_BT.sum())
        assert batch.tokens_BT[0, :length].tolist() == expected
        assert batch.types_BT[0, :length].tolist() == [0] * (3 + separators) + [1] * 4


def test_an_output_layer_that_differs_from_the_embedding_is_read(tmp_path, capsys):
    directory = tmp_path / "llama"
    save(directory, replace(MODELS["causal"][0], tie_embeddings=True, num_layers=1), "causal")
    assert pretrained.describe(directory).model.tie_embeddings
    arrays = load_file(directory / "model.safetensors")
    embedding = arrays["model.embed_tokens.weight"]
    save_file(arrays | {"lm_head.weight": embedding.copy()}, directory / "model.safetensors")
    assert pretrained.describe(directory).model.tie_embeddings, "a copy is a copy"
    save_file(arrays | {"lm_head.weight": embedding + 1.0}, directory / "model.safetensors")
    source = pretrained.describe(directory)
    assert not source.model.tie_embeddings
    assert "tie_word_embeddings is true, but lm_head.weight differs" in capsys.readouterr().err
    config = Config(model=source.model)
    model = flatten(pretrained.load(source, "causal", abstract_model(config, make_mesh(config))).model)
    np.testing.assert_array_equal(model["head"][:300], embedding + 1.0)


def test_a_copy_that_is_none_and_a_value_that_is_not_finite_are_refused(tmp_path):
    directory = tmp_path / "bert"
    save(directory, replace(MODELS["masked"][0], num_layers=1), "masked")
    source = pretrained.describe(directory)
    config = Config(model=source.model, task=TaskConfig(objective="masked"))
    abstract = abstract_model(config, make_mesh(config))
    arrays = load_file(directory / "model.safetensors")
    embed = "bert.embeddings.word_embeddings.weight"
    save_file(arrays | {"cls.predictions.decoder.weight": arrays[embed] + 1}, directory / "model.safetensors")
    with pytest.raises(DataError, match=r"cls\.predictions\.decoder\.weight differs from bert\.embeddings"):
        pretrained.load(source, "masked", abstract)
    arrays[embed][299, 3] = np.nan
    save_file(arrays, directory / "model.safetensors")
    with pytest.raises(DataError, match=f"{embed} holds a value that is not finite, in row 299"):
        pretrained.load(source, "masked", abstract)


def test_one_file_counts_where_there_is_an_index_too(tmp_path):
    directory = tmp_path / "llama"
    save(directory, replace(MODELS["causal"][0], num_layers=1), "causal")
    (directory / "model.safetensors.index.json").write_text('{"weight_map": {"model.norm.weight": "gone.safetensors"}}')
    assert "model.norm.weight" in pretrained.tensors(pretrained.describe(directory))


def test_an_export_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    directory = epath.Path(tmp_path / "out")
    save(directory, replace(MODELS["causal"][0], num_layers=1), "causal")
    (directory / "NOTES").write_text("mine")
    (directory / "model.safetensors.index.json").write_text("{}")
    config = Config(model=pretrained.describe(directory).model, task=TaskConfig(objective="causal"))
    old = (directory / "config.json").read_bytes(), (directory / "model.safetensors").read_bytes()
    from test_import import Exporter, random_model

    from lslm_jax.data.tokenizers.bytes import Bytes

    exporter, model = Exporter(config, Bytes(), []), random_model(config.model, "causal")
    monkeypatch.setattr(exporter, "_settings", None)  # fails when all else is written
    with pytest.raises(TypeError):
        export.export(directory, model, exporter, {})
    assert old == ((directory / "config.json").read_bytes(), (directory / "model.safetensors").read_bytes())
    monkeypatch.undo()
    export.export(directory, model, exporter, {})
    assert (directory / "NOTES").read_text() == "mine" and not (directory / "model.safetensors.index.json").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.startswith(".")]
    (directory / "checkpoints").mkdir()
    with pytest.raises(ConfigError, match="is a run directory"):
        export.export(directory, model, exporter, {})


def test_what_keeps_a_model_from_being_exported_is_known_before_training():
    odd = replace(MODELS["classification"][0], num_kv_heads=2, head_dim=16, d_ff=128, num_decoder_layers=3)
    assert export.obstacle(odd, "classification") is None
    line = export.obstacle(replace(odd, pool="mean"), "classification")
    assert line == "export: no bert is like this model; it would be with model.pool=first"
