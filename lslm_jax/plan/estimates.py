"""What a compiled step says of a run: sizes, memory, traffic, time, money; as one dictionary that JSON can hold."""

import math
import os
from typing import Any

import jax
import numpy as np

from lslm_jax.config import Config
from lslm_jax.models.flops import flops_per_token, keys_seen
from lslm_jax.models.model_configs import layer_types
from lslm_jax.parallel import hardware_specs
from lslm_jax.parallel.hardware_specs import Device
from lslm_jax.plan import cost_model, hlo_parser
from lslm_jax.plan.compile_step import Compiled
from lslm_jax.plan.cost_model import Network
from lslm_jax.plan.topology import Topology
from lslm_jax.runtime.pytree import flatten
from lslm_jax.train.train_state import divide, num_parameters

_JAX_SHARE = 0.75  # of a GPU's memory, which jax takes unless it is told otherwise
_DAY = 86_400.0


def figures(compiled: Compiled, topology: Topology | None, memory: int | None, price: float | None) -> dict[str, Any]:
    """All figures of a step.

    Args:
      compiled: the step.
      topology: what for; None: the devices that are there.
      memory: bytes that a device's program may take. None: as many as the device has.
      price: dollars of a device for an hour, None if unknown.
    """
    config, mesh = compiled.config, compiled.mesh
    kind = mesh.devices.flat[0].device_kind
    device = hardware_specs.find(kind)
    flops = _flops_per_token(config, compiled.batch.targets_BT.shape[1])
    tokens = config.train.batch_size * config.data.seq_len
    state = compiled.state
    found: dict[str, Any] = {
        "device": kind,
        "devices": mesh.size,
        "mesh": {name: size for name, size in mesh.shape.items() if size > 1},
        "attention": compiled.backend.name,
        "attention_reason": compiled.backend.reason,
        "parameters": parts(config, state.model),
        "tokens_per_step": tokens,
        "flops_per_token": flops,
        "flops_per_step": flops * tokens,
        "checkpoint_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "lower_seconds": round(compiled.lower_seconds, 2),
        "compile_seconds": round(compiled.compile_seconds, 2),
        "memory": _memory(compiled, limit_of(mesh, topology, memory)),
    }
    if compiled.program is None:
        return found
    routed = 1 / mesh.shape.get("expert", 1)
    program = hlo_parser.parse(compiled.program.as_text() or "")
    measured = cost_model.measure(program, network(mesh, device), share_seen(config), routed)
    found["per_device"] = {"flops": measured.flops, "bytes": measured.bytes, "cycles": measured.cycles}
    found["collectives"] = [each._asdict() for each in measured.collectives]
    found |= bounds(measured, device, flops * tokens, tokens, mesh.size)
    step = found["expected_step_seconds"] or found["bound"]["step_seconds"]
    return found | {"run": run(config.train.steps, tokens, step, mesh.size, price)}


def _flops_per_token(config: Config, predictions: int) -> float:
    data = config.data
    return flops_per_token(config.model, data.seq_len, data.source_len, config.task.objective, predictions)


def share_seen(config: Config) -> float:
    """Share of a row that its queries see on average; of an encoder-decoder that of its three attentions."""
    model, length = config.model, config.data.seq_len
    windows = [model.window if kind == "window" else 0 for kind in layer_types(model, model.num_layers)]
    causal = float(np.mean([keys_seen(length, window, True) for window in windows])) / length
    every = float(np.mean([keys_seen(length, window, False) for window in windows])) / length
    return {"decoder": causal, "encoder": every, "encoder_decoder": (causal + 2 * every) / 3}[model.family]


def parts(config: Config, model: Any) -> dict[str, int]:
    """Parameters by what they are for, in total, and how many are trained."""
    counts: dict[str, int] = dict.fromkeys(("embeddings", "attention", "mlp", "norms", "head", "adapters"), 0)
    for name, leaf in flatten(model).items():
        words = name.split(".")
        of = {
            "adapters": "lora" in words,
            "norms": any(word.endswith("norm") for word in words),
            "attention": {"attention", "cross", "distances"} & set(words),
            "mlp": "blocks" in words,  # what else a block has
            "embeddings": words[0] in ("embed", "positions", "types"),
        }
        counts[next((part for part, holds in of.items() if holds), "head")] += leaf.size
    total, trained = num_parameters(model), num_parameters(divide(config, model)[0])
    return {part: count for part, count in counts.items() if count} | {"total": total, "trained": trained}


def limit_of(mesh: Any, topology: Topology | None, memory: int | None) -> int | None:
    """Bytes that a program may take on a device: given, as the runtime says, or as published; None: nobody knows."""
    if memory is not None:
        return memory
    first = mesh.devices.flat[0]
    if topology is None:
        return (first.memory_stats() or {}).get("bytes_limit") if first.platform != "cpu" else None
    device = hardware_specs.find(first.device_kind)
    if device is None or not device.memory:
        return None
    return int(device.memory * jax_share()) if first.platform == "gpu" else device.memory


