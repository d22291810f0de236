"""Rows split over devices: every attention is that of whole rows, and no device works or holds more than its share."""

import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from lslm_jax.config import Config, MeshConfig, ModelConfig
from lslm_jax.config.validation import fill_sizes
from lslm_jax.errors import ConfigError
from lslm_jax.kernels import blockwise_attention
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend, Demands, Distances
from lslm_jax.models.build_model import build_model
from lslm_jax.models.layers import relative_bias
from lslm_jax.parallel import context_parallel
from lslm_jax.parallel.sharding import make_mesh

B, T, S, H, K, C = 2, 64, 32, 4, 2, 8
FARTHEST = 20
SEGMENTS_BT = np.stack([np.repeat([1, 2, 3, 0], [20, 30, 7, 7]), np.repeat([1, 2], [63, 1])]).astype(np.int32)
SOURCES_BS = np.stack([np.repeat([1, 2, 3], [5, 20, 7]), np.repeat([1, 2, 0], [20, 9, 3])]).astype(np.int32)


def mesh_of(**sizes: Any):
    axes: dict[str, Any] = {"data": 1} | sizes
    return make_mesh(Config(mesh=MeshConfig(**axes)), jax.devices()[: math.prod(sizes.values())])


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of four, so that short rows have many."""
    monkeypatch.setattr(blockwise_attention, "BLOCK", 4)


def arrays(length=T, source_length=T, width=C, dtype=jnp.float32):
    """Queries, keys, values, and what the sum of attention is weighed with."""
    sizes = [(length, H), (source_length, K), (source_length, K), (length, H)]
    return [random_array((B, *size, width), seed).astype(dtype) for seed, size in enumerate(sizes)]


def random_array(shape, seed):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def whole(q_BTHC, k_BSKC, v_BSKC, table_NH=None, *, segments=(None, None), causal=True, **options):
    """The reference, of which no part is split."""
    lengths = q_BTHC.shape[1], k_BSKC.shape[1]
    bias_HTS = None if table_NH is None else relative_bias(table_NH, *lengths, 0, causal=causal, farthest=FARTHEST)
    return attention.attend(
        q_BTHC,
        k_BSKC,
        v_BSKC,
        segments_BT=segments[0],
        source_segments_BS=segments[1],
        causal=causal,
        bias_HTS=bias_HTS,
        backend=attention.XLA,
        **options,
    )


def split(
    q_BTHC, k_BSKC, v_BSKC, table_NH=None, *, segments=(None, None), causal=True, backend=attention.XLA, **options
):
    """The same on the mesh in use, with rows folded as a stack folds them."""
    folded = causal and context_parallel.can_fold(q_BTHC.shape[1])
    fold = context_parallel.fold if folded else lambda x: x
    out_BTHC = attention.attend(
        fold(q_BTHC),
        fold(k_BSKC),
        fold(v_BSKC),
        segments_BT=None if segments[0] is None else fold(segments[0]),
        source_segments_BS=segments[1],
        causal=causal,
        distances=None if table_NH is None else Distances(table_NH, FARTHEST),
        backend=backend,
        folded=folded,
        **options,
    )
    return context_parallel.unfold(out_BTHC) if folded else out_BTHC


def with_gradients(attend, weights_BTHC, *parts, **options):
    """Attention, and the gradients of a weighted sum of it with respect to all parts; weights hide padding."""

    def total(*parts):
        out_BTHC = attend(*parts, **options).astype(jnp.float32)
        return jnp.sum(out_BTHC * weights_BTHC), out_BTHC

    gradients, out_BTHC = jax.jit(jax.grad(total, argnums=tuple(range(len(parts))), has_aux=True))(*parts)
    return np.asarray(out_BTHC) * weights_BTHC, *gradients


def distance(a, b):
    """Norm of the difference, relative to the second."""
    return np.linalg.norm(np.float64(a) - np.float64(b)) / np.linalg.norm(np.float64(b))


def of_real_tokens(weights_BTHC, segments_BT):
    return weights_BTHC if segments_BT is None else weights_BTHC * (segments_BT > 0)[:, :, None, None]


CASES = {
    "causal": {},
    "packed": {"segments": (SEGMENTS_BT, None)},
    "window": {"segments": (SEGMENTS_BT, None), "window": 9},
    "window ignored": {"window": 9, "everywhere": True},
    "window kept": {"window": 9, "everywhere": False},
    "capped": {"cap": 2.0, "scale": 0.7},
    "biased": {"segments": (SEGMENTS_BT, None), "table": True},
    "both ways": {"segments": (SEGMENTS_BT, None), "causal": False},
    "both ways, window": {"causal": False, "window": 9},
    "both ways, biased": {"causal": False, "table": True, "window": 9, "everywhere": True},
    "across": {"causal": False, "segments": (SEGMENTS_BT, SOURCES_BS), "source_length": S},
}


MESHES = {"packed": [{"data": 2, "context": 2, "tensor": 2}, {"context": 8}]}
MESHES["both ways, biased"] = MESHES["packed"]


@pytest.mark.parametrize("name", CASES)
def test_split_rows_attend_as_whole_ones_do_forward_and_backward(name, small_blocks):
    options = {"window": 0} | CASES[name]
    source_length, biased = options.pop("source_length", T), options.pop("table", False)
    *parts, weights_BTHC = arrays(source_length=source_length)
    parts += [random_array((8, H), seed=9)] if biased else []
    weights_BTHC = of_real_tokens(weights_BTHC, options.get("segments", (None,))[0])
    expected = with_gradients(whole, weights_BTHC, *parts, **options)
    for sizes in MESHES.get(name, [{"context": 2}]):
        with jax.set_mesh(mesh_of(**sizes)):
            found = with_gradients(split, weights_BTHC, *parts, **options)
        for a, b in zip(found, expected, strict=True):
            assert distance(a, b) < 1e-6


def test_in_bfloat16_split_rows_differ_by_rounding_alone(small_blocks):
    options = {"window": 0, "segments": (SEGMENTS_BT, None)}
    *parts, weights_BTHC = arrays()
    weights_BTHC = of_real_tokens(weights_BTHC, SEGMENTS_BT)
    exact = with_gradients(whole, weights_BTHC, *parts, **options)
    rough = [part.astype(jnp.bfloat16) for part in parts]
    reference = with_gradients(whole, weights_BTHC, *rough, **options)
    with jax.set_mesh(mesh_of(context=4)):
        found = with_gradients(split, weights_BTHC, *rough, **options)
    for a, b, true in zip(found, reference, exact, strict=True):
        assert distance(a, true) < 1.2 * distance(b, true) < 0.02


def test_what_a_query_hears_does_not_depend_on_the_number_of_devices(small_blocks):
    *parts, _ = arrays()
    heard = []
    for devices in (2, 4, 8):
        with jax.set_mesh(mesh_of(context=devices)):
            heard.append(np.asarray(jax.jit(functools.partial(split, window=0))(*parts)))
    for other in heard[1:]:
        np.testing.assert_array_equal(other, heard[0])


def test_a_query_that_sees_no_key_says_nothing_and_has_no_gradient(small_blocks):
    *parts, weights_BTHC = arrays(source_length=S)
    options = {"causal": False, "window": 0, "segments": (SEGMENTS_BT, np.full((B, S), 2, np.int32))}
    with jax.set_mesh(mesh_of(context=2)):
        out_BTHC, *gradients = with_gradients(split, weights_BTHC, *parts, **options)
    blind_BT = SEGMENTS_BT != 2
    assert np.all(np.asarray(out_BTHC)[blind_BT] == 0) and np.all(np.asarray(gradients[0])[blind_BT] == 0)
    assert all(np.all(np.isfinite(part)) for part in (out_BTHC, *gradients))


@pytest.mark.parametrize("devices", [2, 3, 4, 8])
def test_folding_gives_each_device_an_early_chunk_and_a_late_one(devices):
    length = 6 * devices
    rows_BT = np.arange(2 * length).reshape(2, length)
    with jax.set_mesh(mesh_of(context=devices)):
        folded_BT = jax.jit(context_parallel.fold)(rows_BT)
        back_BT = jax.jit(lambda x: context_parallel.unfold(context_parallel.fold(x)))(rows_BT)
    places_T = context_parallel.order(devices, length, folded=True)
    np.testing.assert_array_equal(folded_BT, rows_BT[:, places_T])
    np.testing.assert_array_equal(back_BT, rows_BT)
    for device, own_T in enumerate(places_T.reshape(devices, 6)):
        late = length - 3 * (device + 1)
        assert own_T.tolist() == [*range(3 * device, 3 * device + 3), *range(late, late + 3)]


def blocks_visited(devices, length, *, folded, causal=True, window=0, size=4):
    """Pairs of blocks that each device computes."""
    stretch = length // devices // (2 if folded else 1)
    total = []
    for device in range(devices):
        firsts = [
            s + b
            for s in context_parallel.starts(device, devices, length, folded=folded)
            for b in range(0, stretch, size)
        ]
        options = blockwise_attention.Options(causal, window)
        spans = [blockwise_attention.reach(options, first, size, length // size, size) for first in firsts]
        total.append(sum(int(end) - int(begin) for begin, end in spans))
    return total


@pytest.mark.parametrize("devices", [2, 4, 8])
def test_devices_share_causal_work_evenly(devices):
    length = 64
    folded, flat = (blocks_visited(devices, length, folded=folded) for folded in (True, False))
    assert max(folded) - min(folded) <= 1
    assert sum(folded) == sum(flat) == 16 * 17 // 2  # half of all pairs, and the diagonal
    assert max(flat) > 1.4 * max(folded)
    both_ways = blocks_visited(devices, length, folded=False, causal=False)
    assert set(both_ways) == {16 * 16 // devices}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [0, 1, 5, 9, 64, 100])
def test_no_block_is_left_out_that_holds_a_key_to_be_seen(causal, window):
    for size in (4, 8):
        seen_TS = np.asarray(attention.visible(T, T, causal=causal, window=window))[0]
        for first in range(0, T, size):
            begin, end = blockwise_attention.reach(
                blockwise_attention.Options(causal, window), first, size, T // size, size
            )
            some = seen_TS[first : first + size].reshape(size, -1, size).any(axis=(0, 2))
            assert np.flatnonzero(some).tolist() == list(range(int(begin), int(end)))


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"packed": True}, marks=pytest.mark.exhaustive),
        {"packed": True, "window": 150},
        pytest.param({"packed": True, "causal": False}, marks=pytest.mark.exhaustive),
        {"causal": False, "window": 150},
    ],
    ids=["causal", "packed", "window", "both ways", "both ways, window"],
)
def test_the_tpu_kernel_attends_in_split_rows_as_in_whole_ones(options, monkeypatch):
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    options, length = {"window": 0} | options, 512
    segments_BT = np.stack([np.repeat([1, 2, 3, 0], [200, 240, 52, 20]), np.repeat([1], [512])]).astype(np.int32)
    options["segments"] = (segments_BT if options.pop("packed", False) else None, None)
    *parts, weights_BTHC = arrays(length, length, width=64)
    weights_BTHC = of_real_tokens(weights_BTHC, options["segments"][0])
    expected = with_gradients(whole, weights_BTHC, *parts, **options)
    with jax.set_mesh(mesh_of(context=2, tensor=2)):
        found = with_gradients(split, weights_BTHC, *parts, backend=Backend("splash", ""), **options)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


TPU = {"platform": "tpu", "compute_capability": 0.0, "dtype": "bfloat16", "head_dim": 64, "max_segments": 4}
GPU = TPU | {"platform": "gpu", "compute_capability": 9.0}
BOTH_WAYS = Demands(bidirectional=True)


@pytest.mark.parametrize(
    ("case", "name", "reason"),
    [
        (TPU | {"length": 1024}, "splash", "fused, on tpu"),
        (
            TPU | {"length": 512},
            "xla",
            "splash: it needs data.seq_len to be a multiple of 1024 on mesh.context=4, not 512",
        ),
        (TPU | {"length": 512, "extra": BOTH_WAYS}, "splash", "fused, on tpu"),
        (
            TPU | {"length": 512, "source_length": 512, "extra": BOTH_WAYS},
            "xla",
            "splash: it needs data.seq_len to be a multiple of 1024 on mesh.context=4, not 512",
        ),
        (GPU | {"length": 1024}, "xla", "cudnn: it sees whole rows only, and mesh.context=4 splits them"),
    ],
)
def test_auto_knows_which_kernel_can_split_rows(case, name, reason):
    chosen = attention.choose("auto", **case, devices=4)
    assert (chosen.name, chosen.reason) == (name, reason)
    if name == "xla":
        fused = reason.partition(":")[0]
        with pytest.raises(
            ConfigError, match=f"^model.attention={fused} cannot run here: {re.escape(reason[len(fused) + 2 :])}"
        ):
            attention.choose(fused, **case, devices=4)


def test_a_kernel_that_needs_whole_rows_is_never_given_parts():
    *parts, _ = arrays()
    with jax.set_mesh(mesh_of(context=2)), pytest.raises(ConfigError, match=r"model\.attention=cudnn cannot compute"):
        attention.attend(*parts, segments_BT=None, window=0, backend=Backend("cudnn", ""))


def test_one_document_does_not_hear_of_another(small_blocks):
    config = fill_sizes(ModelConfig(num_layers=2, d_model=32, num_heads=4, vocab_size=61, max_length=T))
    model = jax.jit(lambda: build_model(config, jax.random.key(0), "causal"))()
    tokens_BT = np.random.default_rng(0).integers(0, 61, (B, T)).astype(np.int32)
    changed_BT = np.where(np.arange(T)[None] == 3, (tokens_BT + 1) % 61, tokens_BT)
    with jax.set_mesh(mesh_of(context=4)):
        hidden = jax.jit(lambda model, tokens_BT: model(tokens_BT, segments_BT=SEGMENTS_BT))
        before_BTD, after_BTD = (np.asarray(hidden(model, tokens)) for tokens in (tokens_BT, changed_BT))
    same_BT = np.all(before_BTD == after_BTD, axis=-1)
    np.testing.assert_array_equal(same_BT, (SEGMENTS_BT != 1) | (np.arange(T)[None] < 3))
