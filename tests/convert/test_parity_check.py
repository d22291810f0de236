"""`import --check`: what transformers says, compared layer by layer."""

import json
import shutil
import sys

import pytest
from safetensors.numpy import save_file
from test_import import tamper
from test_parity import CASES, make

from lslm_jax.cli import import_pretrained
from lslm_jax.config import Config, TaskConfig
from lslm_jax.convert import hf_reference, parity, pretrained
from lslm_jax.parallel.sharding import make_mesh

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

CHECKED = ["llama3", "gemma3", "smollm3", "roberta-masked", "bert-classification", "modernbert-qa", "flan-t5", "marian"]


@pytest.mark.parametrize("name", CHECKED)
def test_a_model_of_theirs_passes_at_every_layer(name, tmp_path, command):
    case = CASES[name]
    make(case).save_pretrained(tmp_path)
    found = json.loads(command("import", f"--pretrained={tmp_path}", "--check"))["check"]
    model = pretrained.describe(tmp_path).model
    assert found["name"] == f"transformers {transformers.__version__}" and found["sequences"] == 4
    assert found["max_difference"] < 1e-4 and found["top1"] == 1.0 and found["kl"] < 1e-7
    layers = [f"layer {i}" for i in range(model.num_layers)]
    places = ["embeddings", *layers]
    if model.family == "encoder_decoder":
        layers = [f"layer {i}" for i in range(model.num_decoder_layers)]
        places = [f"encoder {place}" for place in places] + [f"decoder {place}" for place in ["embeddings", *layers]]
    assert list(found["layers"]) == places
    assert max(found["layers"].values()) < 1e-4 and found["parts_at"] is None


TAMPERED = {
    "llama3": ("model.layers.1.self_attn.o_proj.weight", "layer 1"),
    "bert-classification": ("bert.encoder.layer.2.output.LayerNorm.bias", "layer 2"),
    "flan-t5": ("decoder.block.1.layer.2.DenseReluDense.wo.weight", "decoder layer 1"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_a_model_parts_from_theirs_at_the_layer_whose_weight_was_tampered_with(name, tmp_path):
    case, (tensor, place) = CASES[name], TAMPERED[name]
    make(case).save_pretrained(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "tampered")
    tamper(tmp_path / "tampered", tensor)
    source = pretrained.describe(tmp_path / "whole")
    reference = hf_reference.read(source, case.objective, parity.sample_rows(source, seed=0))
    source = pretrained.describe(tmp_path / "tampered")
    given = Config(model=source.model, task=TaskConfig(objective=case.objective))
    config = import_pretrained.with_labels(import_pretrained.settle(given, source))
    loaded, _ = import_pretrained.read(source, config, make_mesh(config))
    found = parity.compare(loaded.model, case.objective, reference, 1e-3)
    assert found.parts_at == place and not found.holds(1e-3)


def test_hidden_states_that_transformers_gives_are_a_reference(tmp_path, command):
    model = make(CASES["llama3"]).eval()
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 42).reshape(2, 20)
    with torch.no_grad():
        out = model(ids, output_hidden_states=True)
    hidden = {f"hidden_states.{i}": x_BTD.numpy().copy() for i, x_BTD in enumerate(out.hidden_states)}
    save_file({"input_ids": ids.numpy(), "logits": out.logits.numpy(), **hidden}, tmp_path / "reference.safetensors")
    flags = [f"--reference={tmp_path}/reference.safetensors", "--tolerance=1e-4"]
    found = json.loads(command("import", f"--pretrained={tmp_path}", *flags))["check"]
    assert (
        list(found["layers"]) == ["embeddings", "layer 0", "layer 1", "layer 2 + final norm"]
        and found["parts_at"] is None
    )


def test_without_the_packages_it_tells_which_are_missing(shared, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "transformers", None)
    message = command("import", f"--pretrained={shared}/models/stories260K", "--check", code=2)
    assert message.endswith("pip install torch transformers; or compare with --reference=FILE")
