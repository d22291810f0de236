"""`import`: a directory of others becomes a run of ours, or is refused in one line; what other programs say of it."""

import functools
import json
import shutil
from dataclasses import replace

import jax
import ml_dtypes
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from lslm_jax.config import Config, TaskConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import export, parity
from lslm_jax.convert.export import Exporter
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.errors import ConfigError
from lslm_jax.main import main
from lslm_jax.models import attention, model_configs
from lslm_jax.models.build_model import build_model
from lslm_jax.runtime.pytree import flatten, unflatten

pytestmark = pytest.mark.usefixtures("one_device")

SIZES = {"num_layers": 3, "d_model": 32, "num_heads": 2, "max_length": 64, "vocab_size": 300}
LLAMA = replace(model_configs.LLAMA, **SIZES, dtype="float32")
T5 = replace(model_configs.t5_v1_1_small, **SIZES, head_dim=16, d_ff=64)
MODELS = {
    "causal": (LLAMA, ["--prompt=a cat"]),
    "masked": (replace(model_configs.BERT, **SIZES), ["--prompt=a c[MASK]t"]),
    "classification": (replace(model_configs.BERT, **SIZES, num_labels=3), ["--prompt=a cat"]),
    "tagging": (replace(model_configs.BERT, **SIZES, num_labels=3), ["--prompt=a cat"]),
    "regression": (replace(model_configs.BERT, **SIZES), ["--prompt=a cat"]),
    "qa": (replace(model_configs.BERT, **SIZES), ["--prompt=who?", "--context={context}"]),
    "seq2seq": (T5, ["--prompt=a cat"]),
}
LABELS = ["bad", "so-so", "good"]


def random_model(config, objective):
    """A model whose parameters NumPy draws, so that nothing is compiled."""
    rng = np.random.default_rng(3)
    abstract = jax.eval_shape(lambda: build_model(config, jax.random.key(0), objective))
    arrays = {
        # Scales of norms are close to 1, everything else to 0.
        name: jax.device_put(np.float32(name.endswith(".scale")) + 0.1 * rng.standard_normal(leaf.shape, np.float32))
        for name, leaf in flatten(abstract).items()
    }
    return unflatten(abstract, arrays)


def save(directory, model, objective):
    """A directory with a random model; returns that model."""
    config = Config(model=fill_sizes(model), task=TaskConfig(objective=objective))
    made = random_model(config.model, objective)
    exporter = Exporter(config, Bytes(), LABELS if objective in ("classification", "tagging") else [])
    exporter.write(epath.Path(directory), exporter.sources(made), {})
    return made


def tamper(directory, name, by=1.0):
    """Changes one tensor of a directory."""
    arrays = load_file(directory / "model.safetensors")
    arrays[name] = arrays[name] + np.float32(by) * np.random.default_rng(0).standard_normal(arrays[name].shape, "f4")
    save_file(arrays, directory / "model.safetensors")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """`saved(objective)`: a directory with a random model, which the tests must not change, and that model."""

    @functools.cache
    def saved(objective):
        directory = tmp_path_factory.mktemp(objective)
        return directory, save(directory, MODELS[objective][0], objective)

    return saved


@pytest.fixture(scope="module")
def llama(saved):
    return saved("causal")[0]


