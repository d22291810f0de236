"""GGUF files of llama.cpp as pretrained models: their settings and weights by the names of Hugging Face.

Weights are dequantised, one tensor at a time, to the float32 that they stand for.
"""

import re
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from lslm_jax.data.tokenizers.gguf import open_file
from lslm_jax.errors import ConfigError, DataError

_KEYS = {
    "num_hidden_layers": "block_count",
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
_REQUIRED = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count")
_REQUIRED += ("attention.layer_norm_rms_epsilon",)
_FAMILIES = ("llama", "qwen2", "qwen3")
# Further keys of an architecture without effect, and those with the values by which they have none.
_IRRELEVANT = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
_INERT: dict[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0, 1),
    "rope.scale_linear": (0, 1),
    "rope.scaling.attn_factor": (1,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "attention.sliding_window": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "logit_scale": (0, 1),
    "embedding_scale": (0, 1),
    "residual_scale": (0, 1),
    "use_parallel_residual": (False,),
}
_HEAD_SIZES = ("rope.dimension_count", "attention.value_length")  # read only where they equal head_dim
_WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class Quantised(NamedTuple):
    """One array of a file; reads like a `safetensors.Tensor`.

    Attributes:
      path, dtype, shape, begin: as there; the type is that which is read.
      packed: as the gguf package has it.
      heads: of queries or keys whose feature pairs lie side by side; 0: of none.
    """

    path: epath.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    packed: Any
    heads: int

    def read(self) -> np.ndarray:
        """The whole array, in float32."""
        from gguf.quants import dequantize  # type: ignore[import-not-found]

        array = np.asarray(dequantize(self.packed.data, self.packed.tensor_type), np.float32).reshape(self.shape)
        if not self.heads:
            return array
        # llama.cpp turns neighbouring features, Hugging Face and we those half a head apart.
        pairs = array.reshape(self.heads, -1, 2, *self.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(self.shape)


def settings(path: epath.Path) -> dict[str, Any]:
    """What a config.json would say.

    Raises:
      ConfigError: it is of a family, or has rotary positions, that are not supported.
    """
    theirs, tensors = open_file(path)
    kind = theirs.get("general.architecture")
    if kind not in _FAMILIES:
        raise ConfigError(f"{path}: GGUF models of type {kind} are not supported, only {', '.join(_FAMILIES)}")
    names = {tensor.name for tensor in tensors}
    tokens = theirs.get("tokenizer.ggml.tokens")
    if not tokens:
        raise ConfigError(f"{path} holds no vocabulary")
    if "rope_freqs.weight" in names or theirs.get(f"{kind}.rope.scaling.type", "none") != "none":
        raise ConfigError(f"{path}: stretched rotary positions are not read from GGUF: take the model's safetensors")
    if lacking := [key for key in _REQUIRED if f"{kind}.{key}" not in theirs]:
        raise DataError(f"{path} lacks {kind}.{lacking[0]}")
    _check_keys(theirs, kind, path)
    found = {name: theirs[f"{kind}.{key}"] for name, key in _KEYS.items() if f"{kind}.{key}" in theirs}
    found = {"num_key_value_heads": found["num_attention_heads"], "head_dim": _head_dim(found, path)} | found
    for key in _HEAD_SIZES:
        if theirs.get(f"{kind}.{key}", found["head_dim"]) != found["head_dim"]:
            raise ConfigError(
                f"{path}: {kind}.{key}={theirs[f'{kind}.{key}']} is not supported, only the features of a head, "
                f"{found['head_dim']}"
            )
    return found | {
        "model_type": kind,
        "architectures": [f"{kind}ForCausalLM"],
        "vocab_size": len(tokens),
        "tie_word_embeddings": "output.weight" not in names,
    }


def _check_keys(theirs: dict[str, Any], kind: str, path: epath.Path) -> None:
    """Raises ConfigError where a key of the architecture has an effect that is not supported, or is not known."""
    known = {*_KEYS.values(), *_IRRELEVANT, *_HEAD_SIZES}
    for name, value in theirs.items():
        key = name.removeprefix(f"{kind}.")
        if key != name and key not in known and value not in _INERT.get(key, ()):
            raise ConfigError(f"{path}: {name}={value!r} is not supported")


def _head_dim(found: dict[str, Any], path: epath.Path) -> int:
    heads, width = found["num_attention_heads"], found["hidden_size"]
    if not isinstance(heads, int) or heads < 1 or not isinstance(width, int):
        raise DataError(f"{path}: attention.head_count={heads!r} must be a positive number")
    return width // heads


def tensors(path: epath.Path) -> dict[str, Quantised]:
    """All arrays, by the names of Hugging Face."""
    theirs, packed = open_file(path)
    kind = theirs["general.architecture"]
    heads = {"attn_q": theirs[f"{kind}.attention.head_count"]}
    heads["attn_k"] = theirs.get(f"{kind}.attention.head_count_kv", heads["attn_q"])
    found = {}
    for tensor in packed:
        name, part = _name(tensor.name)
        shape = tuple(int(size) for size in reversed(tensor.shape))
        turned = heads.get(part, 0) if kind == "llama" else 0
        found[name] = Quantised(path, np.dtype(np.float32), shape, int(tensor.data_offset), tensor, turned)
    return found


def _name(theirs: str) -> tuple[str, str]:
    """The name of Hugging Face, and which part of a layer that is; unknown names stay."""
    stem, _, suffix = theirs.rpartition(".")
    if stem in _WHOLE:
        return f"{_WHOLE[stem]}.{suffix}", stem
    found = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if found and found[2] in _LAYER:
        return f"model.layers.{found[1]}.{_LAYER[found[2]]}.{suffix}", found[2]
    return theirs, stem
