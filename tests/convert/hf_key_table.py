"""Generator of `lslm_jax/convert/hf_keys.json`: each key that transformers and PEFT accept in a directory's JSON files.

Usage, where transformers and peft are installed: `python tests/convert/hf_key_table.py lslm_jax/convert/hf_keys.json`.
`test_keys_parity.py` regenerates the table and compares it with the one that is checked in.
"""

import ast
import dataclasses
import importlib.util
import inspect
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

CLASSES = {
    "gpt2": "GPT2Config",
    "llama": "LlamaConfig",
    "mistral": "MistralConfig",
    "mixtral": "MixtralConfig",
    "qwen2": "Qwen2Config",
    "qwen3": "Qwen3Config",
    "gemma2": "Gemma2Config",
    "gemma3_text": "Gemma3TextConfig",
    "smollm3": "SmolLM3Config",
    "olmo2": "Olmo2Config",
    "gpt_neox": "GPTNeoXConfig",
    "bert": "BertConfig",
    "roberta": "RobertaConfig",
    "distilbert": "DistilBertConfig",
    "modernbert": "ModernBertConfig",
    "t5": "T5Config",
    "marian": "MarianConfig",
}
# Modules that read settings of any model.
SHARED = ("modeling_utils", "modeling_rope_utils", "masking_utils", "cache_utils", "configuration_utils", "activations")
SHARED += ("modeling_layers", "pytorch_utils", "generation.utils", "loss.loss_utils", "integrations.sdpa_attention")
SHARED += ("integrations.heterogeneity", "integrations.eager_attention", "quantizers.auto")


def build() -> dict[str, Any]:
    """Returns the whole table."""
    import peft
    import transformers

    families = {kind: _family(kind, getattr(transformers, name)) for kind, name in CLASSES.items()}
    shared = sorted(set().union(*(_names_read(_source(f"transformers.{module}")) for module in SHARED)))
    generation = transformers.GenerationConfig()
    return {
        "versions": {"transformers": transformers.__version__, "peft": peft.__version__},
        "families": families,
        "shared": shared,
        "generation": sorted(key for key in vars(generation) if not key.startswith("_")),
        "generation_defaults": _plain(generation._get_default_generation_params()),
        "adapter": _adapter(peft.LoraConfig),
        "tokenizer": _tokenizer_keys(),
    }


def _family(kind: str, config: Any) -> dict[str, Any]:
    file = inspect.getfile(config)
    code = [pathlib.Path(file).read_text(), pathlib.Path(file.replace("configuration_", "modeling_")).read_text()]
    fields = {field.name: field for field in dataclasses.fields(config)}
    hints = inspect.get_annotations(config) | {}
    for parent in reversed(config.__mro__):
        hints |= inspect.get_annotations(parent)
    defaults = {name: _default(field) for name, field in fields.items()}
    types = {name: sorted(_types(hints[name])) for name in fields if name in hints}
    read = set().union(*map(_names_read, code))
    return {
        "defaults": dict(sorted(defaults.items())),
        "types": dict(sorted(types.items())),
        "aliases": dict(sorted(config.attribute_map.items())),
        "other": sorted(read - set(fields) - set(config.attribute_map)),
    }


def _default(field: Any) -> Any:
    if field.default is not dataclasses.MISSING:
        return _plain(field.default)
    return _plain(field.default_factory()) if field.default_factory is not dataclasses.MISSING else None


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))


def _types(hint: Any) -> set[str]:
    """Kinds of JSON values that an annotation admits."""
    text = (
        hint if isinstance(hint, str) else getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
    )
    if "Any" in text:
        return {"any"}
    kinds = set()
    for part in _split(text.replace("typing.", "")):
        head = part.split("[")[0].strip().split(".")[-1]
        match head:
            case "int" | "float" | "bool" | "str":
                kinds.add(head)
            case "None":
                kinds.add("null")
            case "Optional":
                kinds |= {"null", *_types(part[len("Optional[") : -1])}
            case "Union":
                kinds |= _types(part[len("Union[") : -1].replace(",", "|"))
            case "Literal":
                kinds |= {"str"} if "'" in part or '"' in part else {"int"}
                kinds |= {"bool"} if "True" in part or "False" in part else set()
            case "list" | "tuple" | "List" | "Sequence":
                kinds.add("list")
            case "dict" | "RopeParameters" | "Dict" | "Mapping":
                kinds.add("dict")
            case "Interval" | "interval":
                kinds.add("float")
            case _:
                kinds.add(
                    "dict" if head.endswith("Config") else "str" if head.endswith("Type") or "dtype" in head else "any"
                )
    return kinds


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character == "[") - (character == "]")
        if character == "|" and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _source(name: str) -> str:
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return ""
    return pathlib.Path(spec.origin).read_text() if spec and spec.origin else ""


_HOLDERS = {"config", "self", "text_config", "decoder_config", "effective_config", "layer_config", "cls"}


def _names_read(source: str) -> set[str]:
    """Names of attributes of a config that code reads, and keys that it takes from keyword arguments."""
    return {name for node in ast.walk(ast.parse(source)) for name in _read_by(node) if not name.startswith("__")}


def _read_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Attribute(value=ast.Name(id=name), attr=attr) if name in _HOLDERS - {"self", "cls"}:
            yield attr
        case ast.Attribute(value=ast.Attribute(attr=name), attr=attr) if name in _HOLDERS:
            yield attr
        case ast.Call(func=ast.Name(id="getattr" | "hasattr"), args=[holder, ast.Constant(value=str(attr)), *_]):
            if _name(holder) in _HOLDERS:
                yield attr
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="kwargs"), attr="pop" | "get"), args=[ast.Constant(value=str(key)), *_]
        ):
            yield key


def _name(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(attr=name):
            return name
    return ""


def _adapter(config: Any) -> dict[str, Any]:
    hints = {}
    for parent in reversed(config.__mro__):
        hints |= inspect.get_annotations(parent)
    fields = [field for field in dataclasses.fields(config) if field.init]
    return {
        "defaults": {field.name: _default(field) for field in fields},
        "types": {field.name: sorted(_types(hints[field.name])) for field in fields},
    }


TOKENIZERS = ("tokenization_utils_base", "tokenization_utils_tokenizers", "tokenization_python")
TOKENIZER_CLASSES = ("gpt2", "llama", "qwen2", "bert", "roberta", "t5", "gemma", "gpt_neox", "distilbert", "marian")


def _tokenizer_keys() -> list[str]:
    """Keyword arguments of the tokenizer classes, which tokenizer_config.json fills in."""
    names: set[str] = set()
    modules = [f"transformers.{name}" for name in TOKENIZERS]
    modules += [f"transformers.models.{name}.tokenization_{name}" for name in TOKENIZER_CLASSES]
    for module in modules:
        source = _source(module)
        names |= {key for node in ast.walk(ast.parse(source)) for key in _popped(node)}
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                arguments = [*node.args.args, *node.args.kwonlyargs]
                names |= {argument.arg for argument in arguments}
    return sorted(names - {"self", "args", "kwargs", "content", "vocab", "merges"})


def _popped(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="kwargs" | "init_kwargs"), attr="pop" | "get" | "setdefault"),
            args=[ast.Constant(value=str(key)), *_],
        ):
            yield key


def dump(table: dict[str, Any]) -> str:
    """Returns the table as it is checked in: one key per line, sorted."""
    return json.dumps(table, indent=1, sort_keys=True) + "\n"


if __name__ == "__main__":
    pathlib.Path(sys.argv[1]).write_text(dump(build()))
