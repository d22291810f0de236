"""The real train step, lowered for GPUs and TPUs on a machine that has neither: the fused kernels are in it.

Counted in the program that XLA is given. Under scan the layers' kernels stand there once.
"""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.data.batch import Batch
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend
from lslm_jax.models.build_model import build_model
from lslm_jax.parallel.sharding import batch_sharding, make_mesh, shardings_of
from lslm_jax.train import optimizers, train_state
from lslm_jax.train import train_step as step

exhaustive = pytest.mark.exhaustive  # lowering one step takes one to four seconds
B, T, S = 8, 384, 640  # no other sizes are 384 and 640, so that 384x384 can only be attention
ONE_DEVICE = MeshConfig(data=1)
MESH, EXPERT_MESH = MeshConfig(data=-1, fsdp=2, tensor=2), MeshConfig(data=-1, expert=4)
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
            scan_layers=True,
            positions="rotary",
            dtype="bfloat16",
        ),
        data=DataConfig(source="synthetic", seq_len=T),
        train=TrainConfig(batch_size=B),
        mesh=MeshConfig(data=1),
    )
)


def lowered(backend, platform, packed=False, mesh=None, length=T, **model):
    """Text of the train step of CONFIG, with the model changed, for a platform."""
    config = replace(CONFIG, model=replace(CONFIG.model, **model), mesh=mesh or CONFIG.mesh)
    mesh = make_mesh(config, jax.devices() if config.mesh.data == -1 else jax.devices()[:1])
    optimizer = optimizers.make_optimizer(config.optimizer, config.train.steps)
    ids_BT = jax.ShapeDtypeStruct((B, length), jnp.int32, sharding=batch_sharding(mesh, (B, length)))
    weights_BT = jax.ShapeDtypeStruct((B, length), jnp.float32, sharding=batch_sharding(mesh, (B, length)))
    batch = Batch(ids_BT, ids_BT, weights_BT, *((ids_BT, ids_BT) if packed else ()))
    train_step = jax.jit(step.make_train_step(config, optimizer, backend), donate_argnums=0)
    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD, BACKWARD)]
    with jax.set_mesh(mesh):
        abstract = train_state.abstract_state(config, optimizer, mesh)
        exported = jax.export.export(train_step, platforms=[platform], disabled_checks=unchecked)(abstract, batch)
    return exported.mlir_module()


def lowered_features(backend, platform, family, mesh=None, **model):
    """Text of the gradient of what a model of another family makes of padded rows, for a platform."""
    config = replace(CONFIG, mesh=mesh or CONFIG.mesh)
    config = replace(config, model=replace(CONFIG.model, family=family, **model))
    mesh = make_mesh(config, jax.devices() if config.mesh.data == -1 else jax.devices()[:1])
    ids_BT, ids_BS = (jax.ShapeDtypeStruct((B, n), jnp.int32, sharding=batch_sharding(mesh, (B, n))) for n in (T, S))
    segments = {"segments_BT": ids_BT} if backend.max_segments else {}
    batch = Batch(ids_BT, ids_BT, None, **segments)
    if family == "encoder_decoder":
        batch = batch._replace(source_BS=ids_BS, source_segments_BS=ids_BS if segments else None)

    def total(model, batch):
        return jnp.sum(model.features(batch, backend=backend).astype(jnp.float32))

    unchecked = [jax.export.DisabledSafetyCheck.custom_call(name) for name in (FORWARD, BACKWARD)]
    with jax.set_mesh(mesh):
        abstract = jax.eval_shape(lambda: build_model(config.model, jax.random.key(0), "masked"))
        abstract = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            abstract,
            shardings_of(abstract, mesh),
        )
        gradient = jax.jit(jax.grad(total))
        exported = jax.export.export(gradient, platforms=[platform], disabled_checks=unchecked)(abstract, batch)
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
        pytest.param(False, {"num_kv_heads": 4}, (1, 1), marks=exhaustive),
        (False, {"window": 100}, (1, 1)),
        pytest.param(True, {}, (1, 1), marks=exhaustive),
        (True, {"window": 100}, (1, 1)),
        (False, {"scan_layers": False}, (3, 3)),
        pytest.param(False, {"remat": "save_attention"}, (1, 1), marks=exhaustive),
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


