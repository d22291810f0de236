"""Audit of the JSON files of a Hugging Face directory: every key is read, irrelevant, or rejected by name.

`hf_keys.json` lists each key that transformers and PEFT accept, with its default and the kinds of values it admits. It
is generated from their classes (`tests/convert/hf_key_table.py`). A key that is neither read nor irrelevant must have
its default; a key that is in no list is one that no code of transformers reads for such a model.
"""

import functools
import json
import pathlib
from collections.abc import Collection, Mapping
from typing import Any

from lslm_jax.errors import ConfigError

Settings = Mapping[str, Any]

# Keys of config.json without effect on logits, ids or texts: training, memory, further outputs, provenance.
IRRELEVANT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash _experts_implementation
    _experts_implementation_internal _name_or_path attention_dropout attention_probs_dropout_prob attn_implementation
    attn_pdrop auto_map chunk_size_feed_forward classifier_dropout decoder_layerdrop deterministic_flash_attn dtype
    activation_dropout embd_pdrop embedding_dropout encoder_layerdrop experts_implementation finetuning_task
    gradient_checkpointing init_std initializer_cutoff_factor initializer_factor initializer_range name_or_path
    output_attentions output_hidden_states output_past output_router_logits pretraining_tp qa_dropout
    reference_compile repad_logits_with_grad return_dict router_aux_loss_coef seq_classif_dropout
    sinusoidal_pos_embds sparse_pred_ignore_index sparse_prediction summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj tags torch_dtype torchscript transformers_version use_cache
    task_specific_params n_ctx loss_type hidden_dropout sep_token_id
    cls_token_id unsloth_version unsloth_fixed
    """.split()
)
# Keys of config.json that other parts of the package read: heads and labels, special tokens, the way text is written.
READ_ELSEWHERE = frozenset(
    """
    model_type architectures id2label label2id num_labels problem_type bos_token_id eos_token_id pad_token_id
    decoder_start_token_id forced_eos_token_id tokenizer_class
    """.split()
)
# Kinds of values of keys that transformers takes without a declared type.
_NUMBER = ("float", "int")
_KINDS = {
    "rope_theta": _NUMBER,
    "rope_local_base_freq": _NUMBER,
    "global_rope_theta": _NUMBER,
    "local_rope_theta": _NUMBER,
    "rotary_pct": _NUMBER,
    "rotary_emb_base": _NUMBER,
    "sliding_window_pattern": ("int",),
    "global_attn_every_n_layers": ("int",),
    "no_rope_layer_interval": ("int",),
    "rope_scaling": ("dict", "null"),
    "num_labels": ("int", "null"),
    "head_dim": ("int", "null"),
    "scale_decoder_outputs": ("bool",),
    "tie_word_embeddings": ("bool", "null"),
    "decoder_start_token_id": ("int", "null"),
}
_OFF: tuple[Any, ...] = (None, False, [], {}, "")  # values by which a key without a default does nothing


@functools.cache
def table() -> dict[str, Any]:
    """The generated table."""
    return json.loads((pathlib.Path(__file__).parent / "hf_keys.json").read_text())


def resolve(kind: str, given: Settings, read: Collection[str]) -> dict[str, Any]:
    """A config.json with aliases resolved, and with the defaults of its transformers class for missing keys.

    Args:
      kind: model_type.
      given: content of config.json.
      read: keys that the family reads.

    Raises:
      ConfigError: a key has a value of the wrong kind, or is neither read nor irrelevant and differs from its default.
    """
    family = table()["families"][kind]
    found: dict[str, Any] = {}
    for key, value in given.items():
        name = family["aliases"].get(key, key)
        if name != key and name in given and given[name] != value:
            raise ConfigError(f"{key}={value!r} contradicts {name}={given[name]!r}, which is the same setting")
        found[name] = value
    for name, value in found.items():
        _check(kind, name, value, read)
    return family["defaults"] | found


def status(kind: str, key: str, read: Collection[str]) -> str:
    """`read`, `irrelevant`, `rejected` (when not the default) or `unread` (by no code of transformers either)."""
    family = table()["families"][kind]
    if key in read or key in READ_ELSEWHERE or (key in table()["generation"] and key not in IRRELEVANT):
        return "read"  # settings of generation that stand here hold where there is no generation_config.json
    if key in IRRELEVANT:
        return "irrelevant"
    return "rejected" if key in family["defaults"] or key in known(kind) else "unread"


@functools.cache
def known(kind: str) -> frozenset[str]:
    """Keys of config.json that some code of transformers reads for a model of this type."""
    family = table()["families"][kind]
    return frozenset({*family["defaults"], *family["aliases"], *family["other"], *table()["shared"]})


def _check(kind: str, key: str, value: Any, read: Collection[str]) -> None:
    family = table()["families"][kind]
    kinds = family["types"].get(key) or _KINDS.get(key)
    sort = status(kind, key, read)
    if kinds and sort in ("read", "rejected") and not is_of(value, kinds):
        raise ConfigError(f"{key}={short(value)} is not {' or '.join(kinds)}")
    if sort != "rejected" or value == family["defaults"].get(key) or (key not in family["defaults"] and value in _OFF):
        return
    default = family["defaults"].get(key)
    raise ConfigError(f"{kind} with {key}={short(value)} is not supported, only {default!r}")


def is_of(value: Any, kinds: Collection[str]) -> bool:
    """True if a JSON value is of one of these kinds: bool, int, float, str, list, dict, null, any."""
    kind = "null" if value is None else type(value).__name__
    return kind in kinds or "any" in kinds or (kind == "int" and "float" in kinds)


def short(value: Any) -> str:
    """A value as messages show it."""
    try:
        text = repr(value)
    except RecursionError:
        text = type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


def default(config: Settings, key: str) -> Any:
    """The value of a key of config.json, or its default in the transformers class of the model."""
    family = table()["families"].get(config.get("model_type", ""), {"defaults": {}})
    return config[key] if key in config else family["defaults"].get(key)
