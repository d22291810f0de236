"""Models of the Hugging Face Hub, named as `hf://ORG/NAME` or `hf://ORG/NAME@REVISION`.

What we read of one is downloaded into the Hub's own cache, once: config, safetensors and vocabulary, never pickled
weights. The Hub's own variables hold here too (HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE). Without a network, what
the cache holds is taken.
"""

import functools
import os
import re
from typing import Any

from etils import epath

from lslm_jax.errors import ConfigError, InputMissing, LslmError, SaveError

SCHEME = "hf://"
_ADDRESS = re.compile(r"hf://((?:[\w.-]+/)?[\w.-]+)(?:@([\w./-]+))?/?")
_FILES = ["*.json", "*.safetensors", "*.model", "*.spm", "*.jinja", "vocab.txt", "merges.txt"]
_NOT = ["*/*", "consolidated*"]  # the same weights again, as others have them
_PATIENCE = 10.0  # seconds until a Hub that does not answer counts as out of reach


def local(path: epath.Path | str) -> epath.Path:
    """A path as it is; of a model on the Hub, the directory in the cache that holds it.

    Raises:
      ConfigError: it is no address of a model, or huggingface_hub is not installed.
      InputMissing: there is no such model or revision, it may not be read, or the Hub cannot be reached.
      SaveError: the cache cannot be written.
    """
    return _download(os.fspath(path)) if os.fspath(path).startswith(SCHEME) else epath.Path(path)


@functools.cache
def _download(address: str) -> epath.Path:
    found = _ADDRESS.fullmatch(address)
    # A revision is part of a path in the cache and of a URL: no part of it may lead elsewhere.
    parts = [part for name in found.groups() if name for part in name.split("/")] if found else []
    if not found or ".." in address or any(part in ("", ".") for part in parts):
        raise ConfigError(f"{address} does not name a model: write hf://ORG/NAME or hf://ORG/NAME@REVISION")
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ConfigError(f"{address} needs huggingface_hub: pip install huggingface_hub") from error
    name, revision = found.groups()
    try:
        commit = _commit(huggingface_hub, name, revision)
        where = {
            "revision": revision,
            "local_files_only": commit is None,
        }  # named so that the cache notes it
        directory = huggingface_hub.snapshot_download(name, allow_patterns=_FILES, ignore_patterns=_NOT, **where)
    except Exception as error:  # the Hub's own, and those of the package behind it, which changes with its version
        raise _told(error, address, huggingface_hub) from error
    return epath.Path(directory)


def _commit(huggingface_hub: Any, name: str, revision: str | None) -> str | None:
    """Which commit a revision is now, or None where the Hub cannot be reached."""
    errors = huggingface_hub.errors
    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return None
    try:
        return huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_PATIENCE).sha
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        response = getattr(error, "response", None)
        if response is None or response.status_code < 500:
            raise
        return None
    except Exception:  # no connection, or no answer
        return None


def _told(error: Exception, address: str, huggingface_hub: Any) -> LslmError:
    """What went wrong, in a line."""
    errors, endpoint = huggingface_hub.errors, huggingface_hub.constants.ENDPOINT
    text = address.removeprefix(SCHEME)
    match error:
        case errors.GatedRepoError():
            return InputMissing(
                f"{text} is gated: ask for access at {endpoint}/{text.partition('@')[0]}, then set HF_TOKEN, or log in "
                "with `hf auth login`"
            )
        case errors.RepositoryNotFoundError():
            return InputMissing(f"{endpoint} has no model {text}, or it is private: then set HF_TOKEN")
        case errors.RevisionNotFoundError():
            return InputMissing(f"{endpoint} has no such revision as {text}")
        case errors.LocalEntryNotFoundError():
            why = "HF_HUB_OFFLINE is set" if huggingface_hub.constants.HF_HUB_OFFLINE else f"{endpoint} is out of reach"
            return InputMissing(f"{why}, and the cache does not hold all of {text}")
        case errors.HFValidationError():
            return ConfigError(f"{address} does not name a model: {error}")
        case OSError(errno=number) if number and not isinstance(error, errors.HfHubHTTPError):
            return SaveError(f"cannot keep {text} in the cache of the Hub: {error.strerror}")
    reason = next(iter(str(error).splitlines()), "")
    return InputMissing(f"{text} could not be downloaded: {type(error).__name__}: {reason}")
