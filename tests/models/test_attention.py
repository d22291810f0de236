"""Every kernel computes the attention of the reference, and the one chosen is the fastest that does."""

import functools
import itertools
import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

from lslm_jax.config import Config, MeshConfig, ModelConfig
from lslm_jax.errors import ConfigError
from lslm_jax.kernels import fused_attention
from lslm_jax.models import attention
from lslm_jax.models.attention import Backend, Demands
from lslm_jax.parallel.sharding import make_mesh

B, T, H, C = 3, 256, 4, 64
FAST = {"platform": "gpu", "compute_capability": 9.0, "dtype": "bfloat16", "head_dim": 64, "length": 1024}


@pytest.mark.parametrize(
    ("case", "max_segments", "name", "reason"),
    [
        ({}, 0, "cudnn", "fused, on gpu"),
        ({}, 40, "cudnn", "fused, on gpu"),
        ({"compute_capability": 8.0}, 0, "cudnn", "fused, on gpu"),
        ({"compute_capability": 8.0}, 1, "cudnn", "fused, on gpu"),
        (
            {"compute_capability": 8.0},
            2,
            "xla",
            "cudnn: packed rows need compute capability 9.0, not 8.0",
        ),
        ({"compute_capability": 7.5}, 0, "xla", "cudnn: it needs compute capability 8.0, not 7.5"),
        ({"dtype": "float32"}, 0, "xla", "cudnn: it needs model.dtype=bfloat16, not float32"),
        ({"length": 1023}, 0, "xla", "cudnn: it needs an even data.seq_len, not 1023"),
        (
            {"head_dim": 20},
            0,
            "xla",
            "cudnn: it needs a head width that is a multiple of 8 up to 256, not 20",
        ),
        ({"head_dim": 256}, 0, "cudnn", "fused, on gpu"),
        (
            {"head_dim": 256, "compute_capability": 8.9},
            0,
            "xla",
            "cudnn: it needs a head width that is a multiple of 8 up to 128, not 256",
        ),
        ({"platform": "tpu", "compute_capability": 0.0}, 0, "splash", "fused, on tpu"),
        ({"platform": "tpu", "dtype": "float32"}, 40, "splash", "fused, on tpu"),
        (
            {"platform": "tpu", "length": 1000},
            0,
            "xla",
            "splash: it needs data.seq_len to be a multiple of 128, not 1000",
        ),
        (
            {"platform": "tpu", "head_dim": 80},
            0,
            "xla",
            "splash: it needs a head width that is a multiple of 64, not 80",
        ),
        ({"platform": "cpu", "compute_capability": 0.0}, 40, "xla", "the only one on cpu"),
    ],
)
def test_auto_picks_the_fused_kernel_wherever_it_is_correct_and_says_why_not(case, max_segments, name, reason):
    chosen = attention.choose("auto", **(FAST | case), max_segments=max_segments)
    assert chosen == Backend(name, reason, max_segments if name != "xla" else 0)


def test_a_kernel_named_in_the_config_is_taken_or_refused_but_never_replaced():
    assert attention.choose("xla", **FAST, max_segments=4).name == "xla"
    assert attention.choose("cudnn", **FAST, max_segments=4).name == "cudnn"
    for name, platform in [("cudnn", "tpu"), ("cudnn", "cpu"), ("splash", "gpu")]:
        with pytest.raises(ConfigError, match=f"^model.attention={name} cannot run here: .*; use auto or xla$"):
            attention.choose(name, **(FAST | {"platform": platform}), max_segments=0)


BOTH_WAYS = Demands(bidirectional=True)


@pytest.mark.parametrize(
    ("case", "extra", "reason"),
    [
        ({}, BOTH_WAYS, None),
        ({"source_length": 512}, BOTH_WAYS, None),
        ({"source_length": 511}, BOTH_WAYS, "it needs an even data.source_len, not 511"),
        (
            {},
            BOTH_WAYS._replace(window=9),
            "its window looks back only, and model.window=9 looks both ways here",
        ),
        ({}, Demands(bias=True), "it has no model.positions=relative"),
        ({}, Demands(mixed=True), "it is one for all layers, and model.layer_types makes them differ"),
        ({"platform": "tpu"}, BOTH_WAYS._replace(window=9), None),
        ({"platform": "tpu"}, Demands(bias=True), "it has no model.positions=relative"),
        ({}, Demands(softcap=True), "it has no model.attention_softcap"),
        (
            {"platform": "tpu", "source_length": 100},
            BOTH_WAYS,
            "it needs data.source_len to be a multiple of 128, not 100",
        ),
    ],
)
def test_what_encoders_demand_is_refused_where_a_kernel_cannot_do_it(case, extra, reason):
    case = FAST | case
    fused = "splash" if case["platform"] == "tpu" else "cudnn"
    chosen = attention.choose("auto", **case, max_segments=1, extra=extra)
    assert (chosen.name, chosen.reason) == (
        ("xla", f"{fused}: {reason}") if reason else (fused, f"fused, on {case['platform']}")
    )
    if reason:
        with pytest.raises(ConfigError, match=re.escape(reason)):
            attention.choose(fused, **case, max_segments=1, extra=extra)


