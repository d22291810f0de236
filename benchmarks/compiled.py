"""What the real compilers make of the train step for hardware that is not there: fused kernels, and nothing square.

    python benchmarks/compiled.py [--hardware=h200:1] [--write]

Needs them: pip install -e '.[tpu,plan-gpu]'. Compiles a small model of each kind for each device, and reads the
program: how often a step runs attention's kernels; whether any array has two sides as long as a row, or is as large as
the float32 logits of all tokens; whether all of the state is reused in place. Exits with 1 where one of these is not as
it should be. With --write, the table goes into benchmarks/compiled.md, between its marks.
"""

import argparse
import json
import math
import pathlib
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pages

from lslm_jax.config import Config, DataConfig, MeshConfig, ModelConfig, TaskConfig, TokenizerConfig, TrainConfig
from lslm_jax.config.validation import validate
from lslm_jax.plan import topology as topologies

PAGE, MARK = pathlib.Path(__file__).parent / "compiled.md", "<!-- kernels -->"
HARDWARE = ("h200:1", "v5e:2x2", "v5p:2x2x1")
# Sizes that nothing else has: an array with two such sides can only be the scores of attention.
ROWS, LENGTH, SOURCE, VOCAB, LAYERS = 16, 1152, 896, 32_768, 4
DECODER = ModelConfig(
    num_layers=LAYERS,
    d_model=1024,
    num_heads=8,
    vocab_size=VOCAB,
    max_length=LENGTH,
    positions="rotary",
    norm="rmsnorm",
    activation="silu",
    gated=True,
    bias=False,
    dtype="bfloat16",
)
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 256},
    "grouped heads": {"num_kv_heads": 2},
    "packed": {},
    "packed, window, grouped heads": {"window": 256, "num_kv_heads": 2},
    "remat=save_attention": {"remat": "save_attention"},
    "packed, remat=save_attention": {"remat": "save_attention"},
    "encoder": {"family": "encoder"},
    "encoder, packed": {"family": "encoder"},
    "encoder-decoder": {"family": "encoder_decoder"},
    "encoder-decoder, packed": {"family": "encoder_decoder"},
}


def main() -> None:
    """Prints the table."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--hardware", action="append", help=f"by default {', '.join(HARDWARE)}")
    flags.add_argument("--write", action="store_true", help="put the table into compiled.md")
    flags.add_argument("--inside", default="", help=argparse.SUPPRESS)  # jax knows one kind of hardware a process
    args = flags.parse_args()
    if args.inside:
        for kind, changes in KINDS.items():
            print(json.dumps(facts(args.inside, kind, changes)), flush=True)
        return
    found = []
    for hardware in args.hardware or HARDWARE:
        command = [sys.executable, __file__, f"--inside={hardware}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found += [json.loads(line) for line in done.stdout.splitlines()]
    shown = table(found)
    print(shown)
    if args.write:
        pages.write(PAGE, MARK, shown)
    sys.exit(not all(fact["sound"] for fact in found))


def facts(hardware: str, kind: str, changes: dict[str, Any]) -> dict[str, Any]:
    """What is to be known of one program."""
    topology = topologies.prepare(hardware)
    from lslm_jax.plan import compile_step, estimates, hlo_parser, matmul_flops

    assert topology is not None
    compiled = compile_step.compile_step(compile_step.resolve(configured(kind, changes, topology.size)), topology)
    assert compiled.program is not None
    runs = list(hlo_parser.runs(hlo_parser.parse(compiled.program.as_text() or "")))
    kernels = {"forward": 0, "backward": 0}
    for run in runs:
        if matmul_flops.attention(run):
            kernels["backward" if matmul_flops.is_backward(run.instruction) else "forward"] += run.times
    arrays = {array for run in runs for array in run.instruction.arrays}
    lengths = (LENGTH, SOURCE)
    square = sorted({array.dims for array in arrays if sum(side in lengths for side in array.dims) > 1})
    logits = ROWS * LENGTH * VOCAB
    large = sorted({array.dims for array in arrays if array.dtype == "f32" and math.prod(array.dims) >= logits})
    state, memory = estimates.local_bytes(compiled.state), compiled.program.memory_analysis()
    wanted = LAYERS * (3 if changes.get("family") == "encoder_decoder" else 1)
    reused = memory.alias_size_in_bytes / state
    sound = kernels == {"forward": wanted, "backward": wanted} and not square and not large and reused >= 1.0
    return {
        "hardware": hardware,
        "kind": kind,
        "kernel": compiled.backend.name,
        **kernels,
        "wanted": wanted,
        "square": square,
        "logits": large,
        "state": state,
        "reused": reused,
        "temporaries": memory.temp_size_in_bytes,
        "seconds": compiled.compile_seconds,
        "sound": sound,
    }


def configured(kind: str, changes: dict[str, Any], devices: int) -> Config:
    """The config of a kind of model, with as many rows for each device."""
    packed, family = "packed" in kind, changes.get("family", "decoder")
    objective: Any = {"decoder": "causal", "encoder": "masked", "encoder_decoder": "seq2seq"}[family]
    data = DataConfig(source="synthetic", seq_len=LENGTH, mask_documents=packed or family != "decoder")
    if family == "encoder_decoder":
        data = replace(data, source_len=SOURCE)
    if family != "decoder" and not packed:
        data = replace(data, packing="pad")
    return validate(
        Config(
            model=replace(DECODER, **changes),
            data=data,
            task=TaskConfig(objective=objective),
            tokenizer=TokenizerConfig(vocab_size=VOCAB - 128),
            train=TrainConfig(batch_size=ROWS * devices),
            mesh=MeshConfig(data=1, fsdp=-1),
        )
    )


def table(found: list[dict[str, Any]]) -> str:
    """A row a program."""
    heads = ["hardware", "model", "attention", "kernels a step, forward and backward", "T x T", "tokens x V in float32"]
    heads += ["state reused", "temporaries"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for fact in found:
        cells = [fact["hardware"], fact["kind"], fact["kernel"]]
        cells += [f"{fact['forward']} and {fact['backward']} of {fact['wanted']}"]
        cells += [", ".join("x".join(map(str, dims)) for dims in fact[name]) or "none" for name in ("square", "logits")]
        cells += [f"{fact['reused']:.0%}", f"{fact['temporaries'] / 2**30:.2f} GiB"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
