"""Hugging Face directories in and out, by the commands a user types; and those that cannot be used, told in a line."""

import contextlib
import io
import json
import shutil
from dataclasses import replace

import jax
import numpy as np
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

from lslm_jax.config import Config, MeshConfig, ModelConfig, TaskConfig, TrainConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.convert import export, pretrained, state_dict
from lslm_jax.convert.hf_mapping import differences
from lslm_jax.errors import ConfigError, LslmError
from lslm_jax.main import main
from lslm_jax.models import model_configs
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.train_state import abstract_model

BODY = {"num_layers": 2, "d_model": 32, "num_heads": 2, "max_length": 64}
LLAMA = BODY | {"positions": "rotary", "norm": "rmsnorm", "activation": "silu", "gated": True, "bias": False}
REST = {
    "optimizer": {"learning_rate": 3e-3, "warmup_steps": 5},
    "checkpoint": {"every": 1000},
    "eval": {"every": 0},
    "log": {"tensorboard": False},
    "generate": {"temperature": 0.0, "max_tokens": 24},
}
RUNS = {
    "decoder": {"model": LLAMA | {"qk_norm": "head"}},
    "encoder": {"model": BODY | {"family": "encoder"}, "task": {"objective": "masked"}},
    "encoder_decoder": {"model": BODY | {"family": "encoder_decoder"}, "task": {"objective": "seq2seq"}},
}

STEPS = {"decoder": 30, "encoder": 12, "encoder_decoder": 12}  # the decoder is good enough to train adapters beside it


def trained(workdir, command, *arguments, **sections):
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "given.json").write_text(json.dumps(REST | sections))
    return json.loads(command(f"--config={workdir}/given.json", f"--workdir={workdir}", *arguments))


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    root = tmp_path_factory.mktemp("texts")
    lines = [f"the {animal} sat on mat {i} and looked at the cow" for i in range(60) for animal in ("cat", "dog")]
    (root / "a.txt").write_text("\n".join(lines) + "\n")
    (root / "b.txt").write_text("\n".join(line.upper() for line in lines) + "\n")
    (root / "reversed.txt").write_text("\n".join(" ".join(line.split()[::-1]) for line in lines) + "\n")
    return root


def train_and_export(kind, vocabulary, texts, directory, command):
    """Trains a run of a family and exports it: the run directory, the exported one, the summary of the export."""
    pair = {"files": [f"{texts}/a.txt", f"{texts}/b.txt"], "example": "pair"}
    data = pair if kind == "encoder_decoder" else {"files": [f"{texts}/a.txt"]}
    given = (
        {"kind": "bytes"}
        if vocabulary == "bytes"
        else {"model": vocabulary, "vocab_size": 293 if vocabulary == "unigram" else 300}
    )
    sections = RUNS[kind] | {"data": {"document": "line", "seq_len": 64} | data, "tokenizer": given}
    if kind == "encoder_decoder":
        preset = {"positions": "relative", "norm": "rmsnorm", "norm_eps": 1e-6, "bias": False, "attention_scale": 1.0}
        preset |= {"activation": "gelu", "gated": True, "tie_embeddings": False, "init": "fan_in"}
        sections |= {"model": sections["model"] | preset, "data": sections["data"] | {"packing": "bins"}}
    if kind == "encoder":
        preset = {"norm_place": "after", "embed_norm": True, "activation": "gelu_exact", "token_types": 2}
        sections |= {"model": sections["model"] | preset | {"output_bias": True, "norm_eps": 1e-12}}
    run, out = directory / "run", directory / "out"
    trained(run, command, **sections, train={"steps": STEPS[kind], "batch_size": 16})
    return run, out, json.loads(command("export", f"--workdir={run}", f"--to={out}"))


@pytest.fixture(scope="module")
def decoder(texts, tmp_path_factory):
    """A trained decoder with a BPE tokenizer and its export, which the tests must not change."""

    def command(*arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output), pytest.raises(SystemExit) as stop:
            main(list(arguments))
        assert stop.value.code == 0
        return output.getvalue()

    return train_and_export("decoder", "bpe", texts, tmp_path_factory.mktemp("decoder"), command)


