"""Measures every attention kernel there is here, and how far it is from the reference.

    python benchmarks/attention.py --batch_size=8 --seq_len=2048

Prints a line of JSON for each kernel and kind of mask: milliseconds forward and back, of which `tflops` counts the
products that the mask leaves; relative errors of the output and of the gradients of queries, keys and values against
the reference in float32 on the CPU; and, of packed rows, those against each document alone in its row.
"""

import argparse
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from measure import about, spread, tell, windows

from lslm_jax.models import attention
from lslm_jax.runtime import huge_pages

HEADS = {"64": (12, 12, 64), "128": (32, 8, 128)}  # of queries, of keys, and their width


@dataclasses.dataclass(frozen=True)
class Case:
    """A mask: documents in each row (0: one that fills it), and how far a query sees."""

    documents: int = 0
    causal: bool = True
    window: int = 0


CASES = {
    "causal": Case(),
    "packed 8": Case(documents=8),
    "packed 32": Case(documents=32),
    "window": Case(window=256),
    "packed, window": Case(documents=8, window=256),
    "full": Case(causal=False),
    "padded": Case(documents=1, causal=False),
    "packed, full": Case(documents=8, causal=False),
}


def main() -> None:
    """Prints a line of JSON for each kernel and mask."""
    args = parse_args()
    platform = jax.devices()[0].platform
    fused = {"gpu": ["cudnn"], "tpu": ["splash"]}.get(platform, [])
    for width, sizes in HEADS.items():
        for kind, case in CASES.items():
            for name in [*fused, *(["xla"] if width == "64" and kind in args.xla else [])]:
                found = look(args, name, *sizes, case)
                tell({"kernel": name, "mask": kind, "head_dim": int(width), "heads": sizes[:2]} | about() | found)


def look(args: argparse.Namespace, name: str, H: int, K: int, C: int, case: Case) -> dict[str, Any]:
    """Times and errors of one kernel on one mask."""
    B, T = args.batch_size, args.seq_len
    backend = attention.Backend(name, "", case.documents)
    segments_BT = None if not case.documents else documents(case.documents, B, T)
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in drawn(B, T, H, K, C)]
    both = function(backend, case)
    seconds = windows(lambda: both(*arrays, segments_BT), warm=2, count=3, length=args.steps)
    products = B * H * pairs(case, segments_BT, T) * C * 2 * 7  # two forward, five backward
    result = {"ms": spread([1e3 * each for each in seconds]), "tflops": round(products / min(seconds) / 1e12, 1)}
    few = [x[:2, :512] for x in arrays]
    segments_BT = None if not case.documents else documents(case.documents, *few[0].shape[:2])
    result["error"] = errors(both(*few, segments_BT), reference(case)(*few, segments_BT), segments_BT)
    if case.documents > 1:
        result["alone"] = alone(both, case, few, segments_BT)
    return result


def function(backend: attention.Backend, case: Case) -> Callable[..., Any]:
    """The output, and the gradients of queries, keys and values; padding counts for nothing."""
    attend = functools.partial(attention.attend, window=case.window, causal=case.causal, backend=backend)

    def both(q, k, v, g, segments):
        out, gradients = jax.vjp(lambda *x: attend(*x, segments_BT=segments), q, k, v)
        real = 1 if segments is None else (segments > 0)[:, :, None, None]
        return out, *gradients((g * real).astype(g.dtype))

    return jax.jit(both)


def reference(case: Case) -> Callable[..., Any]:
    """The same in float32, by plain products on the CPU."""
    both, cpu = function(attention.XLA, case), jax.devices("cpu")[0]

    def exact(*arrays):
        *floats, segments = (x if x is None else jax.device_put(x, cpu) for x in arrays)
        return both(*(x.astype(jnp.float32) for x in floats), segments)

    return exact


def errors(found: Any, wanted: Any, segments_BT: Any) -> list[float]:
    """Relative, |found - wanted| / |wanted|, of what is no padding: output, and gradients."""
    real = 1.0 if segments_BT is None else np.asarray(segments_BT > 0)[:, :, None, None]
    norms = [np.asarray(x, np.float64) * real for x in (*found, *wanted)]
    relative = [np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(norms[:4], norms[4:], strict=True)]
    return [float(f"{each:.2e}") for each in relative]


def alone(both: Callable[..., Any], case: Case, arrays: list[jax.Array], segments_BT: jax.Array) -> list[float]:
    """How far the first row is from its documents when each begins a row of its own, by the reference in float32."""
    row_T = np.asarray(segments_BT[0])
    places = [np.flatnonzero(row_T == document) for document in range(1, case.documents + 1)]
    apart = [jnp.stack([jnp.zeros_like(x[0]).at[: len(at)].set(x[0, at]) for at in places]) for x in arrays]
    lengths = np.array([len(at) for at in places])
    single = jnp.asarray(np.arange(len(row_T))[None] < lengths[:, None], jnp.int32)
    together = lambda rows: np.concatenate([np.asarray(x[: len(at)]) for x, at in zip(rows, places, strict=True)])[None]
    found = [np.asarray(x[:1])[:, row_T > 0] for x in both(*arrays, segments_BT)]
    return errors(found, [together(x) for x in reference(case)(*apart, single)], None)


def drawn(B: int, T: int, H: int, K: int, C: int) -> list[np.ndarray]:
    """Queries, keys, values, and the gradient of what comes of them."""
    random = np.random.default_rng(0)
    return [random.standard_normal((B, T, heads, C), np.float32) for heads in (H, K, K, H)]


def documents(number: int, B: int, T: int) -> jax.Array:
    """Rows of `number` documents of random lengths and a little padding behind them: [B, T]."""
    random, segments_BT = np.random.default_rng(1), np.zeros((B, T), np.int32)
    for row in segments_BT:
        ends = np.sort(random.choice(np.arange(1, T - T // 16), number, replace=False))
        for document, (start, end) in enumerate(zip([0, *ends], ends, strict=False), 1):
            row[start:end] = document
    return jnp.asarray(segments_BT)


def pairs(case: Case, segments_BT: jax.Array | None, T: int) -> float:
    """Queries and keys that see each other, mean over rows."""
    seen_BTS = np.asarray(attention.visible(T, T, segments_BT, causal=case.causal, window=case.window))
    if segments_BT is not None:
        seen_BTS = seen_BTS & np.asarray(segments_BT > 0)[:, :, None]
    return float(seen_BTS.sum() / len(seen_BTS))


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument("--seq_len", type=int, default=2048)
    flags.add_argument(
        "--xla", nargs="*", choices=CASES, default=["causal", "packed 8"], help="masks for the reference"
    )
    flags.add_argument("--steps", type=int, default=10, help="of a window")
    return flags.parse_args()


if __name__ == "__main__":
    huge_pages.ensure_large_pages()
    main()
