"""From a config file and `--config.KEY=VALUE` flags to a typed Config, and from a Config to JSON and back."""

import ast
import contextlib
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from etils import epath

from lslm_jax.config import Config, schema
from lslm_jax.errors import ConfigError, InputMissing, LslmError
from lslm_jax.runtime import atomic_io


def load(spec: str) -> Config:
    """Reads `FILE` or `FILE:argument`.

    A Python file defines `get_config()`, or `get_config(argument)` if it takes one; it is code and is executed. A
    .json file holds nested keys and is never executed. The argument `smoke` shrinks any config to seconds.

    Raises:
      InputMissing: there is no such file.
      ConfigError: the file does not yield a well-typed Config.
    """
    spec = os.path.expanduser(spec)
    scheme, bucket, rest = spec.rpartition("://")
    name, _, argument = rest.partition(":") if bucket or not pathlib.Path(spec).exists() else (spec, "", "")
    path = epath.Path(scheme + bucket + name)
    if not path.is_file():
        raise InputMissing(f"config file {path} does not exist")
    if path.suffix == ".json":
        config = _read_json(path)
    elif bucket:
        raise ConfigError(f"{path} is code, which must lie on this machine; only .json is read from a bucket")
    else:
        config = _run_python(pathlib.Path(path), "" if argument == "smoke" else argument)
    if argument == "smoke":
        return smoke(config)
    if argument and path.suffix == ".json":
        raise ConfigError(f"{name} takes no argument but smoke, got {argument!r}")
    return config