@pytest.mark.parametrize(
    ("kind", "vocabulary"),
    [
        ("decoder", "bpe"),
        # tests/data/test_to_hf.py compares ids and texts of all three kinds with those of the exported files.
        pytest.param("decoder", "unigram", marks=pytest.mark.exhaustive),
        pytest.param("decoder", "bytes", marks=pytest.mark.exhaustive),
        ("encoder", "bpe"),
        ("encoder_decoder", "bpe"),
    ],
)
def test_an_exported_model_says_what_the_run_says(kind, vocabulary, texts, tmp_path, command, request):
    if (kind, vocabulary) == ("decoder", "bpe"):
        run, out, summary = request.getfixturevalue("decoder")
    else:
        run, out, summary = train_and_export(kind, vocabulary, texts, tmp_path, command)
    assert summary["step"] == STEPS[kind] and set(summary["files"]) == {path.name for path in out.iterdir()}
    tensors = load_file(out / "model.safetensors")
    assert summary["model_type"] == json.loads((out / "config.json").read_text())["model_type"]
    assert sum(array.size for array in tensors.values()) <= summary["parameters"]

    prompt = "the c[MASK]t sat" if kind == "encoder" else "the cat sat on"
    [ours, theirs] = [
        json.loads(command("generate", f"--prompt={prompt}", "--json", "--config.generate.max_tokens=24", *flags))
        for flags in ((f"--workdir={run}",), (f"--pretrained={out}",))
    ]
    assert theirs.pop("step") == 0 and ours.pop("step") == STEPS[kind]
    assert theirs == ours

    adapter = command("export", f"--workdir={run}", f"--to={tmp_path}/adapter", "--adapter", code=2)
    assert adapter == "this run has no adapters (model.lora_rank=0): leave out --adapter"


@pytest.mark.exhaustive
def test_a_trained_llama_goes_on_from_its_weights_and_back(shared, texts, tmp_path, command):
    stories = shared / "models" / "stories260K"
    data = {"files": [f"{texts}/a.txt"], "document": "line", "seq_len": 64, "valid_fraction": 0.2}
    untrained = json.loads(
        command(
            "evaluate",
            f"--pretrained={stories}",
            f"--workdir={tmp_path}/zero",
            f"--config={given(tmp_path, data=data)}",
        )
    )
    result = trained(
        tmp_path / "run", command, f"--pretrained={stories}", data=data, train={"steps": 20, "batch_size": 16}
    )
    assert untrained["eval/loss"] - 1.0 > result["eval/loss"]
    adapter = command("export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/out", "--adapter", code=2)
    assert adapter == "this run has no adapters (model.lora_rank=0): leave out --adapter"
    command("export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/out")
    assert pretrained.describe(tmp_path / "out").family.model_type == "llama"
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(stories)


def test_the_vocabulary_of_others_is_given_back(shared, tmp_path, command):
    stories = shared / "models" / "stories260K"
    command("import", f"--pretrained={stories}", f"--workdir={tmp_path}/run")
    command("export", f"--workdir={tmp_path}/run", f"--to={tmp_path}/out")
    assert pretrained.describe(tmp_path / "out").family.model_type == "llama"
    assert tokenizer_of(tmp_path / "out") == tokenizer_of(stories)


def tokenizer_of(directory):
    return json.loads((directory / "tokenizer.json").read_text())


def test_adapters_are_trained_beside_a_model_and_leave_alone_or_merged(decoder, texts, tmp_path, command):
    _, base, base_summary = decoder
    data = {"files": [f"{texts}/reversed.txt"], "document": "line", "seq_len": 64, "valid_fraction": 0.2}
    # The learning rate of the first step is 0 and no other depends on their number: both trainings below are one
    # program, and one step changes nothing.
    optimizer = {"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 1}
    few = {"data": data, "model": {"lora_rank": 4}, "optimizer": optimizer}
    zero = [f"--workdir={tmp_path}/zero", f"--config={given(tmp_path, data=data)}"]
    untrained = json.loads(command("evaluate", f"--pretrained={base}", *zero))
    run = tmp_path / "run"
    result = trained(run, command, f"--pretrained={base}", train={"steps": 40, "batch_size": 16}, **few)
    assert untrained["eval/loss"] - 0.3 > result["eval/loss"]
    small = json.loads(command("export", f"--workdir={run}", f"--to={tmp_path}/adapter", "--adapter"))
    assert set(small["files"]) == {"adapter_model.safetensors", "adapter_config.json"}
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert sum(array.size for array in adapters) < base_summary["parameters"] / 6
    merged = json.loads(command("export", f"--workdir={run}", f"--to={tmp_path}/merged"))
    assert merged["model_type"] == base_summary["model_type"]
    assert tokenizer_of(tmp_path / "merged") == tokenizer_of(base)

    prompt = ("--prompt=the cat sat on", "--config.generate.max_tokens=24", "--config.generate.temperature=0")
    spoken = [
        command("generate", *prompt, way)
        for way in (f"--workdir={run}", f"--pretrained={tmp_path}/adapter", f"--pretrained={tmp_path}/merged")
    ]
    assert spoken[0] == spoken[1] == spoken[2] != command("generate", *prompt, f"--pretrained={base}")

    # From the adapter training goes on where it was.
    one_step = {"steps": 1, "batch_size": 16}
    again = trained(tmp_path / "again", command, f"--pretrained={tmp_path}/adapter", train=one_step, **few)
    assert again["eval/loss"] == pytest.approx(result["eval/loss"], abs=1e-4)
    command("export", f"--workdir={tmp_path}/again", f"--to={tmp_path}/adapter2", "--adapter")
    config = json.loads((tmp_path / "adapter2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base), "that of the adapter it went on with"


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"peft_type": "IA3"}, 2, "adapters of type IA3 are not supported, only LORA"),
        ({"use_dora": True}, 2, "adapters with use_dora=True are not supported, only False"),
        ({"base_model_name_or_path": None}, 2, "does not say base_model_name_or_path"),
        ({"base_model_name_or_path": "away"}, 66, "was trained on away, which is not here"),
    ],
)
def test_an_adapter_that_cannot_be_used_is_told_in_one_line(changes, code, message, tmp_path, command):
    settings = {"peft_type": "LORA", "base_model_name_or_path": "base"} | changes
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert message in command("generate", f"--pretrained={tmp_path}", "--prompt=x", code=code)


