"""Every key of a directory's JSON files is read, irrelevant, or rejected by name."""

import json
from collections import Counter

import pytest
from etils import epath

from lslm_jax.config import validation
from lslm_jax.convert import generation, gguf, hf_keys, peft_files, pretrained
from lslm_jax.convert.hf_mapping import Family
from lslm_jax.data.tokenizers import gguf as gguf_files
from lslm_jax.data.tokenizers.bytes import Bytes
from lslm_jax.data.tokenizers.huggingface import HuggingFace
from lslm_jax.errors import ConfigError, DataError, LslmError

BY_NAME = {
    family.model_type: family for family in pretrained.FAMILIES if family is not pretrained.hf_encoder_decoders.T5_GATED
}
FAMILY_IDS = [f"{family.model_type}{i}" for i, family in enumerate(pretrained.FAMILIES)]


def read(kind, **changes):
    return BY_NAME[kind].read({"model_type": kind} | changes)


@pytest.mark.parametrize("family", pretrained.FAMILIES, ids=FAMILY_IDS)
def test_each_key_of_a_family_is_read_or_irrelevant_or_rejected(family):
    table = hf_keys.table()["families"][family.model_type]
    known = {*table["defaults"], *table["other"]} - {*table["aliases"]}
    counts = Counter(hf_keys.status(family.model_type, key, family.keys) for key in known)
    assert set(counts) == {"read", "irrelevant", "rejected"}
    unknown = family.keys - hf_keys.known(family.model_type) - {*OLD}
    assert not unknown, "a key that is read must be one of transformers"


# Settings of models of before that transformers 5 leaves out; another value is another model.
OLD = {"position_embedding_type", "scale_decoder_outputs", "static_position_embeddings", "normalize_before"}
OLD |= {"normalize_embedding", "add_final_layer_norm"}


class Recorder(dict):
    """A dict that notes which of its keys are read."""

    def __init__(self, *args):
        super().__init__(*args)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)


@pytest.mark.parametrize("family", pretrained.FAMILIES, ids=FAMILY_IDS)
def test_a_family_reads_no_key_that_it_does_not_declare(family: Family, monkeypatch):
    recorders = []

    def resolve(kind, given, read):
        recorders.append(Recorder(hf_keys.table()["families"][kind]["defaults"] | given))
        return recorders[0]

    monkeypatch.setattr(hf_keys, "resolve", resolve)
    family.read(dict(family.demands))
    assert recorders[0].read <= family.keys | {"max_position_embeddings", "num_hidden_layers"}


