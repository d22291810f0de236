"""Old name of `model_configs`, for config files written for 0.1."""

from lslm_jax.models.model_configs import *  # noqa: F403