def given(directory, **sections):
    (directory / "given.json").write_text(json.dumps(REST | sections))
    return directory / "given.json"


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_weights_go_straight_to_their_places_on_any_mesh(mesh, shared):
    source = pretrained.describe(shared / "models" / "stories260K")
    config = Config(model=source.model, mesh=MeshConfig(**mesh), train=TrainConfig(batch_size=8))
    whole, parts = (
        flatten(pretrained.load(source, "causal", abstract_model(config, make_mesh(config, devices))).model)
        for config, devices in ((Config(model=source.model), jax.devices()[:1]), (config, None))
    )
    assert parts["blocks.mlp.up.w"].addressable_shards[0].data.size < whole["blocks.mlp.up.w"].size
    for name, array in whole.items():
        np.testing.assert_array_equal(parts[name], array, err_msg=name)


def test_half_precision_weights_are_read_exactly_and_a_body_may_lack_its_prefix(shared, tmp_path):
    stories = shared / "models" / "stories260K"
    shutil.copy(stories / "config.json", tmp_path)
    arrays = load_file(stories / "model.safetensors")
    halves = {name.removeprefix("model."): array.astype(np.float16) for name, array in arrays.items()}
    save_file(halves, tmp_path / "model.safetensors")
    source = pretrained.describe(tmp_path)
    config = Config(model=source.model)
    model = pretrained.load(source, "causal", abstract_model(config, make_mesh(config))).model
    expected = halves["layers.1.self_attn.q_proj.weight"].astype(np.float32).T
    np.testing.assert_array_equal(model.blocks.attention.q.w.get_value()[1].reshape(expected.shape), expected)


@pytest.mark.parametrize(
    "name", ["gpt2_small", "llama_8b", "bert_base", "modern_encoder_base", "t5_small", "t5_v1_1_small"]
)
def test_our_presets_have_a_family(name):
    model = fill_sizes(getattr(model_configs, name))
    model = model if model.vocab_size else fill_sizes(ModelConfig(**{**vars(model), "vocab_size": 50_257}))
    objective = {"encoder": "masked", "encoder_decoder": "seq2seq"}.get(model.family, "causal")
    family = export.family_of(model, objective)
    assert not differences(family.read(json.loads(json.dumps(family.write(model)))), model)


def test_a_model_that_no_family_has_is_refused_by_name():
    odd = fill_sizes(ModelConfig(vocab_size=100, norm="rmsnorm"))
    with pytest.raises(ConfigError, match=r"no family .* gpt2 has no model.norm=rmsnorm; llama has no"):
        export.family_of(odd, "causal")


BROKEN = {
    "another vocabulary": ({"vocab_size": 600}, 65, "model.embed_tokens.weight has 512 rows where config.json says"),
    "another width": (
        {"intermediate_size": 100},
        65,
        "makes it [64, 100] (vocab_size=512, max_position_embeddings=512, hidden_size=64",
    ),
    "more layers": ({"num_hidden_layers": 6}, 65, "num_hidden_layers=6"),
    "fewer layers": ({"num_hidden_layers": 4}, 65, "a llama like this has no place for 9 tensors: model.layers.4"),
    "biases": ({"attention_bias": True}, 2, "llama with attention_bias=True is not supported, only False"),
    "yarn": ({"rope_parameters": {"rope_type": "yarn"}}, 2, "rotary positions of type yarn are not supported"),
    "another family": ({"model_type": "mamba"}, 2, "models of type mamba are not supported, only gpt2, llama"),
    "no type": ({"model_type": None}, 2, "models of type None are not supported"),
    "an unknown activation": ({"hidden_act": "snake"}, 2, "hidden_act=snake is not among"),
    "text for a number": ({"hidden_size": "wide"}, 2, "config.json: hidden_size='wide' is not int"),
}


