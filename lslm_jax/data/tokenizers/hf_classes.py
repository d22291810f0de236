"""Tokenizer classes that transformers 5 builds by rules of their own, where tokenizer.json may have others.

A tokenizer.json is used here as it is: the model was trained on its ids. Where transformers would tokenize some texts
otherwise, a setting that contradicts the file is an error, and rules that differ are reported.
"""

import functools
from collections.abc import Mapping
from typing import Any

from etils import epath

from lslm_jax.errors import ConfigError
from lslm_jax.runtime.progress import say

_LETTERS = {"type": "ByteLevel", "use_regex": True}
_QWEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_PARTS = [{"type": "Split", "pattern": {"Regex": _QWEN}}, {"type": "ByteLevel", "use_regex": False}]
_T5_PARTS = [{"type": "WhitespaceSplit"}, {"type": "Metaspace"}]
_BLANKS = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
# The normalizer and the pre_tokenizer of a class, without what has no effect on ids. T5Tokenizer keeps the normalizer.
_RULES: dict[str, dict[str, Any]] = {
    "GPT2Tokenizer": {"normalizer": None, "pre_tokenizer": _LETTERS},
    "RobertaTokenizer": {"normalizer": None, "pre_tokenizer": _LETTERS},
    "GPTNeoXTokenizer": {"normalizer": {"type": "NFC"}, "pre_tokenizer": _LETTERS},
    "Qwen2Tokenizer": {
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _QWEN_PARTS},
    },
    "LlamaTokenizer": {"normalizer": None, "pre_tokenizer": {"type": "Metaspace", "split": False}},
    "GemmaTokenizer": {
        "normalizer": _BLANKS,
        "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
    },
    "T5Tokenizer": {"pre_tokenizer": {"type": "Sequence", "pretokenizers": _T5_PARTS}},
    "BertTokenizer": {
        "normalizer": {"type": "BertNormalizer", "clean_text": True},
        "pre_tokenizer": {"type": "BertPreTokenizer"},
    },
}
_RULES |= dict.fromkeys(("DistilBertTokenizer", "ElectraTokenizer"), _RULES["BertTokenizer"])
# Classes that AutoTokenizer takes where tokenizer_config.json names none; "" keeps the rules of tokenizer.json.
_REGISTERED = {
    "gpt2": "GPT2Tokenizer",
    "gpt_neox": "GPTNeoXTokenizer",
    "qwen2": "Qwen2Tokenizer",
    "qwen3": "Qwen2Tokenizer",
    "gemma2": "GemmaTokenizer",
    "gemma3_text": "GemmaTokenizer",
    "bert": "BertTokenizer",
    "distilbert": "BertTokenizer",
    "roberta": "RobertaTokenizer",
    "t5": "T5Tokenizer",
}
_GENERIC = ("mistral", "mixtral", "olmo2", "modernbert")  # keep them, whatever class is named
_FORCED = ("qwen2",)  # take the registered class, whatever class is named
_LOWER = {"do_lower_case": ("lowercase", True), "strip_accents": ("strip_accents", None)}
_LOWER |= {"tokenize_chinese_chars": ("handle_chinese_chars", True)}


def check(settings: Mapping[str, Any], model_type: str, content: Mapping[str, Any], path: epath.Path) -> None:
    """Compares a tokenizer.json with the tokenizer that transformers builds; reports rules that differ.

    Args:
      settings: content of tokenizer_config.json.
      model_type: of the config.json beside, or "".
      content: of tokenizer.json.
      path: of tokenizer_config.json.

    Raises:
      ConfigError: a setting contradicts tokenizer.json.
    """
    name = class_of(settings, model_type, content)
    for key, (given, actual) in _contradictions(name, settings, content).items():
        raise ConfigError(f"{path}: {key}={given!r}, but tokenizer.json has {actual!r}: make them agree")
    report(name, content, path.parent / "tokenizer.json")


def report(name: str, content: Mapping[str, Any], path: epath.Path) -> None:
    """Reports, once, the first part of a tokenizer.json that transformers replaces by another of this class."""
    for part, rules in _RULES.get(name, {}).items():
        if not _agrees(rules, content.get(part)):
            _report(
                f"{path}: its {part} is used as it is, but AutoTokenizer of transformers 5 replaces it by that of "
                f"{name}, which gives some texts other ids; PreTrainedTokenizerFast reads the file as it is"
            )
            return


@functools.cache
def _report(message: str) -> None:
    say(message)


def class_of(settings: Mapping[str, Any], model_type: str, content: Mapping[str, Any]) -> str:
    """The class with rules of its own that AutoTokenizer of transformers 5 builds, or "" where it reads the file."""
    named = str(settings.get("tokenizer_class") or "").removesuffix("Fast")
    if model_type in _FORCED:
        return _REGISTERED[model_type]
    if model_type in _GENERIC or (named == "LlamaTokenizer" and _adds_space(content.get("pre_tokenizer")) is not None):
        return ""
    name = named or _REGISTERED.get(model_type, "")
    return name if name in _RULES else ""


def _contradictions(name: str, settings: Mapping[str, Any], content: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ from tokenizer.json: their value, and the file's."""
    normalizer, splitter = content.get("normalizer") or {}, content.get("pre_tokenizer") or {}
    found: dict[str, tuple[Any, Any]] = {}
    if _RULES.get(name) is _RULES["BertTokenizer"] and normalizer.get("type") == "BertNormalizer":
        found = {key: (settings.get(key, default), normalizer.get(own)) for key, (own, default) in _LOWER.items()}
    elif name == "LlamaTokenizer":
        scheme = splitter.get("prepend_scheme", "always") if splitter.get("type") == "Metaspace" else None
        prefixed = scheme in ("first", "always") or "Prepend" in str(normalizer)
        if settings.get("add_prefix_space") is not None:
            found["add_prefix_space"] = settings["add_prefix_space"], prefixed
        if settings.get("legacy") is not None and scheme in ("first", "always"):
            found["legacy"] = bool(settings["legacy"]), scheme == "always"
    elif name in _RULES and (actual := _adds_space(splitter)) is not None:
        found["add_prefix_space"] = bool(settings.get("add_prefix_space")), actual
    return {key: (given, actual) for key, (given, actual) in found.items() if given != actual}


def _adds_space(part: Any) -> bool | None:
    """`add_prefix_space` of the byte-level part of a pre_tokenizer, or None where there is none."""
    if not isinstance(part, dict):
        return None
    if part.get("type") == "ByteLevel":
        return bool(part.get("add_prefix_space", True))
    found = [_adds_space(each) for each in part.get("pretokenizers") or ()]
    return next((one for one in found if one is not None), None)


def _agrees(rules: Any, actual: Any) -> bool:
    """True if all that the rules contain is in a part of a tokenizer.json."""
    if isinstance(rules, dict):
        return isinstance(actual, dict) and all(_agrees(value, _value(actual, key)) for key, value in rules.items())
    if isinstance(rules, list):
        return isinstance(actual, list) and len(actual) == len(rules) and all(map(_agrees, rules, actual))
    return rules == actual


def _value(part: Mapping[str, Any], key: str) -> Any:
    """A value of a part of a tokenizer.json; the package takes a missing flag as true."""
    return part.get(key, True if key in ("use_regex", "split", "clean_text") else None)
