"""Measures of language models, as functions of sums and strings."""

import gzip
import math
from collections.abc import Iterable


def perplexity(nll: float, tokens: float) -> float:
    """Exponential of the mean negative log-likelihood (nats) a token; infinite where that overflows.

    Over masked tokens, each guessed from all that is around it, this is the pseudo-perplexity of a masked model.
    """
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def bits_per_byte(nll: float, num_bytes: float) -> float:
    """Bits that the model needs for each byte of the original text, whatever its vocabulary. `nll` is in nats."""
    return nll / math.log(2) / num_bytes


def gzip_bits_per_byte(documents: Iterable[str]) -> float:
    """Bits that `gzip -9` needs for each byte of the same documents, joined by newlines."""
    text = "\n".join(documents).encode()
    return 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / len(text)
