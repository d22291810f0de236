"""Refuses a config that cannot work, in one line that names the keys and what would do."""

import dataclasses
import fnmatch
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from lslm_jax.config import (
    ROLES,
    Config,
    DataConfig,
    GenerateConfig,
    MixtureSource,
    ModelConfig,
    Source,
    TokenizerConfig,
    loading,
    mesh_axes,
)
from lslm_jax.config.mesh_axes import multiples
from lslm_jax.errors import ConfigError


def validate(config: Config) -> Config:
    """Returns the config with derived sizes filled in and `~` expanded in paths.

    Raises:
      ConfigError: the first impossible value or combination. What depends on the number of devices is checked by
        `sharding.make_mesh`, what depends on the vocabulary by `resolve_vocabulary`.
    """
    config = loading.expand_home(config)
    for message in _problems(config):
        raise ConfigError(message)
    return replace(config, model=fill_sizes(config.model))


def fill_sizes(model: ModelConfig) -> ModelConfig:
    """Replaces the zeros that mean "derived from the others" by their values."""
    return replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.d_model // model.num_heads,
        d_ff=model.d_ff or 4 * model.d_model,
        num_decoder_layers=model.num_decoder_layers or model.num_layers,
    )


def projections(model: ModelConfig) -> list[str]:
    """Names of what `model.lora_targets` may name: the projections of a block."""
    parts = [f"attention.{name}" for name in "qkvo"]
    parts += [f"cross.{name}" for name in "qkvo"] if model.family == "encoder_decoder" else []
    mlp = ["shared"] * (model.shared_experts > 0) if model.num_experts else ["mlp"]
    return [*parts, *(f"{name}.{part}" for name in mlp for part in ("up", *["gate"] * model.gated, "down"))]


def resolve_vocabulary(model: ModelConfig, tokens: int) -> ModelConfig:
    """Sets the vocabulary for a tokenizer of `tokens` ids.

    Raises:
      ConfigError: model.vocab_size was given and is too small for the tokenizer.
    """
    if model.vocab_size and model.vocab_size < tokens:
        raise ConfigError(f"model.vocab_size={model.vocab_size} is smaller than the tokenizer's {tokens} tokens")
    return replace(model, vocab_size=model.vocab_size or tokens)


def resolve_labels(model: ModelConfig, labels: int) -> ModelConfig:
    """Sets the number of labels that a head tells apart.

    Raises:
      ConfigError: model.num_labels was given and is too small for the data.
    """
    if model.num_labels and model.num_labels < labels:
        raise ConfigError(f"model.num_labels={model.num_labels} is smaller than the data's {labels} labels")
    return replace(model, num_labels=model.num_labels or labels)


def _problems(config: Config) -> Iterator[str]:
    yield from _out_of_range(config)
    yield from _too_large(config)
    yield from _tokenizer_problems(config.tokenizer)
    yield from _model_problems(config.model)
    yield from _data_problems(config.data)
    yield from _task_problems(config)
    yield from _run_problems(config)
    yield from mesh_axes.problems(replace(config, model=fill_sizes(config.model)))


_POSITIVE = (
    "model.num_layers model.d_model model.num_heads model.max_length model.rope_theta model.rope_fraction "
    "model.rope_factor model.rope_low_factor model.rope_high_factor model.rope_original_length model.norm_eps "
    "model.relative_buckets model.relative_distance data.seq_len task.span_length task.stride task.max_answer "
    "data.shard_tokens tokenizer.vocab_size tokenizer.sample_bytes train.steps train.batch_size train.accumulate "
    "train.spike_steps model.lora_alpha optimizer.learning_rate optimizer.eps checkpoint.every checkpoint.keep "
    "log.every model.experts_per_token model.pipeline_rounds generate.max_tokens generate.repetition_penalty "
    "generate.beams"
).split()
_NOT_NEGATIVE = (
    "seed model.num_kv_heads model.head_dim model.d_ff model.num_decoder_layers model.vocab_size model.num_labels "
    "model.token_types model.lora_rank model.window model.position_offset model.rope_local_theta "
    "model.attention_scale model.attention_softcap model.logit_softcap model.num_experts model.shared_experts "
    "model.expert_capacity model.microbatches data.source_len train.balance_loss train.router_z_loss train.watchdog "
    "train.spike train.check_copies data.max_documents clean.min_chars clean.max_chars train.loss_chunk train.z_loss "
    "optimizer.warmup_steps optimizer.weight_decay optimizer.clip checkpoint.keep_every checkpoint.export_every "
    "eval.every eval.batches generate.temperature generate.top_k train.resume_from train.epochs"
).split()
_BELOW_ONE = (
    "model.dropout data.valid_fraction task.mask_rate train.label_smoothing train.ema optimizer.b1 optimizer.b2 "
    "generate.min_p"
).split()


