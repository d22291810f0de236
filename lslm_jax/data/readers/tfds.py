"""Examples from a TensorFlow data set. tensorflow and tensorflow_datasets are imported on first use."""

import difflib
import functools
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from lslm_jax.data.readers.example_schema import SAID, Column
from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.runtime.lazy_imports import import_tensorflow


class ClassNumber(int):
    """The number of a class with its name, which may be another number: TFDS names the classes of Yelp 1 and 2.

    Attributes:
      name: of the class.
    """

    name: str = ""


def builder(name: str, data_dir: str) -> Any:
    """The TFDS builder of a data set, which is downloaded and prepared where it was not yet.

    Args:
      name: `name/config:version`.
      data_dir: where TFDS keeps its data; empty for its own default.

    Raises:
      InputMissing: there is no such data set, or it cannot be downloaded.
      ConfigError: no name, or a package is missing.
    """
    if not name:
        raise ConfigError("data.tfds is empty: name a TFDS data set, such as lm1b")
    found = _find(name, data_dir)
    if not found.is_prepared():
        print(f"{name} is not in {found.data_path}: TFDS downloads and prepares it now", file=sys.stderr)
        _download(found)
    return found


def num_examples(builder: Any, split: Any) -> int:
    """Examples of a split, or of a slice of one (`train[:90%]`).

    Raises:
      InputMissing: there is no such split.
    """
    try:
        return builder.info.splits[split].num_examples
    except (KeyError, ValueError, AssertionError) as error:
        names = ", ".join(builder.info.splits)
        raise InputMissing(f"{builder.info.full_name} has no split {split}; it has: {names}") from error


def even_splits(builder: Any, split: str, count: int) -> list[Any]:
    """The split in so many parts of about equal size, none of them empty."""
    count = min(count, num_examples(builder, split))
    return _tfds().even_splits(split, count) if count else []


def read(
    builder: Any, split: Any, wanted: list[Column], names: Sequence[str] = ()
) -> Iterator[tuple[dict[str, Any], str]]:
    """The parts of each example by name, text undecoded, and its place NAME:INDEX. Order is that of the files.

    Args:
      builder: of a prepared data set.
      split: its name, a slice of it, or one of `even_splits`.
      wanted: features that make an example.
      names: of the classes of labels, in the place of the data set's own.

    Raises:
      InputMissing: there is no such split.
      DataError: there is no such feature, or it holds something else; a file is damaged or missing.
    """
    import tensorflow as tf

    name, count = builder.info.full_name, num_examples(builder, split)
    wanted = [column for column in wanted if not column.optional or column.key in builder.info.features]
    for column in wanted:
        _check_feature(builder, column)
    classes = {column: names or _class_names(_feature(builder, column)) for column in wanted if "label" in column.holds}
    index = 0
    try:
        for example in _examples(builder, split):
            parts = {column.name: _part(example, column) for column in wanted}
            if None in parts.values():  # all that a truncated ArrayRecord file says
                raise ValueError("the record is missing")
            parts |= {column.name: _numbered(parts[column.name], known) for column, known in classes.items() if known}
            yield parts, f"{name}:{index}"
            index += 1
    except (tf.errors.OpError, RuntimeError, OSError, ValueError) as error:
        place = _file_of(builder, split, index)
        raise DataError(f"{name}: example {index} of {split}, in {place}: {_one_line(error)}") from error
    if index != count:
        raise DataError(f"{name}: {index} examples of {split} in {builder.data_path}, its metadata says {count}")


def class_names(builder: Any, key: str) -> list[str] | None:
    """Names of a feature's classes in the order of their numbers; None where it has none.

    Raises:
      DataError: there is no such feature.
    """
    return _class_names(_feature(builder, Column("label", key, "label", "data.label_key")))


def _class_names(feature: Any) -> list[str] | None:
    feature = feature.feature if isinstance(feature, _tfds().features.Sequence) else feature
    return list(feature.names) if isinstance(feature, _tfds().features.ClassLabel) else None


