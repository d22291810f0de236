"""Attention as functions of arrays: one reference, and two fused kernels that must agree with it.

Queries attend to keys of their own segment: those before them (causal), all of them (an encoder), or those of another
sequence (cross-attention). `choose` picks the fastest back end that does so for the case at hand. Rows of padding
(segment 0) attend among themselves and are never read.
"""

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from lslm_jax.config import ModelConfig
from lslm_jax.errors import ConfigError
from lslm_jax.kernels import blockwise_attention, fused_attention
from lslm_jax.models.layers import near, softcap
from lslm_jax.parallel import context_parallel


class KeyValues(NamedTuple):
    """Keys and values of one layer seen so far (of all layers, with a leading L, outside the stack)."""

    k_BSKC: jax.Array
    v_BSKC: jax.Array


class Backend(NamedTuple):
    """A kernel and why it was chosen.

    Attributes:
      name: `xla`, `cudnn` or `splash`.
      reason: for the log.
      max_segments: most segments in any row; cudnn needs the number when it compiles, and 0 means no segments.
    """

    name: str
    reason: str
    max_segments: int = 0


class Distances(NamedTuple):
    """A learnt number for each bucket of distances and each head, and the distance from which on all share one."""

    table_NH: jax.Array
    farthest: int


_STRETCH = 64  # queries; products of fewer take as long

XLA = Backend("xla", "the reference")


class Demands(NamedTuple):
    """What a model asks of a kernel other than causal attention and a window over what came before.

    Attributes:
      bidirectional: attention to what follows, too.
      window: of that attention; 0 for none.
      bias: a number added to each product of query and key.
      mixed: layers that see different stretches.
      softcap: products of query and key that are squashed.
    """

    bidirectional: bool = False
    window: int = 0
    bias: bool = False
    mixed: bool = False
    softcap: bool = False


PLAIN = Demands()


def demands(config: ModelConfig) -> Demands:
    """What a model of this config demands."""
    bidirectional = config.family != "decoder"
    return Demands(
        bidirectional=bidirectional,
        window=config.window if bidirectional else 0,
        bias=config.positions == "relative",
        mixed=bool(config.window and set(config.layer_types) - {"window"}),
        softcap=config.attention_softcap > 0,
    )


def choose(
    name: str,
    *,
    platform: str,
    compute_capability: float,
    dtype: str,
    head_dim: int,
    length: int,
    max_segments: int,
    source_length: int = 0,
    extra: Demands = PLAIN,
    devices: int = 1,
) -> Backend:
    """Picks the kernel for training on rows of `length` tokens with up to `max_segments` documents each (0: unmasked).

    Args:
      name: a back end, or `auto`.
      platform: `cpu`, `gpu` or `tpu`, of the devices that will run it.
      compute_capability: of an NVIDIA GPU (9.0 is Hopper), 0 elsewhere.
      source_length: tokens of the row that an encoder-decoder's encoder reads, 0 where there is none.
      extra: from `demands`.
      devices: over which the positions of a row are split.

    Raises:
      ConfigError: the named back end cannot compute this case correctly.
    """
    lengths = {"data.seq_len": length} | ({"data.source_len": source_length} if source_length else {})
    obstacles = {
        "cudnn": _cudnn_obstacle(platform, compute_capability, dtype, head_dim, lengths, max_segments, extra, devices),
        "splash": _splash_obstacle(platform, head_dim, lengths, extra, devices),
        "xla": None,
    }
    if name == "auto":
        fused = {"gpu": "cudnn", "tpu": "splash"}.get(platform)
        if fused and obstacles[fused] is None:
            return Backend(fused, f"fused, on {platform}", max_segments)
        return Backend("xla", f"{fused}: {obstacles[fused]}" if fused else f"the only one on {platform}")
    if obstacles[name]:
        raise ConfigError(f"model.attention={name} cannot run here: {obstacles[name]}; use auto or xla")
    return Backend(name, "named in the config", max_segments)


def _cudnn_obstacle(
    platform: str,
    compute_capability: float,
    dtype: str,
    head_dim: int,
    lengths: dict[str, int],
    max_segments: int,
    extra: Demands,
    devices: int,
) -> str | None:
    if platform != "gpu":
        return f"it needs an NVIDIA GPU, not {platform}"
    if compute_capability < 8.0:
        return f"it needs compute capability 8.0, not {compute_capability}"
    if dtype != "bfloat16":
        return f"it needs model.dtype=bfloat16, not {dtype}"
    if max_segments > 1 and compute_capability < 9.0:
        return f"packed rows need compute capability 9.0, not {compute_capability}"
    limit = 256 if compute_capability >= 9.0 else 128
    if head_dim % 8 or head_dim > limit:
        return f"it needs a head width that is a multiple of 8 up to {limit}, not {head_dim}"
    for key, length in lengths.items():
        if length % 2:
            return f"it needs an even {key}, not {length}"
    if extra.window:
        return f"its window looks back only, and model.window={extra.window} looks both ways here"
    if devices > 1:
        return f"it sees whole rows only, and mesh.context={devices} splits them"
    return _neither_can(extra)


