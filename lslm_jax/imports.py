"""Tensorflow, imported late: it takes seconds, talks, and would take a GPU. This module imports nothing slow itself."""

import os
from typing import Any

from lslm_jax.errors import ConfigError


def import_tensorflow() -> Any:
    """Imports tensorflow without its start-up chatter and without letting it take a GPU from jax.

    Raises:
      ConfigError: tensorflow is not installed.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")  # its announcement ignores the log level
    try:
        import tensorflow as tf
    except ImportError as error:
        raise ConfigError(f"tensorflow cannot be imported ({error}): pip install tensorflow-cpu") from error
    tf.config.set_visible_devices([], "GPU")
    return tf
