"""generation_config.json: settings of text generation, read from a directory and written to one.

Every key is read, without effect on the text, or rejected by name when it differs from its default in transformers.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from etils import epath

from lslm_jax.config import GenerateConfig
from lslm_jax.convert import hf_keys
from lslm_jax.data.tokenizers.base import Tokenizer
from lslm_jax.errors import ConfigError
from lslm_jax.runtime import atomic_io

FILE = "generation_config.json"
Settings = Mapping[str, Any]

READ = frozenset(
    """
    bad_words_ids begin_suppress_tokens bos_token_id decoder_start_token_id do_sample early_stopping eos_token_id
    forced_eos_token_id length_penalty max_length max_new_tokens min_length min_new_tokens min_p no_repeat_ngram_size
    num_beams pad_token_id renormalize_logits repetition_penalty suppress_tokens temperature top_k top_p
    """.split()
)
# Memory, speed, further outputs, provenance, and settings that only have an effect beside one that is rejected.
IRRELEVANT = frozenset(
    """
    _from_model_config assistant_confidence_threshold assistant_early_exit assistant_lookbehind cache_config
    cache_implementation compile_config continuous_batching_config disable_compile is_assistant low_memory max_cache_len
    max_matching_ngram_size num_assistant_tokens num_assistant_tokens_schedule output_attentions output_hidden_states
    output_logits output_scores prefill_chunk_size remove_invalid_values return_dict_in_generate target_lookbehind
    transformers_version use_cache _commit_hash _original_object_hash trust_remote_code
    """.split()
)
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h")
_STOPS = {False: "heuristic", True: "first", "never": "never"}  # of a beam search


def status(key: str) -> str:
    """`read`, `irrelevant` or `rejected` (when not the default)."""
    return "read" if key in READ else "irrelevant" if key in IRRELEVANT else "rejected"


def read(directory: epath.Path, config: Settings, words: Tokenizer) -> GenerateConfig:
    """Settings as transformers would use them; sampling is off unless the file turns it on.

    Args:
      directory: of the model.
      config: its config.json, which stands in where generation_config.json is missing.
      words: its tokenizer.

    Raises:
      ConfigError: a setting would change the text in a way that is not supported here.
    """
    path = directory / FILE
    given = atomic_io.read_json(path) if directory.is_dir() and path.exists() else None
    try:
        return _read({**config} if given is None else given, config, words, strict=given is not None)
    except ConfigError as error:
        raise ConfigError(f"{directory / (FILE if given is not None else 'config.json')}: {error}") from error


def _read(given: Settings, config: Settings, words: Tokenizer, *, strict: bool) -> GenerateConfig:
    known = {key: value for key, value in given.items() if value is not None}
    if not strict:  # config.json holds much else
        known = {key: value for key, value in known.items() if key in hf_keys.table()["generation"]}
    defaults = hf_keys.table()["generation_defaults"]
    sampled = known.get("do_sample", False)
    for key, value in known.items():
        if status(key) == "rejected" and not (key in _SAMPLING and not sampled):
            _require_default(key, value, defaults)
    get = lambda key: known.get(key, defaults.get(key))
    beams = _whole(get("num_beams"), "num_beams", 1)
    _check_lengths(known, config)
    _check_start(known, config)
    ends = _ids(get("eos_token_id"), "eos_token_id")
    if not strict and "eos_token_id" not in given:
        ends = _ids(hf_keys.default(config, "eos_token_id"), "eos_token_id")
    ours = GenerateConfig(
        temperature=0.0,
        beams=beams,
        bos=words.adds_bos,
        eos=words.eos_id in ends,
        stop_ids=tuple(id for id in ends if id != words.eos_id),
        never_ids=_never(known, ends),
        bad_words_ids=tuple(word for word in _bad_words(known) if len(word) > 1),
        begin_suppress_tokens=tuple(_ids(known.get("begin_suppress_tokens"), "begin_suppress_tokens")),
        no_repeat_ngram_size=_whole(get("no_repeat_ngram_size") or 0, "no_repeat_ngram_size", 0),
        min_new_tokens=_least(known, config),
        forced_eos=_forced(get("forced_eos_token_id"), words),
    )
    if "max_new_tokens" in known:
        ours = replace(ours, max_tokens=_whole(known["max_new_tokens"], "max_new_tokens", 1))
    elif "max_length" in known and config.get("is_encoder_decoder"):
        ours = replace(ours, max_tokens=max(_whole(known["max_length"], "max_length", 2) - 1, 1))
    if sampled and beams > 1:
        raise ConfigError(f"do_sample=true with num_beams={beams} is not supported: beam search draws nothing")
    if sampled:
        return _sampling(ours, get)
    penalty = _positive(get("repetition_penalty"), "repetition_penalty")
    if beams == 1:
        return replace(ours, repetition_penalty=penalty)
    return _searching(ours, get, penalty)


def _sampling(ours: GenerateConfig, get: Any) -> GenerateConfig:
    return replace(
        ours,
        temperature=_positive(get("temperature"), "temperature"),
        top_k=_whole(get("top_k"), "top_k", 0),
        top_p=_share(get("top_p"), "top_p"),
        min_p=_share(get("min_p") or 0.0, "min_p"),
        repetition_penalty=_positive(get("repetition_penalty"), "repetition_penalty"),
    )


def _searching(ours: GenerateConfig, get: Any, penalty: float) -> GenerateConfig:
    stop, length = get("early_stopping"), get("length_penalty")
    if not isinstance(stop, bool | str) or stop not in _STOPS:
        raise ConfigError(f"early_stopping={stop!r} is not among false, true and 'never'")
    if isinstance(length, bool) or not isinstance(length, int | float):
        raise ConfigError(f"length_penalty={length!r} is not a number")
    ours = replace(ours, repetition_penalty=penalty)
    if _changes_scores(ours) and not get("renormalize_logits"):
        ours = replace(ours, renormalize=False)
    return replace(ours, early_stopping=_STOPS[stop], length_penalty=float(length))


def _changes_scores(ours: GenerateConfig) -> bool:
    """True if the scores of a beam search are no longer logarithms of probabilities that sum to 1."""
    names = ("never_ids", "bad_words_ids", "begin_suppress_tokens", "no_repeat_ngram_size", "min_new_tokens")
    return ours.repetition_penalty != 1.0 or any(getattr(ours, name) for name in names)


def _check_start(known: Settings, config: Settings) -> None:
    """The text of an encoder-decoder begins as config.json has it, in training and here."""
    expected = hf_keys.default(config, "decoder_start_token_id")
    start = known.get("decoder_start_token_id")
    if start is None and config.get("is_encoder_decoder"):
        start = known.get("bos_token_id")  # as in transformers
    if start is not None and expected is not None and start != expected:
        raise ConfigError(f"decoder_start_token_id={start} (or bos_token_id) differs from {expected} in config.json")


def _require_default(key: str, value: Any, defaults: Settings) -> None:
    if value == defaults.get(key) or (key not in defaults and value in (False, [], {}, "")):
        return
    raise ConfigError(
        f"{key}={value!r} is not supported, only {defaults.get(key)!r}: take the key out, or give --config=FILE with "
        "settings of generate"
    )


def _check_lengths(known: Settings, config: Settings) -> None:
    longest = known.get("max_length")
    limit = hf_keys.default(config, "max_position_embeddings")
    if "max_new_tokens" in known or longest is None or config.get("is_encoder_decoder"):
        return
    if (
        longest != hf_keys.table()["generation_defaults"]["max_length"]
        and limit
        and _whole(longest, "max_length", 1) < limit
    ):
        raise ConfigError(f"max_length={longest} of prompt and text together is not supported: give max_new_tokens")


def _least(known: Settings, config: Settings) -> int:
    """Tokens before a text may end. `min_length` counts what the decoder begins with, too: one token, or the prompt."""
    if known.get("min_new_tokens") is not None:
        return _whole(known["min_new_tokens"], "min_new_tokens", 0)
    least = _whole(known.get("min_length") or 0, "min_length", 0)
    if least > 1 and not config.get("is_encoder_decoder"):
        raise ConfigError(f"min_length={least} of prompt and text together is not supported: give min_new_tokens")
    return max(least - 1, 0)


def _bad_words(known: Settings) -> list[tuple[int, ...]]:
    words = known.get("bad_words_ids") or []
    if not isinstance(words, list) or not all(isinstance(word, list) and word for word in words):
        raise ConfigError(f"bad_words_ids={hf_keys.short(words)} is no list of lists of token ids")
    return [tuple(_ids(word, "bad_words_ids")) for word in words]


def _never(known: Settings, ends: list[int]) -> tuple[int, ...]:
    # Of single tokens transformers leaves out the ends of a text.
    single = [word[0] for word in _bad_words(known) if len(word) == 1 and word[0] not in ends]
    return tuple(dict.fromkeys([*_ids(known.get("suppress_tokens"), "suppress_tokens"), *single]))


def _forced(value: Any, words: Tokenizer) -> bool:
    if value is None:
        return False
    if value != words.eos_id:
        raise ConfigError(f"forced_eos_token_id={value!r} is not the tokenizer's end of text, {words.eos_id}")
    return True


def _ids(value: Any, key: str) -> list[int]:
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(id) is int and 0 <= id < 2**31 for id in ids):
        raise ConfigError(f"{key}={value!r} is no token id, or list of such")
    return list(ids)


def _whole(value: Any, key: str, least: int) -> int:
    if type(value) is not int or value < least:
        raise ConfigError(f"{key}={value!r} must be a whole number of at least {least}")
    return value


def _positive(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise ConfigError(f"{key}={value!r} must be a positive number")
    return float(value)


def _share(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ConfigError(f"{key}={value!r} must be from 0 to 1")
    return float(value)


def write(settings: GenerateConfig, tokens: Mapping[str, int], family: str) -> dict[str, Any]:
    """The content of generation_config.json by which transformers writes the same texts.

    Args:
      settings: of text generation.
      tokens: ids of bos, eos and pad.
      family: model.family.
    """
    theirs: dict[str, Any] = {f"{role}_token_id": id for role, id in tokens.items()}
    ends = [*([tokens["eos"]] if settings.eos else []), *settings.stop_ids]
    theirs["eos_token_id"] = ends[0] if len(ends) == 1 else ends or None
    theirs |= {"max_new_tokens": settings.max_tokens, "num_beams": settings.beams}
    if family == "encoder_decoder":
        theirs["decoder_start_token_id"] = tokens["bos"]
    if settings.never_ids:
        theirs["suppress_tokens"] = list(settings.never_ids)
    theirs |= {key: value for key in ("no_repeat_ngram_size", "min_new_tokens") if (value := getattr(settings, key))}
    if settings.begin_suppress_tokens:
        theirs["begin_suppress_tokens"] = list(settings.begin_suppress_tokens)
    if settings.bad_words_ids:
        theirs["bad_words_ids"] = [list(word) for word in settings.bad_words_ids]
    if settings.forced_eos:
        theirs["forced_eos_token_id"] = tokens["eos"]
    if settings.beams > 1 and settings.early_stopping != "exact":
        stop = next(theirs for theirs, ours in _STOPS.items() if ours == settings.early_stopping)
        theirs |= {"early_stopping": stop, "length_penalty": settings.length_penalty}
        theirs |= {"renormalize_logits": True} if settings.renormalize and _changes_scores(settings) else {}
    elif settings.beams > 1:
        # The nearest that transformers has: its penalty is a power of the length, without the constant.
        theirs |= {"early_stopping": "never", "length_penalty": settings.length_penalty}
    theirs["do_sample"] = settings.temperature > 0 and settings.beams == 1  # else pipelines of transformers 5 draw
    if theirs["do_sample"]:
        drawing = {"temperature": settings.temperature, "top_k": settings.top_k, "top_p": settings.top_p}
        theirs |= drawing
        theirs |= {"min_p": settings.min_p} if settings.min_p else {}
    return theirs | {"repetition_penalty": settings.repetition_penalty}