@pytest.mark.parametrize("objective", MODELS)
def test_an_imported_model_is_a_run_that_answers_and_is_given_back(objective, saved, tmp_path, command):
    theirs, _ = saved(objective)
    _, prompt = MODELS[objective]
    run, out = (tmp_path / name for name in ("run", "out"))
    (tmp_path / "context").write_text("a dog met a cat in the park")
    summary = json.loads(command("import", f"--pretrained={theirs}", f"--workdir={run}"))
    arrays = load_file(theirs / "model.safetensors")
    assert summary.items() >= {"objective": objective, "files": ["model.safetensors"], "fresh": []}.items()
    assert summary.items() >= {"dtype": "float32", "skipped": []}.items()
    assert summary["bytes"] == (theirs / "model.safetensors").stat().st_size
    assert summary["parameters"] >= sum(array.size for array in arrays.values())
    prompt = [flag.format(context=tmp_path / "context") for flag in prompt]
    lengths = ["--config.generate.max_tokens=8"] if objective in ("causal", "seq2seq") else []
    asked = [*prompt, "--json", *lengths]
    answer = json.loads(command("generate", f"--workdir={run}", *asked))
    assert answer == json.loads(command("generate", f"--pretrained={theirs}", *asked))
    assert answer["step"] == 0
    if objective == "classification":
        assert answer["label"] in LABELS
    command("export", f"--workdir={run}", f"--to={out}")
    back = load_file(out / "model.safetensors")
    assert back.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array, err_msg=name)
    assert json.loads((out / "config.json").read_text()) == json.loads((theirs / "config.json").read_text())
    assert "taken over by lslm_jax" in (out / "README.md").read_text()


