"""The figures of a plan as a person reads them."""

from collections.abc import Iterator
from typing import Any

from lslm_jax.parallel.hardware_specs import GIB

_UNITS = ((1e18, "E"), (1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def text(found: dict[str, Any]) -> str:
    """A report of some twenty lines."""
    return "\n".join(_lines(found))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    mesh = " x ".join(f"{name}={size}" for name, size in found["mesh"].items()) or "one device"
    yield f"{found['devices']} {found['device']} device(s), {mesh}; {found['attention']} attention"
    yield f"  ({found['attention_reason']}); compiled in {found['lower_seconds'] + found['compile_seconds']:.0f} s"
    counts = found["parameters"]
    yield f"parameters    {counts['total']:,}, of them trained {counts['trained']:,}"
    yield "              " + ", ".join(
        f"{name} {n:,}" for name, n in counts.items() if name not in ("total", "trained")
    )
    yield f"operations    {si(found['flops_per_token'])}FLOP a token, {si(found['flops_per_step'])}FLOP a step"
    yield f"              of {found['tokens_per_step']:,} tokens"
    yield from _memory_lines(found["memory"])
    yield f"checkpoint    {gib(found['checkpoint_bytes'])}"
    if "bound" in found:
        yield from _traffic(found["collectives"])
        yield from _time(found)


def _memory_lines(memory: dict[str, Any]) -> Iterator[str]:
    shown = [name for name in ("parameters", "optimizer", "average", "batch", "gradients") if memory[name]]
    host = f"; optimizer in its host's memory {gib(memory['host'])}" if memory["host"] else ""
    yield "a device      " + ", ".join(f"{name} {gib(memory[name])}" for name in shown) + host
    if "peak" in memory:
        yield (
            f"              activations and temporaries {gib(memory['activations'])}; the compiler says: arguments "
            f"{gib(memory['arguments'])}, temporaries {gib(memory['temporaries'])}, peak {gib(memory['peak'])}"
        )
    yield f"memory        {verdict(memory)}"


def verdict(memory: dict[str, Any]) -> str:
    """Whether it fits, and by how much."""
    needed, limit = memory["needed"], memory["limit"]
    if limit is None:
        return f"{gib(needed)}; device memory unknown: give --memory=BYTES"
    if needed is None:
        return f"does not fit into {gib(limit)}"
    word = "fits" if memory["fits"] else "does not fit"
    apart = f"{gib(abs(limit - needed))} {'to spare' if memory['fits'] else 'too much'}"
    return f"{word}: {gib(needed)} of {gib(limit)}, {apart}"


def _traffic(collectives: list[dict[str, Any]]) -> Iterator[str]:
    for each in collectives:
        over = "between slices or hosts" if each["network"] else "inside a slice or host"
        waits = ", nothing beside it" if each["blocking"] else ""
        seconds = f"{seconds_text(each['seconds'])}, " if each["seconds"] else ""  # 0: no link speed is known
        yield (
            f"{each['kind']:<19} {each['count']:>6} a step over {'+'.join(each['axes']) or 'nothing'} "
            f"({each['group']}): {si(each['bytes'])}B, {seconds}{over}{waits}"
        )


def _time(found: dict[str, Any]) -> Iterator[str]:
    seconds, bound, run = found["seconds"], found["bound"], found["run"]
    if bound["step_seconds"] is None:
        yield "time          unknown: nobody publishes the peaks of such a device"
        return
    shown = ", ".join(f"{name} {seconds_text(seconds[name])}" for name in ("compute", "memory", "network"))
    yield f"a step takes  at least {seconds_text(bound['step_seconds'])}, bound by {bound['by']} ({shown})"
    yield f"              so at most {si(bound['tokens_per_second'])} tokens/s, MFU {bound['mfu']:.1%}"
    if found["expected_step_seconds"]:
        yield (
            f"              {seconds_text(found['expected_step_seconds'])} as the compiler counts cycles, "
            f"MFU {found['expected_mfu']:.1%}"
        )
    money = "" if run["dollars"] is None else f", {run['dollars']:,.0f} dollars"
    yield (
        f"{run['steps']:,} steps  {si(run['tokens'])} tokens in {run['days']:.2f} days, "
        f"{run['device_hours']:,.0f} device-hours{money}, if nothing else takes time"
    )


def ranking(found: list[dict[str, Any]]) -> str:
    """A table of what a search found, the fastest first."""
    rows = [("step", "MFU", "by", "memory", "settings")]
    for each in found:
        bound = each["bound"]
        step = "" if bound["step_seconds"] is None else seconds_text(bound["step_seconds"])
        mfu = "" if bound["mfu"] is None else f"{bound['mfu']:.1%}"
        rows.append((step, mfu, bound["by"] or "", gib(each["memory"]["needed"]), each["flags"]))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join([*(cell.rjust(n) for cell, n in zip(row[:4], widths, strict=True)), row[4]]) for row in rows
    )


def gib(size: int) -> str:
    """Bytes as people read them: 1.50 GiB."""
    for unit, name in ((GIB, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if size >= unit:
            return f"{size / unit:.2f} {name}"
    return f"{size} B"


def si(number: float) -> str:
    """Three figures and a prefix: 1.23 T."""
    return next((f"{number / unit:.3g} {name}" for unit, name in _UNITS if number >= unit), f"{number:.3g} ")


def seconds_text(seconds: float) -> str:
    """Three figures: 1.23 s, 45.6 ms."""
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
