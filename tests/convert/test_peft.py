"""Adapters of the PEFT package, in and out: what it writes we read, what we write it reads, and both say the same."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from test_parity import CASES, example, make, our_outputs, their_outputs

from lslm_jax.config import Config, TaskConfig
from lslm_jax.convert import peft as ours_peft
from lslm_jax.convert import pretrained, safetensors_io
from lslm_jax.errors import ConfigError
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import make_mesh
from lslm_jax.runtime.pytree import flatten, unflatten
from lslm_jax.train.train_state import abstract_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")  # what peft calls, they are to remove

TARGETS = {  # of theirs and of ours: three projections in one, in turn by head, one each; beside a head; of pairs
    "gpt2": (["c_attn", "mlp.c_proj"], ("attention.[qkv]", "mlp.down")),
    "pythia": (["query_key_value", "attention.dense"], ("attention.*",)),
    "qwen3": (["q_proj", "v_proj", "o_proj", "gate_proj"], ("attention.[qvo]", "mlp.gate")),
    "bert-classification": (["query", "intermediate.dense"], ("attention.q", "mlp.up")),
    "t5": (["q", "wo"], ("attention.q", "cross.q", "mlp.down")),
    "flan-t5": (["q", "wi_0"], ("attention.q", "cross.q", "mlp.gate")),  # and not wi_1
}
cases = pytest.mark.parametrize("name", TARGETS)


def load(directory, case, labels, **lora):
    """A model of ours from a directory of theirs, with adapters of its own or without."""
    source = pretrained.describe(directory)
    source = source._replace(model=replace(source.model, num_labels=labels, dropout=0.0))
    model = replace(source.model, **lora)
    config = Config(model=model, task=TaskConfig(objective=case.objective))
    with jax.set_mesh(make_mesh(config)):
        fresh = build_model(model, jax.random.key(1), case.objective) if lora else None
        abstract = abstract_model(config, make_mesh(config))
        fresh = fresh and jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), fresh, abstract)
        return source, pretrained.load(source, case.objective, fresh or abstract, fresh).model


def labels_of(case):
    return 5 if case.objective == "classification" else 0


def outputs(model, case, batch):
    on_device = jax.tree.map(jnp.asarray, batch)
    return np.asarray(jax.jit(lambda model: our_outputs(model, case, on_device)[1])(model))


def compared(ours, theirs, case, batch):
    with torch.no_grad():
        expected = their_outputs(theirs.eval(), case, batch)[0].numpy()
    rows = batch.weights_BT > 0
    np.testing.assert_allclose(ours[..., : expected.shape[-1]][rows], expected[rows], atol=1e-5)


@cases
def test_what_peft_writes_is_read_into_the_weights_or_into_adapters_of_as_many_ranks_or_more(name, tmp_path):
    case, (theirs_targets, ours_targets) = CASES[name], TARGETS[name]
    make(case).save_pretrained(tmp_path / "base")
    base = type(make(case)).from_pretrained(tmp_path / "base", attn_implementation="eager")
    task = {"classification": "SEQ_CLS", "seq2seq": "SEQ_2_SEQ_LM"}.get(case.objective, "CAUSAL_LM")
    rank = {"rank_pattern": {theirs_targets[0]: 2}, "alpha_pattern": {theirs_targets[0]: 5}}
    turned = {"fan_in_fan_out": name == "gpt2"}  # of its Conv1D; without, they warn
    settings = peft.LoraConfig(task_type=task, r=3, lora_alpha=7, target_modules=theirs_targets, **rank, **turned)
    theirs = peft.get_peft_model(base, settings)
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "adapter")
    merged_source, merged = load(tmp_path / "adapter", case, labels_of(case))
    batch = example(case, merged_source.model)
    compared(outputs(merged, case, batch), theirs, case, batch)

    more = {"lora_rank": 4, "lora_alpha": 3.0, "lora_targets": ours_targets}
    adapted = load(tmp_path / "adapter", case, labels_of(case), **more)[1]
    compared(outputs(adapted, case, batch), theirs, case, batch)
    with pytest.raises(ConfigError, match=r"has rank 3: set model\.lora_rank=3 or more"):
        load(tmp_path / "adapter", case, labels_of(case), **more | {"lora_rank": 2})
    with pytest.raises(ConfigError, match=r"name it in model\.lora_targets"):
        load(tmp_path / "adapter", case, labels_of(case), **more | {"lora_targets": ("mlp.up",)})


@cases
def test_what_is_trained_here_peft_reads(name, tmp_path):
    case, (_, targets) = CASES[name], TARGETS[name]
    make(case).save_pretrained(tmp_path / "base")
    keys = {"lora_rank": 3, "lora_alpha": 5.0, "lora_targets": targets}
    source, model = load(tmp_path / "base", case, labels_of(case), **keys)
    key = jax.random.key(2)
    changed = {
        name: array + 0.2 * jax.random.normal(jax.random.fold_in(key, i), array.shape)
        for i, (name, array) in enumerate(flatten(model).items())
        if ".lora." in name or name.startswith("top.")
    }
    model = unflatten(model, flatten(model) | changed)
    config = replace(source.model, **keys)
    out = epath.Path(tmp_path / "adapter")
    ours_peft.export(out, model, source.family, config, case.objective, str(tmp_path / "base"))
    theirs = type(make(case)).from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(theirs, out)
    placed = {name for name in theirs.state_dict() if ".lora_A." in name}
    written = {name for name in safetensors_io.read_header(out / ours_peft.WEIGHTS) if ".lora_A." in name}
    assert {name.replace(".default.", ".") for name in placed} == written, "exactly the projections that have one"
    batch = example(case, source.model)
    compared(outputs(model, case, batch), theirs, case, batch)
    again = load(out, case, labels_of(case))[1]
    np.testing.assert_allclose(outputs(again, case, batch), outputs(model, case, batch), atol=1e-5)


CHANGES = {  # what is trained beside a tied Llama: whole modules, or its embedding by an adapter
    "head": {"modules_to_save": ["lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "both": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "adapted embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "adapted embedding alone": {"target_modules": ["embed_tokens"]},
    "rslora of some layers": {"use_rslora": True, "layers_to_transform": [1]},
}


def randomized(theirs):
    with torch.no_grad():
        for parameter in theirs.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return theirs


@pytest.mark.filterwarnings("ignore::UserWarning:peft")  # that ties are complicated
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["smollm2", "llama2"])  # tied and not
def test_embedding_and_output_layer_are_those_of_peft(name, change, tmp_path):
    case = CASES[name]
    make(case).save_pretrained(tmp_path / "base")
    base = type(make(case)).from_pretrained(tmp_path / "base", attn_implementation="eager")
    settings = {"target_modules": ["q_proj"], "r": 3, "lora_alpha": 7} | CHANGES[change]
    theirs = randomized(peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", **settings)))
    theirs.save_pretrained(tmp_path / "adapter")
    again = type(make(case)).from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = peft.PeftModel.from_pretrained(again, tmp_path / "adapter")  # as it will be read
    source, model = load(tmp_path / "adapter", case, 0)
    assert source.model.tie_embeddings == (name == "smollm2" and "rslora" in change)
    compared(outputs(model, case, example(case, source.model)), theirs, case, example(case, source.model))


@pytest.mark.parametrize("start", ["pissa", "olora"])
def test_an_adapter_that_begins_by_changing_the_model_is_refused(start, tmp_path):
    case = CASES["llama2"]
    make(case).save_pretrained(tmp_path / "base")
    base = type(make(case)).from_pretrained(tmp_path / "base")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", r=3, target_modules=["q_proj"], init_lora_weights=start)
    peft.get_peft_model(base, settings).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"init_lora_weights='{start}' change the model's own weights"):
        pretrained.describe(tmp_path / "adapter")
