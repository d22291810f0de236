"""Packages that are imported late, or not at all. This module imports nothing slow itself.

Tensorflow takes seconds, talks, and would take a GPU.
"""

import importlib
import os
import pathlib
import sys
from types import SimpleNamespace
from typing import Any, NoReturn

from lslm_jax.errors import ConfigError

_ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the checkout


def import_tensorflow() -> Any:
    """Imports tensorflow without its start-up chatter, without Keras, and without letting it take a GPU from jax.

    Raises:
      ConfigError: tensorflow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its announcement ignores the log level
    # Its import ends by importing all of Keras by this name, and Keras torch where there is one: a second and 80 MiB
    # for what nothing here uses. None is Python's word for no such module; `tf.keras` comes once it is asked for.
    eager = "keras.src.optimizers"
    sys.modules.setdefault(eager, None)  # type: ignore[arg-type]
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ConfigError(f"tensorflow cannot be imported ({error}): pip install tensorflow-cpu") from error
    finally:
        if sys.modules.get(eager, eager) is None:
            sys.modules.pop(eager, None)
    tf.config.set_visible_devices([], "GPU")
    return tf


def import_metric_writers() -> Any:
    """Imports clu's writers of TensorBoard events, without Keras.

    Raises:
      ConfigError: tensorflow or clu is not installed.
    """
    tf = import_tensorflow()
    # Among what clu imports is a callback for Keras: this base class is all that it needs of it.
    keras, tf.keras = tf.keras, SimpleNamespace(callbacks=SimpleNamespace(Callback=object))
    try:
        return importlib.import_module("clu.metric_writers")
    except ImportError as error:
        raise ConfigError(f"clu cannot be imported ({error}): pip install clu tensorboard") from error
    finally:
        tf.keras = keras


def require_google_cloud(address: str) -> None:
    """Raises a ConfigError where the packages are missing with which Orbax deletes checkpoints at gs:// addresses."""
    try:
        for name in ("google.cloud.storage", "google.cloud.storage_control_v2"):
            importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{address} needs google-cloud-storage: {extra('gcs')}") from error


def import_qwix() -> Any:
    """Imports qwix, which holds numbers of a few bits.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("qwix")
    except ImportError as error:
        raise ConfigError(f"numbers of eight or four bits need qwix: {extra('quantize')}") from error


def extra(name: str) -> str:
    """Returns the command that installs an optional group of packages of pyproject.toml: no index has this project."""
    root = _ROOT if (_ROOT / "pyproject.toml").exists() else "."
    return f"{sys.executable} -m pip install -e '{root}[{name}]'"


def refuse_missing(error: ModuleNotFoundError) -> NoReturn:
    """Exits with 2 and one line that names the interpreter, the package that it lacks, and the cure.

    Raises:
      ModuleNotFoundError: the missing module is one of this project.
    """
    name = (error.name or "").partition(".")[0]
    if name in ("", "lslm_jax"):
        raise error
    own = _ROOT / ".venv" / "bin" / "python"
    cure = f"{sys.executable} -m pip install -e {_ROOT}"
    if os.access(own, os.X_OK) and pathlib.Path(sys.prefix).resolve() != own.parent.parent.resolve():
        cure = f"use {own} (or `source {own.parent}/activate`)"
    print(f"lslm: {sys.executable} has no package {name!r}: {cure}", file=sys.stderr)
    raise SystemExit(2)