def test_a_model_demands_what_its_config_says():
    decoder = ModelConfig(window=8)
    assert attention.demands(decoder) == attention.PLAIN
    assert attention.demands(replace(decoder, family="encoder")) == Demands(bidirectional=True, window=8)
    assert attention.demands(replace(decoder, layer_types=("full", "window"))) == Demands(mixed=True)
    assert attention.demands(replace(decoder, attention_softcap=50.0)) == Demands(softcap=True)
    assert attention.demands(ModelConfig(family="encoder_decoder", positions="relative")) == Demands(
        bidirectional=True, bias=True
    )


@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_kernel_never_leaves_out_silently_what_it_cannot_do(name):
    q_BTHC, k_BTKC, v_BTKC = arrays(num_kv_heads=2)
    for extra in ({"bias_HTS": jnp.zeros((H, T, T))}, {"everywhere": True}, {"cap": 30.0}):
        with pytest.raises(ConfigError, match=f"model.attention={name} cannot compute this attention"):
            attention.attend(q_BTHC, k_BTKC, v_BTKC, segments_BT=None, window=3, backend=Backend(name, ""), **extra)


def test_the_mask_of_an_encoder_looks_both_ways_and_that_of_a_pair_across():
    segments_BT, source_BS = np.array([[1, 1, 1, 2, 0, 0]]), np.array([[1, 1, 2, 2, 2]])
    for window, everywhere in [(0, None), (2, None), (2, False), (2, True)]:
        mask_BTS = np.asarray(attention.visible(6, 6, segments_BT, causal=False, window=window, everywhere=everywhere))
        for t, s in np.ndindex(6, 6):
            near = not window or everywhere or abs(t - s) < window
            assert mask_BTS[0, t, s] == (near and segments_BT[0, t] == segments_BT[0, s])
    for source in (source_BS, np.array([[1, 1, 2, 0, 0]])):
        mask_BTS = np.asarray(attention.visible(6, 5, segments_BT, source, causal=False, window=0))
        np.testing.assert_array_equal(mask_BTS[0, :4], segments_BT[0, :4, None] == source)
        # Padding sees that of the source, or all where it has none.
        np.testing.assert_array_equal(mask_BTS[0, 4:], [source[0] == 0 if 0 in source else source[0] > 0] * 2)