def _splash_obstacle(platform: str, head_dim: int, lengths: dict[str, int], extra: Demands, devices: int) -> str | None:
    if platform != "tpu":
        return f"it needs a TPU, not {platform}"
    for key, length in lengths.items():
        looks_back = key == "data.seq_len" and (not extra.bidirectional or len(lengths) > 1)
        multiple = 128 * devices * (2 if devices > 1 and looks_back else 1)  # such rows are folded
        if length % multiple:
            where = f" on mesh.context={devices}" if devices > 1 else ""
            return f"it needs {key} to be a multiple of {multiple}{where}, not {length}"
    if head_dim % 64:
        return f"it needs a head width that is a multiple of 64, not {head_dim}"
    return _neither_can(extra)


def _neither_can(extra: Demands) -> str | None:
    if extra.bias:
        return "it has no model.positions=relative"
    if extra.mixed:
        return "it is one for all layers, and model.layer_types makes them differ"
    if extra.softcap:
        return "it has no model.attention_softcap"
    return None


def attend(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    *,
    segments_BT: jax.Array | None,
    window: int,
    backend: Backend,
    source_segments_BS: jax.Array | None = None,
    causal: bool = True,
    bias_HTS: jax.Array | None = None,
    scale: float = 0.0,
    cap: float = 0.0,
    everywhere: jax.Array | None = None,
    distances: Distances | None = None,
    folded: bool = False,
) -> jax.Array:
    """Attention within segments: [B, T, H, C].

    Args:
      q_BTHC: queries.
      k_BSKC: keys, in cross-attention of another sequence (not causal, without a window).
      v_BSKC: values.
      segments_BT: which document a token belongs to, 0 for padding. None: all to one.
      window: a query sees itself and the `window` - 1 tokens before it and, if not causal, behind it. 0: all.
      backend: from `choose`.
      source_segments_BS: the same of the keys, in cross-attention. None: as of the queries.
      causal: whether a query sees only what is before it.
      bias_HTS: added to the products of queries and keys.
      scale: what the products are multiplied with. 0: 1 / sqrt(C).
      cap: the products are squashed into (-cap, cap). 0: they are not.
      everywhere: a boolean: whether this layer ignores the window.
      distances: what bias_HTS is made of, in its place where the mesh splits rows: it would be too large.
      folded: whether positions are, by `context.fold`.
    """
    if source_segments_BS is not None and segments_BT is None:
        segments_BT = jnp.ones(q_BTHC.shape[:2], source_segments_BS.dtype)
    lengths = q_BTHC.shape[1], k_BSKC.shape[1]
    is_split = context_parallel.is_split(*lengths)
    if backend.name != "xla":
        cannot = backend.name == "cudnn" and (is_split or (window and not causal))
        if bias_HTS is not None or distances is not None or everywhere is not None or cap or cannot:
            raise ConfigError(f"model.attention={backend.name} cannot compute this attention; use auto or xla")
    segments = segments_BT, source_segments_BS
    if backend.name == "xla" and not is_split:
        mask_BTS = visible(*lengths, *segments, causal=causal, window=window, everywhere=everywhere)
        attend_part = functools.partial(_attend_stretch, q_BTHC, k_BSKC, v_BSKC, mask_BTS, bias_HTS, scale, cap)
        stretches = _stretches(*lengths, causal, 0 if everywhere is not None else window)
        out_BTHC = jnp.concatenate([attend_part(*stretch) for stretch in stretches], axis=1)
        return checkpoint_name(out_BTHC, fused_attention.SAVED)
    scale = scale or q_BTHC.shape[-1] ** -0.5
    if is_split:
        table_NH, farthest = distances or (None, 0)
        options = blockwise_attention.Options(causal, window, cap, farthest)
        attend_split = functools.partial(context_parallel.attend, backend.name, options, folded=folded)
        return attend_split(q_BTHC * scale, k_BSKC, v_BSKC, *segments, everywhere=everywhere, table_NH=table_NH)
    options = {"causal": causal, "window": window, "scale": scale}
    if backend.name == "cudnn":
        return fused_attention.cudnn(q_BTHC, k_BSKC, v_BSKC, *segments, **options, max_segments=backend.max_segments)
    return fused_attention.splash(q_BTHC, k_BSKC, v_BSKC, *segments, **options)


