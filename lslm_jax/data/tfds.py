"""Documents from a TensorFlow data set. tensorflow and tensorflow_datasets are imported on first use."""

import difflib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any

from lslm_jax.errors import ConfigError, DataError, InputMissing
from lslm_jax.imports import import_tensorflow


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


def read(builder: Any, split: Any, key: str) -> Iterator[tuple[bytes, str]]:
    """The text of each example, undecoded, and its place NAME:INDEX. Order is that of the files.

    Args:
      builder: of a prepared data set.
      split: its name, a slice of it, or one of `even_splits`.
      key: feature that holds the text; `a/b` where it is nested.

    Raises:
      InputMissing: there is no such split.
      DataError: there is no such feature, or it is not text; a file is damaged or missing.
    """
    import tensorflow as tf

    name, wanted = builder.info.full_name, num_examples(builder, split)
    _check_feature(builder, key)
    index = 0
    try:
        for example in _examples(builder, split):
            text = functools.reduce(lambda value, part: value[part], key.split("/"), example)
            if text is None:  # all that a truncated ArrayRecord file says
                raise ValueError("the record is missing")
            yield text, f"{name}:{index}"
            index += 1
    except (tf.errors.OpError, RuntimeError, OSError, ValueError) as error:
        place = _file_of(builder, split, index)
        raise DataError(f"{name}: example {index} of {split}, in {place}: {_one_line(error)}") from error
    if index != wanted:
        raise DataError(f"{name}: {index} examples of {split} in {builder.data_path}, its metadata says {wanted}")


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


def _check_feature(builder: Any, key: str) -> None:
    features = _tfds().features
    name, feature = builder.info.full_name, builder.info.features
    for part in key.split("/"):
        if not isinstance(feature, features.FeaturesDict) or part not in feature:
            has = ", ".join(builder.info.features)
            raise DataError(f"{name} has no feature {key!r} (data.text_key); it has: {has}")
        feature = feature[part]
    if not isinstance(feature, features.Text):
        raise DataError(f"{name}: feature {key!r} (data.text_key) is not text")


def _one_line(error: BaseException) -> str:
    """The error without line breaks and without TensorFlow's names of graph nodes."""
    return " ".join(re.sub(r"\{\{.*?\}\}|\[Op:.*", "", str(error)).split())[:300]