@pytest.mark.parametrize("cap", [0.0, 2.0])
def test_products_are_scaled_capped_and_biased_before_the_softmax(cap):
    q_BTHC, k_BTKC, v_BTKC = arrays(num_kv_heads=2)
    bias_HTS = np.random.default_rng(7).normal(size=(H, T, T)).astype(np.float32)
    settings = {"scale": 0.7, "cap": cap}

    @jax.jit
    def masked(q_BTHC, k_BTKC, v_BTKC, bias_HTS):
        mask_BTS = attention.visible(T, T, packed_rows(), causal=False, window=0)
        return mask_BTS, attention.attend_masked(q_BTHC, k_BTKC, v_BTKC, mask_BTS, bias_HTS=bias_HTS, **settings)

    mask_BTS, out_BTHC = map(np.asarray, masked(q_BTHC, k_BTKC, v_BTKC, bias_HTS))
    q, k, v, bias = map(np.float64, (q_BTHC, k_BTKC, v_BTKC, bias_HTS))
    for b, h in np.ndindex(B, H):
        product_TS = 0.7 * q[b, :, h] @ k[b, :, h // 2].T
        product_TS = cap * np.tanh(product_TS / cap) if cap else product_TS
        logits_TS = np.where(mask_BTS[b], product_TS + bias[h], -np.inf)
        weights_TS = np.exp(logits_TS - logits_TS.max(axis=1, keepdims=True))
        expected_TC = weights_TS / weights_TS.sum(1, keepdims=True) @ v[b, :, h // 2]
        np.testing.assert_allclose(out_BTHC[b, :, h], expected_TC, atol=2e-5)


def test_the_mask_is_causality_within_segments_and_window():
    segments_BT = np.array([[1, 1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3]])
    for window in (0, 1, 3):
        mask_BTS = np.asarray(attention.visible(8, 8, segments_BT, causal=True, window=window))
        for b, t, s in np.ndindex(2, 8, 8):
            near = s <= t and (not window or t - s < window)
            assert mask_BTS[b, t, s] == (near and segments_BT[b, t] == segments_BT[b, s])


def test_the_reference_is_softmax_of_scaled_products():
    q_BTHC, k_BTKC, v_BTKC = arrays(num_kv_heads=2)

    @jax.jit
    def masked(q_BTHC, k_BTKC, v_BTKC):
        mask_BTS = attention.visible(T, T, packed_rows(), causal=True, window=0)
        return mask_BTS, attention.attend_masked(q_BTHC, k_BTKC, v_BTKC, mask_BTS)

    mask_BTS, out_BTHC = map(np.asarray, masked(q_BTHC, k_BTKC, v_BTKC))
    q, k, v = map(np.float64, (q_BTHC, k_BTKC, v_BTKC))
    for b, h in np.ndindex(B, H):
        logits_TS = q[b, :, h] @ k[b, :, h // 2].T / np.sqrt(C)
        weights_TS = np.exp(np.where(mask_BTS[b], logits_TS, -np.inf))
        expected_TC = weights_TS / weights_TS.sum(1, keepdims=True) @ v[b, :, h // 2]
        np.testing.assert_allclose(out_BTHC[b, :, h], expected_TC, atol=2e-6)


FAST_CAUSAL_CASES = [(False, H, 0), (False, 2, 48), (True, 1, 0), (True, 2, 48)]


@pytest.mark.parametrize(
    ("packed", "num_kv_heads", "window"),
    [
        pytest.param(*case, marks=[] if case in FAST_CAUSAL_CASES else pytest.mark.exhaustive)
        for case in itertools.product([False, True], [H, 2, 1], [0, 48])
    ],
)
@pytest.mark.parametrize("name", ["cudnn", "splash"])
def test_a_fused_kernel_equals_the_reference(name, packed, num_kv_heads, window, fused_kernels):
    segments_BT = packed_rows() if packed else None
    options = {"segments_BT": segments_BT, "window": window}
    fused = attend(Backend(name, "", max_segments=6 if packed else 0), num_kv_heads, T, **options)
    np.testing.assert_allclose(fused, attend(attention.XLA, num_kv_heads, T, **options), atol=1e-5)


@pytest.mark.parametrize("num_kv_heads", [pytest.param(H, marks=pytest.mark.exhaustive), 2])
@pytest.mark.parametrize("rows", ["plain", "padded", "packed"])
@pytest.mark.parametrize(
    ("name", "source_length", "window"),
    [("cudnn", T, 0), ("cudnn", 128, 0), ("splash", T, 0), ("splash", T, 48), ("splash", 128, 0)],
)
def test_a_fused_kernel_looks_both_ways_and_across_as_the_reference_does(
    name, source_length, window, rows, num_kv_heads, fused_kernels
):
    segments_BT = {"plain": None, "padded": padded_rows(T, [T, 100, 0]), "packed": packed_rows()}[rows]
    source = {"plain": None, "padded": padded_rows(128, [128, 7, 0]), "packed": packed_sources()}[rows]
    options = {"segments_BT": segments_BT, "window": window, "causal": False}
    options |= {"source_segments_BS": source} if source_length != T else {}
    most = {"plain": 0, "padded": 1, "packed": 6}[rows]
    fused = attend(Backend(name, "", max_segments=most), num_kv_heads, source_length, **options)
    assert np.all(np.isfinite(fused))
    real = np.ones((B, T), bool) if segments_BT is None else segments_BT > 0
    reference = attend(attention.XLA, num_kv_heads, source_length, **options)
    np.testing.assert_allclose(fused[real], reference[real], atol=1e-5)


def test_one_document_a_row_needs_no_segments_of_cudnn(fused_kernels):
    segments_BT = padded_rows(T, [T, 100, 0])
    fused, reference = (
        attend(backend, 2, T, segments_BT=segments_BT, window=0)
        for backend in (Backend("cudnn", "", max_segments=1), attention.XLA)
    )
    np.testing.assert_allclose(fused[segments_BT > 0], reference[segments_BT > 0], atol=1e-5)


def test_segment_bounds_say_where_each_segment_lies():
    rng = np.random.default_rng(0)
    segment_bounds = jax.jit(fused_attention.segment_bounds, static_argnums=1)
    for most in (2, 5, 9):
        segments_BT = np.array([random_row(rng, 40, most) for _ in range(20)])
        lengths_BM, offsets_BM = map(np.asarray, segment_bounds(segments_BT, most))
        assert lengths_BM.shape == (20, most + 1) and offsets_BM.shape == (20, most + 2)
        for row_T, lengths_M, offsets_M in zip(segments_BT, lengths_BM, offsets_BM, strict=True):
            for number, length, offset in zip([*range(1, most + 1), 0], lengths_M, offsets_M, strict=False):
                where = np.flatnonzero(row_T == number)
                assert (length, offset) == ((len(where), where[0]) if len(where) else (-1, -1))
            assert offsets_M[-1] == -1


@pytest.fixture
def fused_kernels(monkeypatch):
    """The TPU kernel in Pallas's interpreter; cuDNN, of which there is none, as it is documented."""
    monkeypatch.setattr(splash, "make_splash_mha", functools.partial(splash.make_splash_mha, interpret=True))
    monkeypatch.setattr(cudnn, "dot_product_attention", cudnn_as_documented)


def attend(backend, num_kv_heads, source_length, **options):
    """Attention on one device over the first keys; compiled, but for cuDNN's, which is played by NumPy."""
    q_BTHC, k_BSKC, v_BSKC = arrays(num_kv_heads)
    function = functools.partial(attention.attend, backend=backend, **options)
    function = function if backend.name == "cudnn" else jax.jit(function)
    with jax.set_mesh(make_mesh(Config(mesh=MeshConfig(data=1)), jax.devices()[:1])):
        return np.asarray(function(q_BTHC, k_BSKC[:, :source_length], v_BSKC[:, :source_length]))


@functools.cache
def arrays(num_kv_heads):
    rng = np.random.default_rng(0)
    return [rng.normal(size=(B, T, heads, C)).astype(np.float32) for heads in (H, num_kv_heads, num_kv_heads)]


def packed_rows():
    """A row with padding, a full one, and one that is nothing but padding."""
    lengths = [[100, 1, 27, 90], [10, 20, 30, 40, 50, 106], []]
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return np.array([np.pad(row, (0, T - len(row))) for row in rows], np.int32)


def packed_sources():
    """Sources of packed_rows, of 128 tokens."""
    lengths = [[28, 10, 1, 60], [20, 30, 10, 10, 1, 57], []]
    rows = [np.repeat(np.arange(1, len(row) + 1), row) for row in lengths]
    return np.array([np.pad(row, (0, 128 - len(row))) for row in rows], np.int32)


def padded_rows(length, lengths):
    return (np.arange(length)[None] < np.array(lengths)[:, None]).astype(np.int32)


def random_row(rng, length, most):
    lengths = rng.integers(1, length // most + 1, size=rng.integers(0, most + 1))
    return np.pad(np.repeat(np.arange(1, len(lengths) + 1), lengths), (0, length - lengths.sum()))


def cudnn_as_documented(
    q, k, v, *, q_seqlen, kv_seqlen, q_offsets, kv_offsets, scale, mask_type, sliding_window_length
):
    """What JAX's cuDNN call is documented to compute, with its own translation of offsets into places in memory.

    Tokens that belong to no segment come out as NaN: cuDNN does not write them.
    """
    rows, length, heads, width = q.shape
    causal = mask_type in (cudnn.MaskType.CAUSAL, cudnn.MaskType.PADDING_CAUSAL)
    padding = mask_type in (cudnn.MaskType.PADDING, cudnn.MaskType.PADDING_CAUSAL)
    assert causal or not sliding_window_length
    assert padding == (q_seqlen is not None)
    source_length = k.shape[1]
    if q_offsets is None:
        sizes = [length] * rows if q_seqlen is None else np.asarray(q_seqlen)
        kv_sizes = [source_length] * rows if kv_seqlen is None else np.asarray(kv_seqlen)
        stretches = [(b * length, b * source_length, sizes[b], kv_sizes[b]) for b in range(rows)]
    else:
        fixed = cudnn._fix_seqlen_offsets(q_seqlen, kv_seqlen, q_offsets, kv_offsets, q, k)
        sizes, kv_sizes, starts, kv_starts = (np.asarray(x).ravel() for x in fixed)
        token, kv_token = heads * width, k.shape[2] * width  # elements of one token in memory
        places = zip(starts, kv_starts, sizes, kv_sizes, strict=False)
        stretches = [(a // token, b // kv_token, n, m) for a, b, n, m in places]
    q = np.asarray(q).reshape(rows * length, -1, width)
    k, v = (np.asarray(x).reshape(rows * source_length, -1, width) for x in (k, v))
    k, v = (np.repeat(x, heads // x.shape[1], axis=1) for x in (k, v))
    out = np.full(q.shape, np.nan, np.float32)
    for start, kv_start, size, kv_size in stretches:
        distance = np.arange(size)[:, None] - np.arange(kv_size)[None, :]
        seen = np.full(distance.shape, True)
        if causal:
            seen = (distance >= 0) & (distance < (sliding_window_length or size))
        logits = np.einsum("thc,shc->hts", q[start : start + size], k[kv_start : kv_start + kv_size]) * scale
        weights = np.exp(np.where(seen[None], logits, -np.inf))
        weights /= weights.sum(axis=-1, keepdims=True)
        out[start : start + size] = np.einsum("hts,shc->thc", weights, v[kv_start : kv_start + kv_size])
    return jnp.asarray(out.reshape(rows, length, heads, width))
