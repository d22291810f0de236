"""What is drawn at random, computed and not stored: permutations, choices, mixtures."""

import math

import numpy as np

from lslm_jax.errors import ConfigError

PATTERN = 4096
"""Positions after which the pattern of a mixture repeats."""

_ROUNDS = 8  # of the network
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, odd: its multiples are spread out


def positions(step: int, steps: int, batch_size: int, slots: np.ndarray, offset: int = 0) -> np.ndarray:
    """Positions in the data order of some slots of the batches after step to step + steps - 1.

    `offset` is not 0 after the batch size has changed (`train.identity.continued_rows`).
    """
    return (np.arange(step, step + steps)[:, None] * batch_size + slots).ravel() + offset


def permute(index: np.ndarray, n: int, seed: np.ndarray | int) -> np.ndarray:
    """Where a pseudo-random permutation of range(n) sends `index`, without making the permutation.

    A generalised Feistel network (Black and Rogaway, 2002, "Ciphers with arbitrary finite domains") on pairs of
    range(a) x range(b), where a * b is hardly more than n; what falls beyond n is sent on until it falls below.

    Args:
      index: int64 of any shape, each in [0, n).
      n: 1 to 2^48.
      seed: which permutation; one for all, or one for each index.

    Returns:
      int64, of the shape of `index`.
    """
    a = math.isqrt(n - 1) + 1
    b = -(-n // a)
    seed = np.broadcast_to(combine(seed), index.shape)
    result = _feistel(index.astype(np.uint64), a, b, seed)
    while (beyond := result >= n).any():
        result[beyond] = _feistel(result[beyond], a, b, seed[beyond])
    return result.astype(np.int64)


def combine(seed: np.ndarray | int, *numbers: np.ndarray | int) -> np.ndarray:
    """A uint64 seed from a seed and non-negative numbers that tell its uses apart."""
    key = np.atleast_1d(seed).astype(np.uint64)
    for number in numbers:
        key = _mix(key + np.uint64(_GOLDEN)) ^ np.asarray(number).astype(np.uint64)
    return _mix(key + np.uint64(_GOLDEN))


def choose(keys: np.ndarray, open_BT: np.ndarray, counts_B: np.ndarray) -> np.ndarray:
    """Draws so many places of each row, every set of so many equally likely.

    Args:
      keys: uint64 [B], what each row's draw depends on.
      open_BT: bool, the places to draw from.
      counts_B: int64, places to draw; no more than there are.

    Returns:
      int64 [B, P], sorted, P the greatest count; T in rows that have fewer.
    """
    length, most = open_BT.shape[1], int(counts_B.max(initial=0))
    if not most:
        return np.zeros((len(open_BT), 0), np.int64)
    # The lowest scores win; each has its place in the lowest bits, so that no two are equal.
    bits, place = np.uint64(length.bit_length()), np.arange(length, dtype=np.uint64)
    score = (combine(keys[:, None], place) >> bits << bits) | place
    score[~open_BT] = np.iinfo(np.uint64).max
    won = np.sort(np.partition(score, most - 1, axis=1)[:, :most], axis=1)
    places = (won & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
    places[np.arange(most) >= counts_B[:, None]] = length
    return np.sort(places, axis=1)


def mixture_pattern(weights: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which source each position of the pattern takes, spread evenly: every stretch has about each one's share.

    Returns:
      source of each position, int64 [P]; and how often each source occurs before each position, int64 [P + 1, S].
    """
    shares = np.array(weights) / sum(weights) * PATTERN
    counts = np.floor(shares).astype(np.int64)
    counts[np.argsort(counts - shares, kind="stable")[: PATTERN - counts.sum()]] += 1
    if not counts.all():
        raise ConfigError(f"data.mixture: weight {weights[int(counts.argmin())]} is below 1/{PATTERN} of the total")
    source = np.repeat(np.arange(len(weights)), counts)
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in counts])
    pattern = source[np.argsort(due, kind="stable")]
    before = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)
    return pattern, np.concatenate([np.zeros((1, len(weights)), np.int64), before])


def _feistel(x: np.ndarray, a: int, b: int, seed: np.ndarray) -> np.ndarray:
    left, right = x // np.uint64(b), x % np.uint64(b)
    for i in range(_ROUNDS):
        key = seed + np.uint64(i * _GOLDEN % (1 << 64))
        if i % 2:
            right = (right + _mix(left + key) % np.uint64(b)) % np.uint64(b)
        else:
            left = (left + _mix(right + key) % np.uint64(a)) % np.uint64(a)
    return left * np.uint64(b) + right


def _mix(x: np.ndarray) -> np.ndarray:
    """A bijection of uint64 which scatters neighbours: the finaliser of SplitMix64 (Steele et al., 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
