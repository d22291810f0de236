"""How much memory reading a model takes: its own, and at no time much more."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from lslm_jax.convert import pretrained, safetensors_io
from lslm_jax.convert.safetensors_io import Source

D, F, V, L = 1536, 6144, 32_000, 6
LLAMA = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": F,
    "num_hidden_layers": L,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
SHAPES = {
    "input_layernorm": (D,),
    "self_attn.q_proj": (D, D),
    "self_attn.k_proj": (D // 2, D),
    "self_attn.v_proj": (D // 2, D),
    "self_attn.o_proj": (D, D),
    "post_attention_layernorm": (D,),
    "mlp.gate_proj": (F, D),
    "mlp.up_proj": (F, D),
    "mlp.down_proj": (D, F),
}

# Reads two models as a user would, in a process of its own, and tells by how much its memory grew at most for the
# second: the first, small one brings in the program and the compiler. What a file's pages take in the kernel's cache is
# not counted: they are read, not mapped.
READ = """
import contextlib, json, re, sys, pathlib
from lslm_jax.main import main

status = lambda name: int(re.search(name + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) << 10
small, large, *flags = sys.argv[1:]
with contextlib.suppress(SystemExit):
    main(["import", f"--pretrained={small}", *flags])
pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
try:
    main(["import", f"--pretrained={large}", *flags])
finally:
    print(json.dumps({"grown": status("VmHWM") - before}))
"""


def write(directory, scale=1):
    """Half a gigabyte of bfloat16 in five files; or the same with widths that much smaller, in fewer."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 14, V * D, np.uint16)  # small numbers, all of them
    bfloat16 = safetensors_io._TYPES["BF16"]

    def source(shape):
        shape = tuple(size // scale for size in shape)
        return Source(bfloat16, shape, lambda: noise[: int(np.prod(shape))].view(bfloat16).reshape(shape))

    layers = {f"model.layers.{i}.{name}.weight": source(shape) for i in range(L) for name, shape in SHAPES.items()}
    ends = {"model.embed_tokens.weight": source((V, D)), "model.norm.weight": source((D,))}
    # The largest comes last, when all others are there.
    safetensors_io.write_directory(directory, layers | ends, limit=120_000_000)
    widths = {name: LLAMA[name] // scale for name in ("vocab_size", "hidden_size", "intermediate_size")}
    (directory / "config.json").write_text(json.dumps(LLAMA | widths))
    return pretrained.describe(directory)


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="memory is measured by Linux's means")
def test_reading_takes_the_models_own_memory_and_less_than_two_tensors_more(tmp_path):
    small, large = epath.Path(tmp_path / "small"), epath.Path(tmp_path / "large")
    for directory, scale in ((small, 16), (large, 1)):
        directory.mkdir()
        source = write(directory, scale)
    tensors = pretrained.tensors(source).values()
    largest = max(int(np.prod(tensor.shape)) * tensor.dtype.itemsize for tensor in tensors)
    arguments = [sys.executable, "-c", READ, str(small), str(large), "--config.mesh.data=1", "--config.mesh.fsdp=8"]
    # Of what is freed, glibc keeps up to 64 MB for each of its arenas, whoever asks. This is about what we hold.
    gives_back = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    env = os.environ | gives_back | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    try:
        found = subprocess.run(arguments, env=env, capture_output=True, text=True)
    finally:
        for path in large.glob("*.safetensors"):
            path.unlink()
    assert found.returncode == 0, found.stderr
    _, summary, measured = map(json.loads, found.stdout.splitlines())
    own = 4 * summary["parameters"]
    over = measured["grown"] - own
    figures = {"file": summary["bytes"], "model": own, "largest tensor": largest, "beyond the model": over}
    print(", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in figures.items()))
    assert len(summary["files"]) >= 4 and summary["bytes"] > 0.5e9
    assert over < 2 * largest