@pytest.mark.parametrize(
    ("max_segments", "mask", "family"),
    [
        (0, "NO_MASK", "encoder"),
        (1, "PADDING", "encoder"),
        (16, "PADDING", "encoder_decoder"),
        pytest.param(0, "NO_MASK", "encoder_decoder", marks=exhaustive),
        pytest.param(1, "PADDING", "encoder_decoder", marks=exhaustive),
        pytest.param(16, "PADDING", "encoder", marks=exhaustive),
    ],
)
def test_on_gpus_encoders_and_cross_attention_are_fused_calls_too(hopper, family, max_segments, mask):
    text = lowered_features(Backend("cudnn", "", max_segments), "cuda", family)
    stacks = 3 if family == "encoder_decoder" else 1  # its encoder, and its decoder's two attentions
    assert calls(text) == (stacks, stacks)
    assert "fmhaScaleBias" not in text
    assert not re.search(f"{T}x({T}|{S})x|{S}x{S}x", text)
    masks = re.findall(r"mask_type\W+22: \W+22(\w+)", text)
    assert masks.count(mask) == 2 * (stacks - (stacks == 3))
    assert masks.count("PADDING_CAUSAL" if max_segments > 1 else "CAUSAL") == (2 if stacks == 3 else 0)


@pytest.mark.parametrize(
    ("mesh", "family"),
    [
        (ONE_DEVICE, "encoder"),
        (MESH, "encoder_decoder"),
        pytest.param(ONE_DEVICE, "encoder_decoder", marks=exhaustive),
        pytest.param(MESH, "encoder", marks=exhaustive),
    ],
    ids=["one-encoder", "mesh-encoder_decoder", "one-encoder_decoder", "mesh-encoder"],
)
def test_on_tpus_encoders_and_cross_attention_are_pallas_kernels_too(family, mesh):
    window = 100 if family == "encoder" else 0
    text = lowered_features(Backend("splash", "", max_segments=1), "tpu", family, mesh, window=window)
    assert len(kernels(text)) == (6 if family == "encoder_decoder" else 2)
    assert not re.search(rf"({T}x({T}|{S})|{S}x{S})x(f32|bf16)", text)
    assert any(f"x{S}x64xbf16>" in operands for operands in kernels(text)) == (family == "encoder_decoder")


def test_the_reference_is_what_those_checks_would_catch():
    text = lowered(attention.XLA, "cuda")
    assert calls(text) == (0, 0)
    assert f"{T}x{T}" in text


@pytest.mark.parametrize(
    ("mesh", "packed"),
    [
        (ONE_DEVICE, False),
        (MESH, True),
        pytest.param(ONE_DEVICE, True, marks=exhaustive),
        pytest.param(MESH, False, marks=exhaustive),
    ],
    ids=["one-plain", "mesh-packed", "one-packed", "mesh-plain"],
)
def test_on_tpus_attention_is_a_pallas_kernel_on_each_devices_rows_and_heads(packed, mesh):
    text = lowered(Backend("splash", "", max_segments=16 if packed else 0), "tpu", packed, mesh, window=100)
    rows, heads, kv_heads = (8, 4, 2) if mesh.data == 1 else (2, 2, 1)
    assert len(kernels(text)) == 2  # forward, and one backward for queries, keys and values
    for operands in kernels(text):
        assert f"tensor<{rows}x{heads}x{T}x64xbf16>" in operands
        assert f"tensor<{rows}x{kv_heads}x{T}x64xbf16>" in operands
        assert bool(re.search(rf"tensor<{rows}x({T}x\d+|\d+x{T})xi32>", operands)) == packed
    assert not re.search(rf"{T}x{T}x(f32|bf16)", text)