REJECTED = [
    ("llama", {"attention_bias": True}, "llama with attention_bias=True is not supported, only False"),
    ("llama", {"mlp_bias": True}, "llama with mlp_bias=True"),
    ("llama", {"hidden_act": None}, "hidden_act=None is not str"),
    ("llama", {"sliding_window": 4096}, "llama with sliding_window=4096"),  # the cache of transformers reads it
    ("llama", {"layer_types": ["full_attention"]}, "llama with layer_types="),
    ("llama", {"quantization_config": {"bits": 4}}, "llama with quantization_config="),
    ("llama", {"per_layer_config": {"0": {}}}, "llama with per_layer_config="),
    ("llama", {"partial_rotary_factor": 0.5}, "llama with partial_rotary_factor=0.5"),
    ("llama", {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "type yarn"),
    ("llama", {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"rope_type": "yarn"}}, "type yarn"),
    ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor=None"),
    ("llama", {"rope_scaling": 4.0}, "rope_scaling=4.0 is not dict or null"),
    ("llama", {"num_attention_heads": 0}, "num_attention_heads=0 must be from 1"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 must be from 1 to 10,000"),
    ("llama", {"head_dim": -8}, "head_dim=-8 must be positive"),
    (
        "gpt_neox",
        {"hidden_size": 48, "num_attention_heads": 4},
        "rope_parameters (or rotary_pct) rotates 3 of 12 features",
    ),
    ("gpt2", {"n_head": 0}, "n_head=0 must be from 1"),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "gpt2 with scale_attn_by_inverse_layer_idx=True"),
    ("gpt2", {"n_layer": 4, "num_hidden_layers": 5}, "num_hidden_layers=5 contradicts n_layer=4"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0 must be positive, or null for none"),
    ("gemma2", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping=0.0 must be positive"),
    ("gemma2", {"use_bidirectional_attention": True}, "gemma2 with use_bidirectional_attention=True"),
    ("gemma2", {"layer_types": ["full_attention"]}, "layer_types must list num_hidden_layers=26 layers, not 1"),
    ("gemma3_text", {"num_hidden_layers": 10**10}, "num_hidden_layers=10000000000 must be from 1 to 10,000"),
    ("gemma3_text", {"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters.rope_theta is not supported"),
    ("qwen2", {"layer_types": ["sliding_attention"] * 32}, "sliding_window is null or use_sliding_window false"),
    ("smollm3", {"no_rope_layers": [1, 0]}, "no_rope_layers must list num_hidden_layers=36 numbers"),
    ("bert", {"position_embedding_type": "relative_key"}, "bert with position_embedding_type='relative_key'"),
    ("bert", {"is_decoder": True}, "bert with is_decoder=True"),
    ("roberta", {"pad_token_id": None}, "pad_token_id=None must be from 0"),
    ("roberta", {"pad_token_id": 2}, "pad_token_id=2 is the eos_token_id too"),
    ("modernbert", {"classifier_pooling": "max"}, "classifier_pooling=max is not among cls, mean"),
    ("modernbert", {"classifier_activation": "silu"}, "classifier_activation=silu is not among gelu, relu"),
    ("t5", {"d_kv": 16, "feed_forward_proj": "silu"}, "t5 with feed_forward_proj='silu'"),
    ("t5", {"relative_attention_max_distance": 16}, "relative_attention_max_distance=16 above 16, half of it"),
    ("t5", {"dense_act_fn": "gelu_new"}, "dense_act_fn='gelu_new' beside feed_forward_proj=relu"),
    ("marian", {"decoder_vocab_size": 7}, "marian with decoder_vocab_size=7 and vocab_size=58101"),
]


@pytest.mark.parametrize(("kind", "changes", "message"), REJECTED, ids=[f"{k}-{next(iter(c))}" for k, c, _ in REJECTED])
def test_a_setting_that_would_change_the_model_is_rejected_by_name(kind, changes, message):
    with pytest.raises(ConfigError) as error:
        read(kind, **changes)
    assert message in str(error.value)


@pytest.mark.parametrize(("theirs", "ours"), [("gelu", "gelu_exact"), ("relu", "relu")])
def test_the_activation_of_a_classifier_is_read_and_written(theirs, ours):
    model = read("modernbert", classifier_activation=theirs)
    assert (model.head_activation, model.activation) == (ours, "gelu_exact")
    assert BY_NAME["modernbert"].write(model)["classifier_activation"] == theirs
    assert read("modernbert").head_activation == "gelu_exact"


def test_missing_keys_have_the_defaults_of_the_class():
    gemma, olmo = read("gemma2"), read("olmo2")
    assert (gemma.attention_softcap, gemma.logit_softcap, gemma.window) == (50.0, 30.0, 4096)
    assert (olmo.norm_eps, read("llama").norm_eps) == (1e-5, 1e-6)
    mistral = read("mistral")
    assert (mistral.window, mistral.num_kv_heads, read("mistral", sliding_window=None).window) == (4096, 8, 0)
    assert read("mixtral").window == 0
    assert (read("qwen3").head_dim, read("smollm3").num_kv_heads) == (128, 4)
    assert read("gemma2", attn_logit_softcapping=None).attention_softcap == 0.0
    assert read("llama", num_key_value_heads=None).num_kv_heads == 32


def test_rope_scaling_takes_the_place_of_rope_parameters():
    both = {"rope_parameters": {"rope_type": "default", "rope_theta": 3.0}, "rope_theta": 7.0}
    linear = read("llama", **both, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert (linear.rope_scaling, linear.rope_factor, linear.rope_theta) == ("linear", 4.0, 7.0)
    assert read("llama", **both).rope_theta == 3.0
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    assert read("llama", rope_scaling=llama3, max_position_embeddings=77).rope_original_length == 77


def test_keys_without_effect_and_keys_of_nobody_are_no_matter():
    plain = read("llama")
    assert read("llama", attention_dropout=0.3, use_cache=False, torch_dtype="float16", pretraining_tp=2) == plain
    assert read("llama", my_note="made on a Monday", sliding_window=None, add_bias=False) == plain
    assert read("llama", num_beams=4, max_length=20) == plain, "settings of generation are read elsewhere"
    assert read("modernbert", layer_norm_eps=0.5, position_embedding_type="absolute") == read("modernbert")


def test_positions_of_t5_have_no_limit():
    assert read("t5", n_positions=64).max_length == read("t5").max_length > 100_000


def generation_of(tmp_path, content, config=None, **changes):
    (tmp_path / "generation_config.json").write_text(json.dumps(content | changes))
    return generation.read(epath.Path(tmp_path), config or {"model_type": "llama"}, Bytes())


def test_each_key_of_generation_and_adapters_has_a_status():
    counts = Counter(map(generation.status, hf_keys.table()["generation"]))
    assert counts["read"] >= 18 and counts["irrelevant"] >= 20 and counts["rejected"] >= 20
    counts = Counter(map(peft_files.status, hf_keys.table()["adapter"]["defaults"]))
    assert counts["read"] >= 12 and counts["irrelevant"] >= 10 and counts["rejected"] >= 10


UNSUPPORTED = {
    "min_length": 5,
    "bad_words_ids": [[4, 5], []],
    "forced_bos_token_id": 4,
    "sequence_bias": [[[5], 1.0]],
    "encoder_repetition_penalty": 1.5,
    "exponential_decay_length_penalty": [5, 1.1],
    "guidance_scale": 2.0,
    "penalty_alpha": 0.6,
    "num_beam_groups": 2,
    "stop_strings": ["x"],
    "max_time": 3.0,
    "max_length": 30,
    "num_return_sequences": 2,
    "decoder_start_token_id": 9,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_a_setting_of_generation_that_would_change_the_text_is_rejected_by_name(key, tmp_path):
    config = {"model_type": "llama", "decoder_start_token_id": 1, "max_position_embeddings": 64}
    with pytest.raises(ConfigError, match=key):
        generation_of(tmp_path, {"eos_token_id": 2, key: UNSUPPORTED[key]}, config)


def test_settings_of_generation_are_those_of_transformers(tmp_path):
    beams = generation_of(tmp_path, {"num_beams": 4, "eos_token_id": [2, 7], "length_penalty": 2.0})
    assert (beams.early_stopping, beams.length_penalty, beams.stop_ids) == ("heuristic", 2.0, (7,))
    assert generation_of(tmp_path, {"num_beams": 4, "early_stopping": True}).early_stopping == "first"
    drawn = generation_of(tmp_path, {"do_sample": True, "temperature": 0.5, "eos_token_id": 2})
    assert (drawn.temperature, drawn.top_k, drawn.top_p) == (0.5, 50, 1.0), "top_k is 50 unless it is given"
    greedy = generation_of(tmp_path, {"temperature": 0.5, "top_k": 3, "typical_p": 0.4, "suppress_tokens": [5, 6]})
    assert (greedy.temperature, greedy.never_ids) == (0.0, (5, 6))
    assert not generation_of(tmp_path, {"eos_token_id": 9}).eos, "that of the tokenizer then ends nothing"
    assert generation_of(tmp_path, {"eos_token_id": 2, "bad_words_ids": [[2], [5]]}).never_ids == (5,)
    assert generation_of(tmp_path, {"eos_token_id": 2, "max_new_tokens": 33}).max_tokens == 33
    (tmp_path / "generation_config.json").unlink()
    config = {"model_type": "llama", "eos_token_id": [2, 9]}
    assert generation.read(epath.Path(tmp_path), config, Bytes()).stop_ids == (9,), "config.json stands in"


CONSTRAINTS = {"no_repeat_ngram_size": 3, "min_new_tokens": 4, "begin_suppress_tokens": [5], "bad_words_ids": [[4, 5]]}
CONSTRAINTS |= {"repetition_penalty": 1.5, "suppress_tokens": [6], "eos_token_id": 2}


@pytest.mark.parametrize("beams", [1, 3])
def test_constraints_of_a_text_are_read_and_written(beams, tmp_path):
    ours = generation_of(tmp_path, CONSTRAINTS, num_beams=beams)
    assert (ours.no_repeat_ngram_size, ours.min_new_tokens, ours.begin_suppress_tokens) == (3, 4, (5,))
    assert (ours.bad_words_ids, ours.repetition_penalty, ours.never_ids) == (((4, 5),), 1.5, (6,))
    assert ours.renormalize == (beams == 1), "transformers does not, unless renormalize_logits is true"
    theirs = generation.write(ours, {"bos": 1, "eos": 2, "pad": 0}, "decoder")
    assert CONSTRAINTS.items() <= theirs.items() and not list(validation.generate_problems(ours))
    pair = {"model_type": "t5", "is_encoder_decoder": True}
    assert generation_of(tmp_path, {"min_length": 5, "eos_token_id": 2}, pair).min_new_tokens == 4, "start is one"


def adapter_of(tmp_path, **changes):
    content = {"peft_type": "LORA", "base_model_name_or_path": "base", "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(content | changes))
    return peft_files.describe(epath.Path(tmp_path))


BAD_ADAPTERS = {
    "init_lora_weights": "pissa",
    "use_dora": True,
    "lora_bias": True,
    "bias": "all",
    "layer_replication": [[0, 2]],
    "trainable_token_indices": [3],
    "target_parameters": ["a"],
    "ensure_weight_tying": True,
    "use_qalora": True,
    "r": "8",
    "lora_alpha": 0,
    "something_new": True,
}


@pytest.mark.parametrize("key", BAD_ADAPTERS)
def test_a_setting_of_an_adapter_that_would_change_it_is_rejected_by_name(key, tmp_path):
    with pytest.raises(ConfigError, match=key):
        adapter_of(tmp_path, **{key: BAD_ADAPTERS[key]})
    assert adapter_of(tmp_path, init_lora_weights="gaussian", lora_dropout=0.3, layers_pattern=None).settings["r"] == 4


def test_an_adapter_whose_model_is_itself_is_refused(tmp_path):
    adapter_of(tmp_path, base_model_name_or_path=str(tmp_path))
    with pytest.raises(LslmError, match="base_model_name_or_path names the adapter itself"):
        pretrained.describe(tmp_path)


HOSTILE = {
    "a directory": (lambda path: path.mkdir(), DataError, "is a directory, not a file"),
    "nested lists": (lambda path: path.write_text("[" * 5000 + "]" * 5000), DataError, "config.json"),
    "a list": (lambda path: path.write_text("[]"), DataError, "does not hold a JSON object"),
}


@pytest.mark.parametrize(("make", "error", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_config_is_refused_in_a_line(make, error, message, tmp_path):
    make(tmp_path / "config.json")
    with pytest.raises(error, match=message):
        pretrained.describe(tmp_path)


@pytest.mark.parametrize("counts", [(0, 2**31), (2**60, 1), (2**31, 2**31)])
def test_a_gguf_file_that_announces_more_than_it_holds_is_refused_at_once(counts, tmp_path):
    path = tmp_path / "model.gguf"
    numbers = b"".join(number.to_bytes(8, "little") for number in counts)
    path.write_bytes(b"GGUF" + (3).to_bytes(4, "little") + numbers + bytes(36))
    with pytest.raises(DataError, match=rf"announces {counts[0]} tensors and {counts[1]} entries"):
        pretrained.describe(path)


def test_a_gguf_file_without_a_size_is_refused_by_its_key(tmp_path, monkeypatch):
    kept = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
    kept |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5}
    for missing in kept:
        theirs = {f"llama.{key}": value for key, value in kept.items() if key != missing}
        theirs |= {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}
        monkeypatch.setattr(gguf, "open_file", lambda path, theirs=theirs: (theirs, []))
        with pytest.raises(DataError, match=f"lacks llama.{missing}"):
            gguf.settings(epath.Path(tmp_path))
    theirs = {f"llama.{key}": value for key, value in kept.items()} | {"llama.attention.head_count": 0}
    theirs |= {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a"]}
    monkeypatch.setattr(gguf, "open_file", lambda path: (theirs, []))
    with pytest.raises(DataError, match="head_count=0 must be a positive number"):
        gguf.settings(epath.Path(tmp_path))


GGUF = {"block_count": 2, "context_length": 64, "embedding_length": 32, "feed_forward_length": 64}
GGUF |= {"attention.head_count": 4, "attention.layer_norm_rms_epsilon": 1e-5, "rope.dimension_count": 8}
GGUF_CHANGES = {  # further keys, and whether they are accepted
    "rope.dimension_count": (4, False),
    "attention.value_length": (16, False),
    "rope.scale_linear": (4.0, False),
    "rope.scaling.factor": (1.0, True),
    "expert_count": (8, False),
    "attention.sliding_window": (4096, False),
    "vocab_size": (2, True),
    "a.later.key": (1, False),
}


@pytest.mark.parametrize("key", GGUF_CHANGES)
def test_a_key_of_a_gguf_file_is_read_or_without_effect_or_rejected_by_name(key, monkeypatch):
    value, accepted = GGUF_CHANGES[key]
    theirs = {f"llama.{name}": known for name, known in (GGUF | {key: value}).items()}
    theirs |= {"general.architecture": "llama", "tokenizer.ggml.tokens": ["a", "b"]}
    monkeypatch.setattr(gguf, "open_file", lambda path: (theirs, []))
    if accepted:
        assert gguf.settings(epath.Path("model.gguf"))["head_dim"] == 8
    else:
        with pytest.raises(ConfigError, match=rf"model\.gguf: llama\.{key}={value}"):
            gguf.settings(epath.Path("model.gguf"))


def test_user_defined_tokens_of_a_gguf_file_are_tokens_in_text(monkeypatch):
    tokens = ["<s>", "</s>", "<think>", "<", "t", "h", ">", "th"]
    theirs = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["t h"]}
    theirs |= {"tokenizer.ggml.token_type": [3, 3, 4, 1, 1, 1, 1, 1], "tokenizer.ggml.fim_pre_token_id": 1}
    theirs |= {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1}
    monkeypatch.setattr(gguf_files, "open_file", lambda path: (theirs, []))
    words = HuggingFace(*gguf_files.vocabulary(epath.Path("model.gguf")))
    assert words.encode("<think>th<s>").tolist() == [2, 7, 3, 6], "<s> is no text"
    assert words.decode([2, 7]) == "<think>th"
    theirs["tokenizer.ggml.remove_extra_whitespaces"] = True
    with pytest.raises(ConfigError, match=r"tokenizer\.ggml\.remove_extra_whitespaces=True is not supported"):
        gguf_files.vocabulary(epath.Path("model.gguf"))