# Largest values. Other whole numbers must fit into int32, as they do on devices.
_INT32 = (1 << 31) - 1
_LARGEST = {
    "seed": (1 << 32) - 1,  # of larger ones jax would drop the upper bits, and so give several seeds the same weights
    "model.num_layers": 10_000,
    "model.num_decoder_layers": 10_000,
    "model.d_model": 1 << 24,
    "model.d_ff": 1 << 24,
    "model.head_dim": 1 << 20,
    "model.num_heads": 1 << 16,
    "model.num_kv_heads": 1 << 16,
    "model.num_experts": 1 << 16,
    "model.num_labels": 1 << 24,
    "train.batch_size": 1 << 24,
    "data.shard_tokens": 1 << 62,
    "data.max_documents": 1 << 62,
    "tokenizer.sample_bytes": 1 << 62,
    "clean.min_chars": 1 << 62,
    "clean.max_chars": 1 << 62,
}


def _too_large(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        key, value = f"{prefix}{field.name}", getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from _too_large(value, f"{key}.")
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                yield f"{key} must be finite, got {number}"
            elif isinstance(number, int) and abs(number) > (most := _LARGEST.get(key, _INT32)):
                yield (
                    f"{key} must be at most {most}, got {number:.4g}" if abs(number) < 1e300 else f"{key} is too large"
                )


def _out_of_range(config: Config) -> Iterator[str]:
    def value(key: str) -> float:
        section, _, name = key.rpartition(".")
        return getattr(getattr(config, section) if section else config, name)

    yield from (f"{key} must be positive, got {value(key)}" for key in _POSITIVE if not value(key) > 0)
    yield from (f"{key} must not be negative, got {value(key)}" for key in _NOT_NEGATIVE if not value(key) >= 0)
    yield from (f"{key} must be in [0, 1), got {value(key)}" for key in _BELOW_ONE if not 0 <= value(key) < 1)
    for key in (
        "generate.top_p",
        "optimizer.final_ratio",
        "optimizer.warmup_from",
        "model.rope_fraction",
    ):
        if not 0 <= value(key) <= 1:
            yield f"{key} must be in [0, 1], got {value(key)}"


_OWN_SYMBOLS = re.compile(r"<(pad|s|/s|unk|0x[0-9A-F]{2})>")


def _tokenizer_problems(tokenizer: TokenizerConfig) -> Iterator[str]:
    if not 0.98 <= tokenizer.character_coverage <= 1:
        yield f"tokenizer.character_coverage must be in [0.98, 1], got {tokenizer.character_coverage}"
    symbols = tokenizer.user_symbols
    if len(set(symbols)) < len(symbols) or "" in symbols:
        yield f"tokenizer.user_symbols must differ and not be empty, got {', '.join(symbols)}"
    if own := list(filter(_OWN_SYMBOLS.fullmatch, symbols)):
        yield f"tokenizer.user_symbols={own[0]} is a token of any trained vocabulary: choose another marker"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    if not model.head_dim and model.d_model % model.num_heads:
        yield (
            f"model.d_model={model.d_model} is not divisible by model.num_heads={model.num_heads}: "
            f"set model.head_dim or use d_model={multiples(model.d_model, model.num_heads)}"
        )
    full = fill_sizes(model)
    if full.num_heads % full.num_kv_heads:
        yield f"model.num_heads={full.num_heads} is not divisible by model.num_kv_heads={full.num_kv_heads}"
    if full.positions == "rotary" and full.head_dim * full.rope_fraction % 2:
        width = f"{full.head_dim} (model.head_dim)" + f" * {full.rope_fraction}" * (full.rope_fraction < 1)
        yield f"rotary positions need an even head width, got {width}"
    if full.attention == "cudnn" and full.activations != "bfloat16":
        yield "model.attention=cudnn needs model.dtype=bfloat16"
    yield from _layer_problems(full)
    yield from _expert_problems(full)
    if full.positions == "relative" and full.relative_buckets < 4:
        yield f"model.relative_buckets={full.relative_buckets} tells too little apart: use 4 or more"
    if full.positions == "relative" and 2 * full.relative_distance <= full.relative_buckets:
        yield (
            f"model.relative_distance={full.relative_distance} is too small for "
            f"model.relative_buckets={full.relative_buckets}: use more than half as much"
        )
    for pattern in full.lora_targets if full.lora_rank else ():
        if not fnmatch.filter(projections(full), pattern):
            yield f"model.lora_targets={pattern} names no projection: there are {', '.join(projections(full))}"
    if full.token_types and full.family != "encoder":
        yield f"model.token_types={full.token_types} needs model.family=encoder"
    if full.num_decoder_layers != full.num_layers and full.family != "encoder_decoder":
        yield f"model.num_decoder_layers={full.num_decoder_layers} needs model.family=encoder_decoder"


def _layer_problems(model: ModelConfig) -> Iterator[str]:
    kinds = set(model.layer_types)
    if "window" in kinds and not model.window:
        yield "model.layer_types=window needs model.window, the reach of these layers"
    if kinds and "window" not in kinds and model.window:
        yield f"model.window={model.window} needs a layer of model.layer_types that sees it"
    if model.rope_local_theta and not model.window:
        yield f"model.rope_local_theta={model.rope_local_theta} needs model.window: it is for layers that see one"
    rotary = {"model.rope_local_theta": model.rope_local_theta > 0, "model.layer_types=no_rope": "no_rope" in kinds}
    rotary["model.rope_scaling"] = model.rope_scaling != "none"
    for key, used in rotary.items():
        if used and model.positions != "rotary":
            yield f"{key} needs model.positions=rotary, not {model.positions}"
    if model.rope_scaling == "llama3" and not model.rope_low_factor < model.rope_high_factor:
        yield (
            f"model.rope_low_factor={model.rope_low_factor} must be smaller than "
            f"model.rope_high_factor={model.rope_high_factor}"
        )
    if model.position_offset and model.positions != "learned":
        yield f"model.position_offset={model.position_offset} needs model.positions=learned, not {model.positions}"
    if model.parallel and (model.norm_place != "before" or model.family == "encoder_decoder"):
        yield "model.parallel needs model.norm_place=before and a model without cross-attention"


def _expert_problems(model: ModelConfig) -> Iterator[str]:
    if 0 < model.num_experts < model.experts_per_token:
        yield (
            f"model.experts_per_token={model.experts_per_token} is more than model.num_experts={model.num_experts}: "
            f"use at most {model.num_experts}"
        )
    for key in ("shared_experts", "expert_capacity"):
        if getattr(model, key) and not model.num_experts:
            yield f"model.{key}={getattr(model, key)} needs model.num_experts"


def _data_problems(data: DataConfig) -> Iterator[str]:
    for source in data.mixture or (data,):
        yield from _source_problems(source)
    names = [source.name for source in data.mixture]
    if len(set(names)) < len(names):
        yield f"data.mixture names must differ, got {', '.join(names)}"
    if data.chat_template and not data.is_chat:
        yield f"data.chat_template={data.chat_template} needs data.example=chat"
    if data.packing != "stream" and not data.mask_documents:
        yield f"data.packing={data.packing} needs data.mask_documents=true: several pieces or padding share a row"


def _source_problems(source: Source) -> Iterator[str]:
    where = f"data.mixture source {source.name}:" if isinstance(source, MixtureSource) else "data:"
    if source.source == "files" and not source.files:
        yield f"{where} source=files needs files"
    if source.source == "tfds" and not source.tfds:
        yield f"{where} source=tfds needs tfds, the data set's name"
    if isinstance(source, MixtureSource):
        if source.source in ("shards", "synthetic"):
            yield f"{where} source={source.source} cannot be part of a mixture"
        if not source.weight > 0:
            yield f"{where} weight must be positive, got {source.weight}"
        if not source.name.isidentifier() or source.name in ("train", "valid", "test"):
            yield f"{where} the name must be a plain word other than train, valid and test"
    ways = [name for name in ("valid_files", "valid_fraction", "valid_split") if getattr(source, name)]
    if len(ways) > 1:
        yield f"{where} {' and '.join(ways)} exclude each other: validation is held out in one way"
    ways += [name for name in ("test_files", "test_split") if getattr(source, name)]
    for name in ways:
        if (name.endswith("_split") and source.source != "tfds") or (
            name.endswith("_files") and source.source != "files"
        ):
            yield f"{where} {name} does not go with source={source.source}"
    if source.example == "pair" and source.source == "tfds" and not source.target_key:
        yield f"{where} example=pair needs target_key, the feature that holds the target"
    if source.separator and source.document == "line":
        yield f"{where} separator and document=line exclude each other"
    if source.input_key and not (source.example == "chat" and source.target_key):
        yield f"{where} input_key={source.input_key} needs example=chat and target_key"
    if source.roles and source.example != "chat":
        yield f"{where} roles={','.join(source.roles)} needs example=chat"
    if source.separator and source.example != "text":
        yield f"{where} separator needs example=text"
    for entry in source.roles:
        name, equals, role = entry.partition("=")
        if not (name and equals and role in ROLES):
            yield f"{where} roles wants NAME=ROLE with ROLE one of {', '.join(ROLES)}; got {entry!r}"
    if len(set(source.labels)) < len(source.labels):
        yield f"{where} labels must differ, got {', '.join(source.labels)}"


_EXAMPLES = {
    "causal": ("text", "chat"),
    "masked": ("text",),
    "span_corruption": ("text",),
    "seq2seq": ("pair", "label", "qa"),
    "classification": ("label",),
    "regression": ("label",),
    "tagging": ("tags",),
    "qa": ("qa",),
}
_FAMILIES = {
    "causal": ("decoder",),
    "span_corruption": ("encoder_decoder",),
    "seq2seq": ("encoder_decoder", "decoder"),
}


def _task_problems(config: Config) -> Iterator[str]:
    objective, family = config.task.objective, config.model.family
    families = _FAMILIES[objective] if objective in _FAMILIES else ("encoder",)
    if family not in families:
        yield f"task.objective={objective} needs model.family={' or '.join(families)}, not {family}"
    kinds = _EXAMPLES[objective]
    if config.task.multi_label and objective != "classification":
        yield f"task.multi_label needs task.objective=classification, not {objective}"
    sources = {source.source for source in config.data.mixture or (config.data,)}
    if config.task.multi_label and sources & {"files", "tfds"}:
        yield "task.multi_label: a head that judges each class by itself answers prompts; it is not trained or scored"
    for source in config.data.mixture or (config.data,):
        where = f"data.mixture source {source.name}:" if isinstance(source, MixtureSource) else "data:"
        if source.source != "synthetic" and source.example not in kinds:
            yield f"{where} task.objective={objective} learns from example={' or '.join(kinds)}, not {source.example}"
    if objective == "causal" and len({source.example for source in config.data.mixture}) > 1:
        yield "data.mixture: conversations (example=chat) are mixed with conversations only"


_LOWEST_IS_BEST = ("loss", "perplexity", "pseudo_perplexity", "bits_per_byte", "mse")
_HIGHEST_IS_BEST = ("accuracy", "bleu", "chrf", "exact_match", "f1", "f1_macro", "matthews", "pearson", "spearman")


def highest_is_best(metric: str) -> bool:
    """Whether more is better of an evaluation metric, as `eval/bleu`; `eval/SOURCE/NAME` is judged by its name."""
    return metric.rpartition("/")[-1] in _HIGHEST_IS_BEST


def _run_problems(config: Config) -> Iterator[str]:
    train, data = config.train, config.data
    for key in ("seq_len", "source_len"):
        if (length := getattr(data, key)) > config.model.max_length:
            yield f"data.{key}={length} is longer than model.max_length={config.model.max_length}"
    if data.source_len and config.model.family != "encoder_decoder":
        yield f"data.source_len={data.source_len} needs model.family=encoder_decoder"
    if train.batch_size % train.accumulate:
        yield (
            f"train.batch_size={train.batch_size} is not divisible by train.accumulate={train.accumulate}: "
            f"use {multiples(train.batch_size, train.accumulate)}"
        )
    if train.epochs and data.source == "synthetic" and not data.mixture:
        yield f"train.epochs={train.epochs} needs data that end, not data.source=synthetic: set train.steps"
    if train.reproducible and (train.batch_size % 8 or train.accumulate > 1):
        yield (
            f"train.reproducible works through eight parts of a batch: set train.accumulate=1 and "
            f"train.batch_size={multiples(train.batch_size, 8)}"
        )
    if train.reproducible and config.optimizer.offload:
        yield "train.reproducible keeps moments on devices: leave optimizer.offload alone"
    if config.optimizer.nesterov and config.optimizer.name in ("adafactor", "lion"):
        yield f"optimizer.nesterov does not go with optimizer.name={config.optimizer.name}"
    if not 0 < config.optimizer.layer_decay <= 1:
        yield f"optimizer.layer_decay must be in (0, 1], got {config.optimizer.layer_decay}"
    yield from _export_problems(config)
    best, names = config.checkpoint.best, (*_LOWEST_IS_BEST, *_HIGHEST_IS_BEST)
    if best and not (best.startswith("eval/") and best.rpartition("/")[-1] in names):
        yield f"checkpoint.best wants eval/NAME with NAME one of {', '.join(names)}; got {best!r}"
    if config.generate.prompts and config.task.objective in ("qa", "span_corruption"):
        yield f"generate.prompts do not go with task.objective={config.task.objective}"
    yield from generate_problems(config.generate)
    profile = config.log.profile
    if profile and (len(profile) != 2 or not 0 <= profile[0] <= profile[1]):
        yield f"log.profile wants a first and a last step, as 100,105, got {','.join(map(str, profile))}"


def _export_problems(config: Config) -> Iterator[str]:
    every, export = config.checkpoint.every, config.checkpoint.export_every
    if export % every:
        yield (
            f"checkpoint.export_every={export} is not a multiple of checkpoint.every={every}, so that each export has "
            f"its checkpoint: use {multiples(export, every)}"
        )
    if export and config.data.source == "synthetic" and not config.data.mixture:
        yield f"checkpoint.export_every={export} needs a vocabulary, which data.source=synthetic lacks"


_DRAWING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "lookup")