@pytest.mark.parametrize(
    ("remat", "expected"),
    [pytest.param("none", 2, marks=exhaustive), ("save_attention", 2), pytest.param("full", 3, marks=exhaustive)],
)
def test_on_tpus_each_device_attends_from_its_positions_to_all(remat, expected):
    mesh, length = MeshConfig(data=-1, context=2, tensor=2), 1536
    text = lowered(Backend("splash", "", max_segments=16), "tpu", True, mesh, length, window=100, remat=remat)
    assert len(kernels(text)) == expected
    for operands in kernels(text):
        assert f"tensor<4x2x{length // 2}x64xbf16>" in operands and f"tensor<4x1x{length}x64xbf16>" in operands
    assert not re.search(rf"{length}x({length}|{length // 2})x(f32|bf16)", text)


def test_on_gpus_split_rows_are_attended_to_block_by_block():
    mesh, length = MeshConfig(data=-1, context=2, tensor=2), 1536
    text = lowered(attention.XLA, "cuda", True, mesh, length)
    assert "all_gather" in text
    assert not re.search(rf"{length}x({length}|{length // 2})x(f32|bf16)", text)


def test_on_tpus_a_stage_of_a_pipeline_runs_the_same_kernel_on_a_part_of_its_rows():
    mesh, sizes = MeshConfig(data=-1, stage=2, tensor=2), {"num_layers": 4, "microbatches": 2}
    text = lowered(Backend("splash", "", max_segments=16), "tpu", True, mesh, **sizes)
    assert len(kernels(text)) == 2
    for operands in kernels(text):
        assert f"tensor<2x2x{T}x64xbf16>" in operands
        assert f"tensor<2x1x{T}x64xbf16>" in operands
    assert "collective_permute" in text and not re.search(rf"{T}x{T}x(f32|bf16)", text)


def test_on_gpus_a_stage_of_a_pipeline_runs_the_same_fused_call(hopper):
    mesh, sizes = MeshConfig(data=-1, stage=2, tensor=2), {"num_layers": 4, "microbatches": 2}
    text = lowered(Backend("cudnn", "", max_segments=16), "cuda", True, mesh, **sizes)
    assert calls(text) == (1, 1) and "PADDING_CAUSAL" in text
    assert "collective_permute" in text and "fmhaScaleBias" not in text and f"{T}x{T}" not in text


@pytest.mark.parametrize(
    ("remat", "expected"), [("save_attention", 2), ("full", 3), pytest.param("dots", 3, marks=exhaustive)]
)
def test_on_tpus_only_save_attention_spares_the_second_forward_pass(remat, expected):
    assert len(kernels(lowered(Backend("splash", ""), "tpu", remat=remat))) == expected


def kernels(text):
    """Types of the operands of each Pallas kernel."""
    return re.findall(r"@tpu_custom_call\(.*\) \{.*\} : \((.*?)\) ->", text)


@pytest.mark.parametrize(
    # Up and down, forward, and each twice backward, once by a kernel; only `full` does the first ones once more.
    ("mesh", "platform", "remat", "products", "gradients"),
    [
        (EXPERT_MESH, "tpu", "none", 4, 2),
        (ONE_DEVICE, "tpu", "full", 6, 2),
        (ONE_DEVICE, "cuda", "none", 0, 0),
        pytest.param(ONE_DEVICE, "tpu", "none", 4, 2, marks=exhaustive),
        pytest.param(ONE_DEVICE, "tpu", "dots", 4, 2, marks=exhaustive),
        pytest.param(EXPERT_MESH, "tpu", "dots", 4, 2, marks=exhaustive),
        pytest.param(EXPERT_MESH, "tpu", "full", 6, 2, marks=exhaustive),
        pytest.param(EXPERT_MESH, "cuda", "none", 0, 0, marks=exhaustive),
    ],
    ids=lambda value: {ONE_DEVICE: "one", EXPERT_MESH: "mesh"}.get(value, str(value)),
)
def test_experts_are_grouped_products_on_tpus_and_loops_elsewhere(mesh, platform, remat, products, gradients):
    text = lowered(Backend("xla", ""), platform, mesh=mesh, num_experts=4, remat=remat)
    assert text.count('composite "chlo.ragged_dot') == products
    assert len(kernels(text)) == gradients