def _read_json(path: epath.Path) -> Config:
    try:
        tree = atomic_io.parse_json(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error
    return _of_file(path, tree)


def _of_file(path: epath.Path | pathlib.Path, tree: Mapping[str, Any]) -> Config:
    try:
        return from_dict(tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _run_python(path: pathlib.Path, argument: str) -> Config:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # the suffix is .py or nothing, which importlib can load
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        get_config = module.get_config
        takes_argument = bool(inspect.signature(get_config).parameters)
        if argument and not takes_argument:
            raise ConfigError(f"{path} takes no argument but smoke, got {argument!r}")
        config = get_config(argument) if takes_argument else get_config()
    except LslmError:
        raise
    except Exception as error:  # whatever the user's code raises
        if isinstance(error, AttributeError) and error.obj is module:
            raise ConfigError(f"{path} defines no get_config()") from error
        raise ConfigError(f"{_place_of(error, path)}: {_explain(error)}") from error
    if not isinstance(config, Config):
        raise ConfigError(f"{path}: get_config() returned {type(config).__name__}, not a Config")
    return _of_file(path, to_dict(config))


def _place_of(error: Exception, path: pathlib.Path) -> str:
    """File and line of an error in a config file: where it does not parse, or the last of its lines that ran."""
    if isinstance(error, SyntaxError):
        return f"{error.filename}:{error.lineno}"
    place, frame = str(path), error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_filename == str(path):
            place = f"{path}:{frame.tb_lineno}"
        frame = frame.tb_next
    return place


def _explain(error: Exception) -> str:
    """The error in one line, with the nearest field where a config class got a keyword that it does not have."""
    match = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        message = error.msg if isinstance(error, SyntaxError) else " ".join(str(error).split())
        return f"{type(error).__name__}: {message}"
    name, key = match.groups()
    fields = [field.name for field in dataclasses.fields(getattr(schema, name))]
    return f"{name} has no field {key!r}{_nearest(key, fields)}"


def override(config: Config, assignments: Sequence[tuple[str, str]]) -> Config:
    """Returns the config with each dotted key, as `train.steps`, set to the value that its text spells.

    A key that is given several times has the last value, so that a script's flags can be overridden.

    Raises:
      ConfigError: an unknown key, a text that is not of the key's type, or two lengths of training.
    """
    for key, text in assignments:
        config = _set(config, key, key.split("."), text)
    keys = [key for key, _ in assignments]
    if "train.steps" in keys and config.train.epochs:
        if "train.epochs" in keys:
            raise ConfigError("train.steps and train.epochs exclude each other: each is the length of training")
        config = replace(config, train=replace(config.train, epochs=0.0))  # of the file
    return config


def with_value(config: Config, key: str, value: Any) -> Config:
    """The config with one dotted key set to a typed value."""

    def place(node: Any, names: Sequence[str]) -> Any:
        name, *rest = names
        return replace(node, **{name: place(getattr(node, name), rest) if rest else value})

    return place(config, key.split("."))


def _set(node: Any, key: str, path: list[str], text: str) -> Any:
    hints = get_type_hints(type(node))
    name, *rest = path
    if not rest and dataclasses.is_dataclass(hints.get(name)):
        raise ConfigError(
            f"--config.{key} is a section: set one of its keys, as {key}.{next(iter(get_type_hints(hints[name])))}"
        )
    if name not in hints or bool(rest) != dataclasses.is_dataclass(hints[name]):
        raise ConfigError(f"unknown key --config.{key}{_nearest(key, [entry.key for entry in describe()])}")
    value = _set(getattr(node, name), key, rest, text) if rest else _parse(text, hints[name], key)
    return replace(node, **{name: value})


def _nearest(key: str, known: Sequence[str]) -> str:
    """Says which known key was meant, judged by the whole dotted name and by its last part."""
    last = key.rsplit(".", 1)[-1]
    by_last = {name.rsplit(".", 1)[-1]: name for name in reversed(known)}
    whole = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    part = difflib.get_close_matches(last, list(by_last), n=1, cutoff=0.6)
    if part and (not whole or last == part[0]):
        return f"; did you mean {by_last[part[0]]}?"
    return f"; did you mean {whole[0]}?" if whole else "; --config.help lists all"


# Sizes of a model that are derived from others where they are not given, and from which.
_DERIVED = {
    "num_kv_heads": (("num_heads",), lambda model: model.num_heads),
    "head_dim": (("d_model", "num_heads"), lambda model: model.d_model // model.num_heads),
    "d_ff": (("d_model",), lambda model: 4 * model.d_model),
    "num_decoder_layers": (("num_layers",), lambda model: model.num_layers),
}


def release_derived(config: Config, keys: Sequence[str]) -> Config:
    """Sets derived sizes of a run's config.json back to 0 where flags change what they are derived from.

    A run writes down all sizes. One that equals what it would be derived as counts as derived: with another
    `model.d_model`, `model.d_ff` follows. Likewise `model.vocab_size` with another tokenizer and `model.num_labels`
    with other labels or data. A size that is itself given by a flag keeps that value.

    Args:
      config: as read from a JSON file; one that leaves sizes open is returned unchanged.
      keys: dotted keys that flags will set.
    """
    model = config.model
    if not all(getattr(model, name) for name in (*_DERIVED, "vocab_size")):
        return config
    released = {
        name: 0
        for name, (sources, derive) in _DERIVED.items()
        if any(f"model.{source}" in keys for source in sources) and getattr(model, name) == derive(model)
    }
    if any(key.startswith("tokenizer.") for key in keys):
        released["vocab_size"] = 0
    if any(key.startswith(("data.labels", "data.files", "data.tfds", "data.label_key")) for key in keys):
        released["num_labels"] = 0
    return replace(config, model=replace(model, **released))


def expand_home(config: Config) -> Config:
    """The config with `~` expanded in the paths of files that it names."""
    expand = os.path.expanduser
    return replace(
        config,
        data=replace(config.data, dir=expand(config.data.dir), data_dir=expand(config.data.data_dir)),
        tokenizer=replace(config.tokenizer, path=expand(config.tokenizer.path)),
        train=replace(config.train, init_from=expand(config.train.init_from)),
    )


_BOOLS = {"true": True, "false": False, "1": True, "0": False}
_WANTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}


def _parse(text: str, hint: Any, key: str) -> Any:
    """The value that a flag's text spells, of the type that the field declares."""
    if get_origin(hint) is tuple:
        kind = get_args(hint)[0]
        if dataclasses.is_dataclass(kind):
            raise ConfigError(f"{key} cannot be set by a flag: write it in the config file")
        if get_origin(kind) is tuple:
            with contextlib.suppress(ValueError):
                return _typed(json.loads(text), hint, key)
            raise ConfigError(f"{key} wants a JSON list of lists, got {text!r}")
        return tuple(_parse(part, kind, key) for part in items(text, paths=key.endswith("files")))
    try:
        if hint is bool:
            return _BOOLS[text.lower()]
        if hint in (int, float):
            return hint(text)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"{key} wants {_WANTED[hint]}, got {text!r}") from error
    return _typed(_BOOLS.get(text.lower(), text) if True in get_args(hint) else text, hint, key)


def items(text: str, paths: bool = False) -> list[str]:
    """The items of a list: separated by commas, or a JSON list of texts, in which an item may hold a comma.

    Args:
      text: as a flag has it.
      paths: whether items are files; a text that is the name of one is then a single item.
    """
    if paths and "," in text and os.path.exists(os.path.expanduser(text)):
        return [text]
    if text.lstrip().startswith("["):
        with contextlib.suppress(ValueError):
            found = json.loads(text)
            if all(isinstance(item, str | int) for item in found):
                return [str(item) for item in found]
    return [part.strip() for part in text.split(",") if part.strip()]


def _typed(value: Any, hint: Any, key: str) -> Any:
    """Checks a value from Python or JSON against a field's type. Lists become tuples, whole numbers floats."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, key)
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            choices = ", ".join(str(choice).lower() if choice in (True, False) else choice for choice in get_args(hint))
            raise ConfigError(f"{key} wants one of {choices}; got {value!r}")
        return value
    if get_origin(hint) is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{key} wants a list, got {value!r}")
        return tuple(_typed(item, get_args(hint)[0], key) for item in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise ConfigError(f"{key} is too large") from error
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{key} wants {_WANTED[hint]}, got {value!r}")
    return value


def _build(kind: Any, tree: Any, key: str) -> Any:
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{key or 'the config'} wants nested keys, got {tree!r}")
    hints = get_type_hints(kind)
    prefix = f"{key}." if key else ""
    for name in tree:
        if name not in hints:
            raise ConfigError(f"unknown key {prefix}{name}{_nearest(name, list(hints))}")
    required = [field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in tree]
    if required:
        raise ConfigError(f"{prefix}{required[0]} is missing")
    return kind(**{name: _typed(value, hints[name], prefix + name) for name, value in tree.items()})


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain values, as written to config.json."""
    return dataclasses.asdict(config)


def from_dict(tree: Mapping[str, Any]) -> Config:
    """The typed config of nested plain values; missing keys take their defaults.

    Raises:
      ConfigError: an unknown key or a value of the wrong type.
    """
    return _build(Config, tree, "")


def to_json(config: Config) -> str:
    """The whole config as indented JSON."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def digest(config: Any) -> str:
    """Sha256 of a config or one of its sections: equal settings, equal digest."""
    return hashlib.sha256(json.dumps(to_dict(config), sort_keys=True).encode()).hexdigest()


class Entry(NamedTuple):
    """One line of `--config.help`."""

    key: str
    type: str
    default: str
    doc: str


def help_text(section: str = "") -> str:
    """Settings with type, default and meaning, under the name of their section.

    Args:
      section: name of a section or of one setting. Empty: all.

    Raises:
      ConfigError: there is no such section or setting.
    """
    section = section.removeprefix("config.")
    lines, heading, entries = [], "", list(describe())
    chosen = [entry for entry in entries if not section or f"{entry.key}.".startswith(f"{section}.")]
    if not chosen:
        names = sorted({entry.key.rpartition(".")[0] or entry.key for entry in entries})
        near = difflib.get_close_matches(section, [*names, *(entry.key for entry in entries)], n=1)
        hint = f"did you mean {near[0]}?" if near else f"the sections are {', '.join(names)}"
        raise ConfigError(f"--config.help={section}: no such section; {hint}")
    for entry in chosen:
        above = entry.key.rpartition(".")[0]
        if above and above != heading:
            lines.append(f"\n[{above}]")
            heading = above
        lines.append(f"{entry.key} ({entry.type}; {entry.default})\n    {entry.doc}")
    return "\n".join(lines).lstrip("\n")


def describe() -> Iterator[Entry]:
    """Every key with its type, default and documentation, in the order of the schema."""
    docs = _field_docs()
    return _describe(Config, "", docs)


def _describe(kind: Any, prefix: str, docs: Mapping[tuple[str, str], str]) -> Iterator[Entry]:
    hints = get_type_hints(kind)
    owners = {name: owner.__name__ for owner in reversed(kind.__mro__) for name in inspect.get_annotations(owner)}
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _describe(hint, f"{prefix}{field.name}.", docs)
        else:
            yield Entry(prefix + field.name, _spell(hint), repr(field.default), docs[owners[field.name], field.name])


def _spell(hint: Any) -> str:
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) is tuple:
        return f"{_spell(get_args(hint)[0])}, ..."
    return hint.__name__


def _field_docs() -> dict[tuple[str, str], str]:
    """Maps (class, field) to the string under the field, which Python itself does not keep."""
    docs = {}
    classes = [node for node in ast.parse(inspect.getsource(schema)).body if isinstance(node, ast.ClassDef)]
    for node in classes:
        for field, below in itertools.pairwise(node.body):
            match field, below:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[node.name, name] = doc
    return docs


def smoke(config: Config) -> Config:
    """Shrinks any run to seconds on one core: same family, same data source, same code paths, tiny sizes."""
    model, train = config.model, config.train
    heads = 4 if model.num_heads % 4 == 0 else 2
    accumulate = min(train.accumulate, 2)
    grouped = model.num_kv_heads not in (0, model.num_heads)
    path = "" if train.init_from else config.tokenizer.path  # that of a run too large to start from
    return replace(
        config,
        model=replace(
            model,
            num_layers=2,
            num_decoder_layers=min(model.num_decoder_layers, 2),
            d_model=64,
            num_heads=heads,
            num_kv_heads=heads // 2 if grouped else 0,
            head_dim=0,
            d_ff=128,
            num_experts=min(model.num_experts, 4),
            experts_per_token=min(model.experts_per_token, 2),
            vocab_size=0,
            max_length=128,
            window=min(model.window, 16),
            dtype="float32",
            attention="auto",
        ),
        data=replace(
            config.data,
            seq_len=64,
            source_len=min(config.data.source_len, 64),
            max_documents=config.data.max_documents or 300,
        ),
        task=replace(config.task, stride=min(config.task.stride, 16)),
        tokenizer=replace(config.tokenizer, path=path, vocab_size=512, sample_bytes=1_000_000),
        train=replace(train, steps=20, batch_size=8 * accumulate, accumulate=accumulate, init_from=""),
        optimizer=replace(config.optimizer, warmup_steps=2),
        mesh=replace(config.mesh, data=-1, fsdp=1, expert=1, tensor=1),
        checkpoint=replace(config.checkpoint, every=10),
        eval=replace(config.eval, every=10, batches=2),
        generate=replace(config.generate, max_tokens=16),
        log=replace(config.log, every=1),
    )