def test_a_run_begins_with_the_weights_of_an_imported_one(llama, tmp_path, command, capsys):
    run = tmp_path / "run"
    command("import", f"--pretrained={llama}", f"--workdir={run}")
    shutil.move(run, tmp_path / "moved")
    text = "".join(f"the cat sat on mat {i}\n" for i in range(200))
    (tmp_path / "a.txt").write_text(text)
    given = json.loads((tmp_path / "moved" / "config.json").read_text())
    sections = {
        "model": given["model"],
        "data": {"files": [f"{tmp_path}/a.txt"], "document": "line", "seq_len": 32},
        "tokenizer": {"kind": "huggingface", "path": f"{tmp_path}/moved/data/tokenizer.json"},
        "train": {"steps": 1, "batch_size": 8, "init_from": f"{tmp_path}/moved"},
        "log": {"tensorboard": False},
    }
    (tmp_path / "config.json").write_text(json.dumps(sections))
    flags = [f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/tuned"]
    begun = json.loads(command(*flags))["loss"]
    tuned = [f"--pretrained={llama}", *flags[:1], f"--workdir={tmp_path}/other"]
    assert json.loads(command(*tuned))["loss"] == begun
    # The run itself has no data to train on.
    message = command(*flags[:1], f"--workdir={tmp_path}/moved", "--config.train.init_from=", code=2)
    assert 'was prepared with data.source="shards"' in message or "was prepared with data.max_documents" in message
    message = command(f"--config={tmp_path}/moved/config.json", f"--workdir={tmp_path}/moved", code=66)
    assert message.endswith("moved/data/train holds no prepared shards (no manifest.json): run prepare again")


def test_half_precision_in_several_files_is_read_without_a_vocabulary(llama, tmp_path, command):
    arrays = load_file(llama / "model.safetensors")
    names = sorted(arrays)
    places = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    waves = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
    for i, more in enumerate((waves, {})):
        half = {name: arrays[name].astype(ml_dtypes.bfloat16) for name in names[i::2]}
        save_file(half | more, tmp_path / f"model-{i}.safetensors")
    places |= dict.fromkeys(waves, "model-0.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    shutil.copy(llama / "config.json", tmp_path)
    summary = json.loads(command("import", f"--pretrained={tmp_path}"))
    assert summary["files"] == ["model-0.safetensors", "model-1.safetensors"]
    assert summary["dtype"] == "bfloat16, float32"
    assert summary["skipped"] == list(waves)
    message = command("import", f"--pretrained={tmp_path}", f"--workdir={tmp_path}/run", code=66)
    assert "holds no vocabulary" in message


def test_a_head_that_is_missing_is_made_and_told(saved, tmp_path, command):
    bert, _ = saved("masked")
    (tmp_path / "given.json").write_text(
        json.dumps({"data": {"source": "synthetic", "labels": LABELS, "seq_len": 32}, "task": {"objective": "tagging"}})
    )
    flags = [f"--pretrained={bert}", f"--config={tmp_path}/given.json", f"--workdir={tmp_path}/run"]
    summary = json.loads(command("import", *flags))
    assert summary["fresh"] == ["top.bias", "top.head"]
    assert "cls.predictions.bias" in summary["skipped"]
    tags = json.loads(command("generate", f"--workdir={tmp_path}/run", "--prompt=a cat", "--json"))["tags"]
    assert {tag.rpartition("/")[-1] for tag in tags} <= set(LABELS)


def test_nothing_that_is_there_is_written_over(llama, tmp_path, command):
    command("import", f"--pretrained={llama}", f"--workdir={tmp_path}/run")
    message = command("import", f"--pretrained={llama}", f"--workdir={tmp_path}/run", code=2)
    assert message == f"{tmp_path}/run holds a run already: choose another --workdir"
    shutil.rmtree(tmp_path / "run" / "checkpoints")  # what a kill before the end of the first leaves behind
    command("import", f"--pretrained={llama}", f"--workdir={tmp_path}/run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    manifest = tmp_path / "run" / "data" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"settings": {"data.source": "files"}}))
    command("import", f"--pretrained={llama}", f"--workdir={tmp_path}/run", code=2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "import needs --pretrained=DIR, the model to read"),
        (["--pretrained={llama}", "--check", "--tolerance=0"], "--tolerance must be positive, got 0.0"),
    ],
)
def test_what_import_lacks_is_told(flags, message, llama, command):
    assert command("import", *(flag.format(llama=llama) for flag in flags), code=2) == message


# References.


@jax.jit
def outputs(model, batch):
    """Hidden states by place, and logits."""
    return dict(parity.hidden_states(model, batch)), model.logits(model.features(batch, backend=attention.XLA))


def reference(path, made, objective):
    """What a model says of random rows, in a file."""
    model = made.config
    rng = np.random.default_rng(0)
    tokens_BT = rng.integers(0, 300, (2, 20))
    segments_BT = (np.arange(20)[None] < np.array([[20], [13]])).astype(np.int32)
    arrays = {"input_ids": tokens_BT, "attention_mask": segments_BT}
    if model.family == "encoder_decoder":
        written_BT = rng.integers(0, 300, (2, 16)).astype(np.int64)
        arrays["decoder_input_ids"] = written_BT
        source = {"source_BS": tokens_BT, "source_segments_BS": segments_BT}
        batch = parity._batch(written_BT, np.ones_like(written_BT), **source)
    else:
        batch = parity._batch(tokens_BT, segments_BT)
    names = dict(parity._hidden_names(model))
    found, logits = jax.tree.map(np.asarray, outputs(made, batch))
    arrays |= {names[place]: x_BTD for place, x_BTD in found.items() if place in names}
    logits = logits[..., :300]
    # The library writes the memory of an array, whatever its strides are.
    arrays["logits"] = np.ascontiguousarray(logits[:, 0] if objective == "classification" else logits)
    save_file(arrays, path)
    return arrays


@pytest.fixture(scope="module")
def references(saved, tmp_path_factory):
    """`references(objective)`: the file with what the saved model says, and its arrays."""

    @functools.cache
    def references(objective):
        path = tmp_path_factory.mktemp(objective) / "reference.safetensors"
        return path, reference(path, saved(objective)[1], objective)

    return references


CHECKED = ["causal", "classification", "qa", "seq2seq"]
TAMPERED = [
    ("causal", "model.layers.1.mlp.down_proj.weight", "layer 1"),
    ("causal", "model.norm.weight", "layer 2 + final norm"),
    ("classification", "bert.embeddings.LayerNorm.bias", "embeddings"),
    ("classification", "classifier.bias", "the output layer"),
    ("qa", "qa_outputs.weight", "the output layer"),
    ("seq2seq", "encoder.block.1.layer.0.SelfAttention.o.weight", "encoder layer 1"),
    ("seq2seq", "decoder.block.2.layer.1.EncDecAttention.o.weight", "decoder layer 2 + final norm"),
    *(
        pytest.param(*case, marks=pytest.mark.exhaustive)
        for case in (
            ("classification", "bert.encoder.layer.2.attention.self.value.bias", "layer 2"),
            ("qa", "bert.encoder.layer.0.output.dense.weight", "layer 0"),
            ("seq2seq", "lm_head.weight", "the output layer"),
        )
    ),
]


@pytest.mark.parametrize("objective", CHECKED)
def test_a_reference_is_met(objective, saved, references, command):
    directory, _ = saved(objective)
    path, arrays = references(objective)
    flags = [f"--reference={path}", "--tolerance=1e-4"]
    found = json.loads(command("import", f"--pretrained={directory}", *flags))["check"]
    assert found["name"] == str(path) and found["parts_at"] is None
    assert found["max_difference"] < 1e-4 and found["top1"] == 1.0 and 0 <= found["kl"] < 1e-6
    assert len(found["layers"]) == sum("hidden_states" in name for name in arrays)
    assert max(found["layers"].values()) < 1e-4


@pytest.mark.parametrize(("objective", "name", "place"), TAMPERED)
def test_a_reference_parts_exactly_where_a_weight_was_tampered_with(
    objective, name, place, saved, references, tmp_path, command
):
    shutil.copytree(saved(objective)[0], tmp_path / "tampered")
    tamper(tmp_path / "tampered", name)
    flags = [f"--reference={references(objective)[0]}", "--tolerance=1e-4"]
    message = command("import", f"--pretrained={tmp_path}/tampered", *flags, code=65)
    told = message.partition("they first part at ")[2]
    assert told == place or told.startswith(f"{place} (by "), message


def test_what_parts_is_not_kept_and_says_by_how_much(llama, references, tmp_path, capsys):
    shutil.copytree(llama, tmp_path / "model")
    tamper(tmp_path / "model", "model.layers.1.self_attn.v_proj.weight", 1.0)
    flags = [f"--pretrained={tmp_path}/model", f"--reference={references('causal')[0]}"]
    with pytest.raises(SystemExit) as stop:
        main(["import", *flags, f"--workdir={tmp_path}/run"])
    output = capsys.readouterr()
    *table, message = output.err.splitlines()
    assert stop.value.code == 65
    found = json.loads(output.out)["check"]
    assert found["parts_at"] == "layer 1" and found["max_difference"] > 1e-3
    assert message.startswith(f"lslm: {tmp_path}/model: logits differ by ") and "(tolerance 0.001)" in message
    places = ["embeddings", "layer 0", "layer 1", "layer 2 + final norm", "logits"]
    assert [line.split("  ")[1] for line in table[-5:]] == places
    assert not (tmp_path / "run" / "checkpoints").exists()


FAULTS = {
    "no tokens": ({"input_ids": None}, "has no input_ids"),
    "no logits": ({"logits": None}, "has no logits"),
    "tokens beyond the vocabulary": ({"input_ids": np.full((2, 20), 300)}, "input_ids holds 300, this model knows 0"),
    "tokens that are no numbers": ({"input_ids": np.ones((2, 20), "f4")}, "input_ids is float32[2, 20], not rows of"),
    "a mask of another shape": ({"attention_mask": np.ones((2, 19), int)}, "attention_mask is [2, 19] where"),
    "padding in front": ({"attention_mask": np.eye(20, dtype=int)[[3, 3]]}, "has padding before tokens"),
    "longer rows than it reads": (
        {"input_ids": np.ones((1, 65), int), "attention_mask": None},
        "has rows of 65 tokens, the model reads 64 at most",
    ),
    "logits of another vocabulary": ({"logits": np.ones((2, 20, 299), "f4")}, "logits are [2, 20, 299] where the"),
    "logits that are not finite": (
        {"logits": np.full((2, 20, 300), np.inf, "f4")},
        "holds numbers that are not finite",
    ),
    "hidden states of another width": (
        {"hidden_states.1": np.ones((2, 20, 31), "f4")},
        "hidden state of layer 0 is [2, 20, 31] where the model's is [2, 20, 32]",
    ),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_a_reference_that_cannot_be_one_is_told_in_a_line(changes, message, llama, references, tmp_path, command):
    path = tmp_path / "reference.safetensors"
    _, arrays = references("causal")
    save_file({name: array for name, array in (arrays | changes).items() if array is not None}, path)
    found = command("import", f"--pretrained={llama}", f"--reference={path}", code=65)
    assert found.startswith(str(path)) and message in found


def test_a_reference_that_is_not_there_is_told(llama, command):
    message = command("import", f"--pretrained={llama}", "--reference=/nowhere/a.safetensors", code=66)
    assert message == "reference /nowhere/a.safetensors does not exist"


# Directories of strangers.


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[:-100])


def lie(path, change):
    """Changes the header of a file, whatever follows from it."""
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])


