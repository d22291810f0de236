"""The same models in Hugging Face transformers on torch, for peers.py; needs these two, and nothing of ours.

Prints one line of JSON, with the tokens/s of each window of steps.
"""

import argparse
import contextlib
import json
import resource
import time

STARTED = time.perf_counter()

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import GPT2Config, LlamaConfig  # noqa: E402

CONFIGS = {
    "tiny": GPT2Config(n_embd=256, n_layer=4, n_head=8, n_positions=256, vocab_size=8192, n_inner=1024),
    "gpt2_small": GPT2Config(),
    "gpt2_xl": GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    "llama_1b": LlamaConfig(
        hidden_size=2048,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        intermediate_size=8192,
        vocab_size=128_256,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
        tie_word_embeddings=True,
    ),
}


def main() -> None:
    """Prints one line of JSON."""
    args = parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = CONFIGS[args.model]
    for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    result = train(args, model, device) if args.what == "train" else decode(args, model, device)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    )
    print(
        json.dumps(result | {"peak_bytes": peak, "torch": torch.__version__, "transformers": transformers.__version__})
    )


def train(args: argparse.Namespace, model: torch.nn.Module, device: str) -> dict[str, object]:
    """Steps on random tokens: mean loss, gradients clipped to norm 1, AdamW; on a GPU in bfloat16 by autocast."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, betas=(0.9, 0.95), fused=True)
    forward = torch.compile(model) if args.compile else model
    vocab_size = model.config.vocab_size
    batches = [torch.randint(0, vocab_size, (args.batch_size, args.seq_len), device=device) for _ in range(4)]
    narrow = torch.autocast("cuda", torch.bfloat16) if device == "cuda" else contextlib.nullcontext()

    def step(number: int) -> float:
        ids = batches[number % len(batches)]
        with narrow:
            loss = forward(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    with attention(args.cudnn):
        step(0).item()
        first = time.perf_counter() - STARTED
        for number in range(3):
            step(number).item()
        rates = []
        for _ in range(args.windows):
            begun = time.perf_counter()
            for number in range(args.steps):
                loss = step(number)
            loss.item()
            rates.append(args.steps * args.batch_size * args.seq_len / (time.perf_counter() - begun))
    return {"tokens_per_second": rates, "first_step_seconds": first}


def decode(args: argparse.Namespace, model: torch.nn.Module, device: str) -> dict[str, object]:
    """Greedy text with a cache."""
    model = model.eval().to(torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(0, model.config.vocab_size, (args.batch_size, 16), device=device)
    settings = {"max_new_tokens": args.tokens, "min_new_tokens": args.tokens, "do_sample": False, "pad_token_id": 0}

    def seconds() -> float:
        begun = time.perf_counter()
        with torch.inference_mode():
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun

    seconds()
    return {"tokens_per_second": [args.batch_size * args.tokens / seconds() for _ in range(args.windows)]}


def attention(cudnn: bool) -> contextlib.AbstractContextManager[None]:
    """Torch's own choice of a kernel, or cuDNN's."""
    if not cudnn:
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel([SDPBackend.CUDNN_ATTENTION])


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("what", choices=("train", "decode"))
    flags.add_argument("--model", choices=CONFIGS, default="tiny")
    flags.add_argument("--batch_size", type=int, default=8)
    flags.add_argument("--seq_len", type=int, default=256)
    flags.add_argument("--tokens", type=int, default=128)
    flags.add_argument("--windows", type=int, default=3)
    flags.add_argument("--steps", type=int, default=7)
    flags.add_argument("--compile", action="store_true")
    flags.add_argument("--cudnn", action="store_true")
    return flags.parse_args()


if __name__ == "__main__":
    main()