@pytest.mark.parametrize(("changes", "code", "message"), BROKEN.values(), ids=BROKEN)
def test_a_directory_that_contradicts_itself_is_told_in_one_line(changes, code, message, shared, tmp_path, command):
    for path in (shared / "models" / "stories260K").iterdir():
        shutil.copy(path, tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text()) | changes
    (tmp_path / "config.json").write_text(json.dumps(settings))
    assert message in command("generate", f"--pretrained={tmp_path}", "--prompt=a", code=code)


@pytest.mark.parametrize(
    ("gone", "code", "message"),
    [
        ("config.json", 66, "holds no config.json: it is not a pretrained model"),
        ("tokenizer.json", 66, "holds no vocabulary: none of tokenizer.json"),
        ("model.safetensors", 66, "holds no model.safetensors"),
    ],
)
def test_a_missing_file_is_told_in_one_line(gone, code, message, shared, tmp_path, command):
    for path in (shared / "models" / "stories260K").iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / gone).unlink()
    assert message in command("generate", f"--pretrained={tmp_path}", "--prompt=a", code=code)


def test_a_run_with_another_vocabulary_or_model_is_refused(shared, texts, tmp_path, command):
    stories = shared / "models" / "stories260K"
    data = {"files": [f"{texts}/a.txt"], "document": "line", "seq_len": 64}
    # Both runs initialize a model of one size: one program.
    model = LLAMA | {"vocab_size": 512}
    sections = {"data": data, "model": model, "train": {"steps": 1, "init_from": str(stories)}}
    config = given(tmp_path, **sections, tokenizer={"vocab_size": 300})
    message = command(f"--config={config}", f"--workdir={tmp_path}/a", code=76)
    assert "has another vocabulary" in message and message.endswith("set tokenizer.path to its own")
    path = {"kind": "huggingface", "path": f"{stories}/tokenizer.json"}
    config = given(tmp_path, **sections, tokenizer=path)
    message = command(f"--config={config}", f"--workdir={tmp_path}/b", code=76)
    assert message == f"{stories} has model.num_layers=5, unlike this run"


MALFORMED = {
    "a temperature": ("generation_config.json", {"do_sample": True, "temperature": "warm"}, "temperature='warm'"),
    "an end": ("generation_config.json", {"eos_token_id": ["</s>"]}, "eos_token_id=['</s>']"),
    "architectures": ("config.json", {"architectures": [None]}, "malformed"),
}


@pytest.mark.parametrize(("name", "changes", "message"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_setting_of_how_it_writes_is_told_in_one_line(name, changes, message, shared, tmp_path, command):
    for path in (shared / "models" / "stories260K").iterdir():
        shutil.copy(path, tmp_path)
    path = tmp_path / name
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | changes))
    assert message in command("generate", f"--pretrained={tmp_path}", "--prompt=a", code=2)


def test_settings_are_read_before_jax_is_needed(tmp_path):
    with pytest.raises(LslmError, match=r"holds no config\.json"):
        pretrained.describe(epath.Path(tmp_path))


def test_old_names_of_norms_and_heads_of_another_size_are_taken_for_what_they_are(tmp_path):
    model = fill_sizes(replace(model_configs.BERT, **BODY, vocab_size=100, num_labels=2))
    config = Config(model=model, task=TaskConfig(objective="classification"), train=TrainConfig(batch_size=8))
    mesh = make_mesh(config)
    abstract = lambda config: abstract_model(config, mesh)
    build = lambda config: jax.jit(lambda: build_model(config.model, jax.random.key(1), "classification"))()
    made = build(config)
    family = export.family_of(model, "classification")
    arrays = {
        name: source.make()
        for name, source in state_dict.sources(made, family, model, "classification", "float32").items()
    }
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    renamed = lambda name: next((name.replace(new, before) for new, before in old.items() if new in name), name)
    save_file({renamed(name): array for name, array in arrays.items()}, tmp_path / "model.safetensors")
    settings = export.export_settings(family, model, "classification", "float32", {"bos": 1, "eos": 2, "pad": 0})
    (tmp_path / "config.json").write_text(json.dumps(settings))
    source = pretrained.describe(tmp_path)
    loaded = flatten(pretrained.load(source, "classification", abstract(config)).model)
    for name, array in flatten(made).items():
        rows = 100 if name == "embed" else None
        np.testing.assert_array_equal(np.asarray(loaded[name])[:rows], np.asarray(array)[:rows], err_msg=name)
    more = replace(config, model=replace(model, num_labels=5))
    found = pretrained.load(source, "classification", abstract(more), build(more))
    assert found.fresh == ["top.bias", "top.head"]
    np.testing.assert_array_equal(found.model.top.pooler.dense.w.get_value(), made.top.pooler.dense.w.get_value())