def generate_problems(generate: GenerateConfig) -> Iterator[str]:
    """What is wrong with settings of generation."""
    if "" in generate.stop:
        yield "generate.stop holds an empty string, which would end every text at once"
    if generate.forced_eos and generate.lookup:
        yield "generate.forced_eos does not go with generate.lookup"
    if not 0 <= generate.lookup <= 16:  # each is drawn for in a part of the program of its own
        yield f"generate.lookup must be in [0, 16], got {generate.lookup}"
    if not all(generate.bad_words_ids):
        yield "generate.bad_words_ids holds an empty sequence, which would forbid every token"
    if generate.no_repeat_ngram_size < 0 or generate.min_new_tokens < 0:
        yield "generate.no_repeat_ngram_size and generate.min_new_tokens must not be negative"
    neutral = [GenerateConfig(), GenerateConfig(temperature=0.0)]
    if generate.early_stopping != "exact":  # a search as in transformers
        neutral.append(GenerateConfig(repetition_penalty=generate.repetition_penalty))
    drawing = [name for name in _DRAWING if getattr(generate, name) not in [getattr(each, name) for each in neutral]]
    if generate.beams > 1 and drawing:
        yield (
            f"generate.beams={generate.beams} looks for the likeliest text and draws none: "
            f"leave {', '.join(f'generate.{name}' for name in drawing)} alone"
        )
