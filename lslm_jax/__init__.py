"""Train large-scale language models with JAX and Flax, from raw text to a talking model."""

__version__ = "0.1.0"