def grow(header):
    header["model.norm.weight"]["shape"] = [1 << 40]


def shift(header):
    header["model.norm.weight"]["data_offsets"] = [0, 128]


def index(directory, name):
    (directory / "model.safetensors").unlink()  # which would count
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))


def pickle_only(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def say(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


HOSTILE = {
    "a size that lies": (lambda d: lie(d / "model.safetensors", grow), 65, "not those of F32"),
    "offsets that lie": (lambda d: lie(d / "model.safetensors", shift), 65, "does not begin where the tensor before"),
    "a truncated file": (lambda d: cut(d / "model.safetensors"), 65, "bytes where its header promises"),
    "a path out of the directory": (lambda d: index(d, "../../etc/passwd"), 65, "names '../../etc/passwd', which is"),
    "a shard that is not there": (lambda d: index(d, "gone.safetensors"), 66, "names gone.safetensors, which is"),
    "pickled weights": (pickle_only, 66, "pickled weights can run code, so they are never opened"),
    "another vocabulary than the weights": (lambda d: say(d, vocab_size=512), 65, "rows where config.json says vocab_"),
    "a smaller one": (lambda d: say(d, vocab_size=299), 65, "has 300 rows where config.json says vocab_size=299"),
    "another width": (lambda d: say(d, hidden_size=64, head_dim=16), 65, "where config.json makes it"),
    "no use": (lambda d: say(d, architectures=["LlamaModel"]), 2, "does not say what its model is for"),
    "code of its own": (lambda d: say(d, model_type="custom", auto_map={"AutoModel": "a.B"}), 2, "not supported"),
    "no number": (lambda d: say(d, hidden_size={}), 2, "config.json: hidden_size={} is not int"),
    "not JSON": (lambda d: (d / "config.json").write_text("{"), 65, "is not JSON"),
}


@pytest.mark.parametrize(("change", "code", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_directory_is_refused_in_one_line(change, code, message, llama, tmp_path, command):
    directory = tmp_path / "hostile"
    shutil.copytree(llama, directory)
    change(directory)
    assert message in command("import", f"--pretrained={directory}", code=code)


def test_a_head_that_pools_otherwise_than_its_family_is_not_exported(tmp_path):
    bert = fill_sizes(replace(MODELS["classification"][0], pool="mean"))
    for objective in ("classification", "regression"):
        with pytest.raises(ConfigError, match=r"bert has no model\.pool=mean"):
            export.family_of(bert, objective)
    assert export.family_of(bert, "tagging").model_type == "bert"  # which looks at each token
    sizes = SIZES | {"num_labels": 3}
    for pool, theirs in (("mean", "mean"), ("first", "cls")):
        modern = fill_sizes(replace(model_configs.modern_encoder_base, **sizes, d_ff=64, pool=pool))
        family = export.family_of(modern, "classification")
        assert family.model_type == "modernbert" and family.write(modern)["classifier_pooling"] == theirs
