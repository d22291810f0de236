"""The real train step, lowered for GPUs and TPUs on a machine that has neither: the fused kernels are in it.

Counted in the program that XLA is given. Under scan the layers' kernels stand there once.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from lslm_jax.batch import Batch
from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config_checks import validate
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.sharding import batch_sharding, make_mesh
from lslm_jax.train import optim, state, step

B, T = 8, 384  # no other size is 384, so that 384x384 can only be attention
FORWARD, BACKWARD = "__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"
CONFIG = validate(
    Config(
        model=ModelConfig(
            num_layers=3,
            d_model=256,
            num_heads=4,
            num_kv_heads=2,
            vocab_size=512,
            max_length=T,
            positions="rotary",
            dtype="bfloat16",
        ),
        data=DataConfig(source="synthetic", seq_len=T),
        train=TrainConfig(batch_size=B),
        mesh=MeshConfig(data=1),
    )
)


def lowered(backend, platform, packed=False, mesh=None, **model):
    """Text of the train step of CONFIG, with the model changed, for a platform."""
    config = replace(CONFIG, model=replace(CONFIG.model, **model), mesh=mesh or CONFIG.mesh)
    mesh = make_mesh(config, jax.devices() if config.mesh.data == -1 else jax.devices()[:1])
    optimizer = optim.make_optimizer(config.optimizer, config.train.steps)
    ids_BT = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=batch_sharding(mesh))
    weights_BT = jax.ShapeDtypeStruct((B, T), jnp.float32, sharding=batch_sharding(mesh))
    batch = Batch(ids_BT, ids_BT, weights_BT, *((ids_BT, ids_BT) if packed else ()))
    train_step = jax.jit(step.make_train_step(config, optimizer, backend), donate_argnums=0)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD, BACKWARD)]
    with jax.set_mesh(mesh):
        abstract = state.abstract_state(config, optimizer, mesh)
        exported = jax.export.export(train_step, platforms=[platform], disabled_checks=unchecked)(abstract, batch)
    return exported.mlir_module()


def calls(text):
    """How often cuDNN's attention is called forward and backward."""
    targets = re.findall(r"custom_call @([\w$]+)", text)
    return targets.count(FORWARD), targets.count(BACKWARD)


@pytest.fixture
def hopper(monkeypatch):
    """Answers what JAX asks the GPU and its cuDNN before it lowers their attention."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 92300)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)


@pytest.mark.parametrize(
    ("packed", "model", "expected"),
    [
        (False, {}, (1, 1)),
        (False, {"num_kv_heads": 4}, (1, 1)),
        (False, {"window": 100}, (1, 1)),
        (True, {}, (1, 1)),
        (True, {"window": 100}, (1, 1)),
        (False, {"scan_layers": False}, (3, 3)),
        (False, {"remat": "save_attention"}, (1, 1)),
        (True, {"remat": "save_attention"}, (1, 1)),
        (False, {"remat": "full"}, (2, 1)),
        (False, {"remat": "dots"}, (2, 1)),
    ],
)
def test_on_gpus_attention_is_one_fused_call_without_mask_or_scores_in_memory(hopper, packed, model, expected):
    text = lowered(Backend("cudnn", "", max_segments=16 if packed else 0), "cuda", packed, **model)
    assert calls(text) == expected
    assert "fmhaScaleBias" not in text
    assert f"{T}x{T}" not in text
    if model.get("window"):
        assert re.search(r"sliding_window_length\W+22: 100\b", text)
    assert ("PADDING_CAUSAL" in text) == packed


def test_the_reference_is_what_those_checks_would_catch():
    text = lowered(attention.XLA, "cuda")
    assert calls(text) == (0, 0)
    assert f"{T}x{T}" in text


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
@pytest.mark.parametrize("mesh", [MeshConfig(data=1), MeshConfig(data=-1, fsdp=2, tensor=2)], ids=["one", "mesh"])
def test_on_tpus_attention_is_a_pallas_kernel_on_each_devices_rows_and_heads(packed, mesh):
    text = lowered(Backend("splash", "", max_segments=16 if packed else 0), "tpu", packed, mesh, window=100)
    rows, heads, kv_heads = (8, 4, 2) if mesh.data == 1 else (2, 2, 1)
    assert len(kernels(text)) == 2  # forward, and one backward for queries, keys and values
    for operands in kernels(text):
        assert f"tensor<{rows}x{heads}x{T}x64xbf16>" in operands
        assert f"tensor<{rows}x{kv_heads}x{T}x64xbf16>" in operands
        assert bool(re.search(rf"tensor<{rows}x({T}x\d+|\d+x{T})xi32>", operands)) == packed
    assert not re.search(rf"{T}x{T}x(f32|bf16)", text)


@pytest.mark.parametrize(("remat", "expected"), [("save_attention", 2), ("full", 3), ("dots", 3)])
def test_on_tpus_only_save_attention_spares_the_second_forward_pass(remat, expected):
    assert len(kernels(lowered(Backend("splash", ""), "tpu", remat=remat))) == expected


def kernels(text):
    """Types of the operands of each Pallas kernel."""
    return re.findall(r"@tpu_custom_call\(.*\) \{.*\} : \((.*?)\) ->", text)