def _numbered(value: Any, names: Sequence[str]) -> Any:
    """Labels with the names of their numbers; None for -1, by which TFDS marks a missing label."""
    if isinstance(value, list):
        return [_numbered(part, names) for part in value]
    if not isinstance(value, int) or not -1 <= value < len(names):
        return value
    if value == -1:
        return None
    number = ClassNumber(value)
    number.name = names[value]
    return number


def _part(example: Any, column: Column) -> Any:
    return _plain(functools.reduce(lambda value, part: value[part], column.key.split("/"), example))


def _plain(value: Any) -> Any:
    """Without NumPy: lists, numbers and bytes."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value.tolist() if hasattr(value, "tolist") else value


def _tfds() -> Any:
    import_tensorflow()
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ConfigError(
            f"data.source=tfds needs {error.name}: pip install tensorflow-cpu tensorflow-datasets"
        ) from error
    return tfds


def _find(name: str, data_dir: str) -> Any:
    tfds = _tfds()
    try:
        return tfds.builder(name, data_dir=data_dir or None)
    except tfds.core.DatasetNotFoundError as error:
        known = set(tfds.list_builders(with_community_datasets=False))
        near = difflib.get_close_matches(re.split("[/:]", name)[0], sorted(known), n=3, cutoff=0)
        raise InputMissing(f"data.tfds: TFDS has no data set {name}; near names: {', '.join(near)}") from error
    except (ValueError, AssertionError) as error:
        known = tfds.builder_cls(re.split("[/:]", name)[0])
        configs = known.builder_configs
        versions = {known.VERSION, *(config.version for config in configs.values())} - {None}
        has = f"configurations: {', '.join(configs) or 'none'}; versions: {', '.join(map(str, versions))}"
        raise InputMissing(f"data.tfds: no {name}; {has}") from error


def _download(builder: Any) -> None:
    try:
        builder.download_and_prepare()
    except ImportError as error:
        raise ConfigError(f"preparing {builder.name} needs {error.name}: pip install {error.name}") from error
    except (OSError, AssertionError) as error:  # no network, or files that have to be fetched by hand
        raise InputMissing(f"TFDS could not prepare {builder.name}: {_one_line(error)}") from error


def _examples(builder: Any, split: Any) -> Iterator[Any]:
    tfds = _tfds()
    if builder.info.file_format is tfds.core.file_adapters.FileFormat.ARRAY_RECORD:
        return iter(builder.as_data_source(split=split))
    # One file after another is the order that random access has too.
    config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
    return iter(tfds.as_numpy(builder.as_dataset(split=split, read_config=config)))


def _file_of(builder: Any, split: Any, index: int) -> str:
    for file in builder.info.splits[split].file_instructions:
        if index < file.examples_in_shard:
            return file.filename
        index -= file.examples_in_shard
    return str(builder.data_path)


def _feature(builder: Any, column: Column) -> Any:
    feature = builder.info.features
    for part in column.key.split("/"):
        if not isinstance(feature, _tfds().features.FeaturesDict) or part not in feature:
            has = ", ".join(builder.info.features)
            raise DataError(f"{builder.info.full_name} has no feature {column.said}; it has: {has}")
        feature = feature[part]
    return feature


def _check_feature(builder: Any, column: Column) -> None:
    feature = _feature(builder, column)
    is_list = isinstance(feature, _tfds().features.Sequence)
    inner = feature.feature if is_list else feature
    scalar = not is_list and feature.shape == ()
    fits = {
        "text": isinstance(feature, _tfds().features.Text),
        "texts": is_list and isinstance(inner, _tfds().features.Text),
        "label": scalar,
        "labels": is_list and inner.shape == (),
    }
    if column.holds in fits and not fits[column.holds]:
        raise DataError(f"{builder.info.full_name}: feature {column.said} is not {SAID[column.holds]}")


def _one_line(error: BaseException) -> str:
    """The error without line breaks and without TensorFlow's names of graph nodes."""
    return " ".join(re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error)).split())[:300]