def _stretches(length: int, source_length: int, causal: bool, window: int) -> Iterator[tuple[slice, slice]]:
    """Queries in up to eight stretches, each with the keys that any of them may see: the others cost nothing then."""
    count = next((n for n in (8, 4, 2) if causal and length % n == 0 and length // n >= _STRETCH), 1)
    size = length // count
    for begin in range(0, length, size):
        first = max(0, begin - window + 1) if window and causal else 0
        yield slice(begin, begin + size), slice(first, begin + size if causal else source_length)


def _attend_stretch(q_BTHC, k_BSKC, v_BSKC, mask_BTS, bias_HTS, scale, cap, rows: slice, seen: slice) -> jax.Array:
    """`attend_masked` of some queries and some keys."""
    mask_BTS, bias_HTS = mask_BTS[:, rows, seen], None if bias_HTS is None else bias_HTS[:, rows, seen]
    parts = q_BTHC[:, rows], k_BSKC[:, seen], v_BSKC[:, seen]
    return attend_masked(*parts, mask_BTS, bias_HTS=bias_HTS, scale=scale, cap=cap)


def visible(
    length: int,
    source_length: int,
    segments_BT: jax.Array | None = None,
    source_segments_BS: jax.Array | None = None,
    *,
    causal: bool,
    window: int,
    everywhere: jax.Array | bool | None = None,
) -> jax.Array:
    """Which key each query may see: [B, T, S], or [1, T, S] where there are no segments. See `attend`."""
    distance_TS = jnp.arange(length)[:, None] - jnp.arange(source_length)[None, :]
    near_TS = near(distance_TS, window, everywhere)
    if causal:
        near_TS = near_TS & (distance_TS >= 0)
    if segments_BT is None:
        return near_TS[None]
    if source_segments_BS is None:
        return near_TS[None] & (segments_BT[:, :, None] == segments_BT[:, None, :])
    mask_BTS = near_TS[None] & (segments_BT[:, :, None] == source_segments_BS[:, None, :])
    # Padding of queries where there is none of keys sees all: a softmax over nothing would be NaN.
    return mask_BTS | ~jnp.any(mask_BTS, axis=-1, keepdims=True)


def attend_masked(
    q_BTHC: jax.Array,
    k_BSKC: jax.Array,
    v_BSKC: jax.Array,
    mask_BTS: jax.Array,
    *,
    bias_HTS: jax.Array | None = None,
    scale: float = 0.0,
    cap: float = 0.0,
) -> jax.Array:
    """The reference: softmax(q k scale + bias) v where the mask allows. Logits and softmax are float32.

    Each query must see at least one key; a mask [B, 1, S] is that of all queries. Query heads share key heads in
    groups, G = H / K, and the heads of a group are laid out as M = T * G queries: one product for all of them, and no
    copy of keys and values.
    """
    B, T, H, C = q_BTHC.shape
    K = k_BSKC.shape[2]
    q_BTHC = q_BTHC * scale if scale else q_BTHC / math.sqrt(C)
    q_BMKC = jnp.swapaxes(q_BTHC.reshape(B, T, K, H // K, C), 2, 3).reshape(B, -1, K, C)
    # Added, not selected: on CPUs the softmax and its gradient then take half the time.
    copies = 1 if mask_BTS.shape[1] == 1 else H // K
    bias_BMS = jnp.repeat(jnp.where(mask_BTS, 0.0, -jnp.inf), copies, axis=1)
    logits_BKMS = jnp.einsum("bmkc,bskc->bkms", q_BMKC, k_BSKC, preferred_element_type=jnp.float32)
    logits_BKMS = softcap(logits_BKMS, cap)
    if bias_HTS is not None:
        logits_BKMS += jnp.swapaxes(bias_HTS.reshape(1, K, H // K, T, -1), 2, 3).reshape(1, K, H // K * T, -1)
    weights_BKMS = jax.nn.softmax(logits_BKMS + bias_BMS[:, None], axis=-1).astype(v_BSKC.dtype)
    out_BMKC = jnp.einsum("bkms,bskc->bmkc", weights_BKMS, v_BSKC)
    return jnp.swapaxes(out_BMKC.reshape(B, T, H // K, K, C), 2, 3).reshape(B, T, H, C)