def jax_share() -> float:
    """Share of a GPU's memory that jax takes."""
    return float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", _JAX_SHARE))


def _memory(compiled: Compiled, limit: int | None) -> dict[str, Any]:
    """Bytes on one device; what is no part of the arguments is as the compiler reports."""
    state, config = compiled.state, compiled.config
    trained, _ = divide(config, state.model)
    found = {
        "parameters": local_bytes(state.model),
        "optimizer": local_bytes(state.optimizer),
        "host": local_bytes(state.optimizer, on_host=True),
        "average": local_bytes(state.ema),
        "batch": local_bytes(compiled.batch),
        "gradients": local_bytes(trained),
    }
    if compiled.program is None:
        needed = compiled.needed or None
        return {**found, "needed": needed, "limit": limit, "fits": False}
    said: Any = compiled.program.memory_analysis()
    names = {"arguments": "argument", "outputs": "output", "aliased": "alias", "temporaries": "temp"}
    found |= {name: int(getattr(said, f"{key}_size_in_bytes")) for name, key in names.items()}
    found["peak"] = int(said.peak_memory_in_bytes)
    found["activations"] = max(0, found["temporaries"] - found["gradients"])
    needed = found["peak"]
    if compiled.mesh.devices.flat[0].platform != "tpu":  # elsewhere temporaries are one block, there at once
        whole = found["arguments"] + found["temporaries"] + found["outputs"] - found["aliased"]
        needed = max(needed, whole)
    return {**found, "needed": needed, "limit": limit, "fits": None if limit is None else needed <= limit}


def local_bytes(tree: Any, *, on_host: bool = False) -> int:
    """Bytes of a tree of shapes with shardings in the memory of one device; or what it keeps in its host's."""
    leaves = [x for x in jax.tree.leaves(tree) if (x.sharding.memory_kind == "pinned_host") == on_host]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def network(mesh: Any, device: Device | None) -> Network:
    """What joins the devices of a mesh: links inside a slice, or host of GPUs; a slower network between them."""
    flat = list(mesh.devices.flat)
    key = "process_index" if flat[0].platform == "gpu" else "slice_index"  # a host has a process of its own
    domains = np.array([getattr(each, key, 0) or 0 for each in flat])
    if device is None or not device.link:
        return Network(mesh, domains, lambda group: 0.0, 0.0)
    if flat[0].platform != "tpu":
        return Network(mesh, domains, lambda group: device.link, device.network)
    where = np.array([each.coords for each in flat])
    shape = tuple(int(n) for n in where.max(axis=0) + 1)
    return Network(mesh, domains, cost_model.tori(where, device.rings(shape), device.link), device.network)


def bounds(measured: cost_model.Cost, device: Device | None, flops: float, tokens: int, count: int) -> dict[str, Any]:
    """Seconds of a step that each resource needs at least, and what follows from the greatest of them."""
    if device is None or not device.bandwidth:
        unknown = dict.fromkeys(("compute", "memory", "network", "blocking", "compiler"))
        nothing = dict.fromkeys(("step_seconds", "tokens_per_second", "mfu", "by"))
        return {"seconds": unknown, "bound": nothing, "expected_step_seconds": None, "expected_mfu": None}
    blocking = sum(each.blocking for each in measured.collectives)
    seconds = {
        "compute": measured.flops / device.flops,
        "memory": measured.bytes / device.bandwidth,
        "network": sum(each.seconds for each in measured.collectives),
    }
    by = max(seconds, key=lambda name: seconds[name])
    step = seconds[by]
    compiler = measured.cycles / device.clock if measured.cycles and device.clock else None
    expected = None if compiler is None else max(step, compiler + measured.kernel_flops / device.flops + blocking)
    peak = count * device.flops
    return {
        "seconds": seconds | {"blocking": blocking, "compiler": compiler},
        "bound": {"step_seconds": step, "tokens_per_second": tokens / step, "mfu": flops / step / peak, "by": by},
        "expected_step_seconds": expected,
        "expected_mfu": None if expected is None else flops / expected / peak,
    }


def run(steps: int, tokens: int, step_seconds: float | None, count: int, price: float | None) -> dict[str, Any]:
    """A whole run at so many seconds a step: tokens, days, hours of all devices together, dollars."""
    hours = None if step_seconds is None else steps * step_seconds * count / 3600
    return {
        "steps": steps,
        "tokens": steps * tokens,
        "days": None if step_seconds is None else steps * step_seconds / _DAY,
        "device_hours": hours,
        "dollars": None if hours is None or price is None else hours * price,
    }
