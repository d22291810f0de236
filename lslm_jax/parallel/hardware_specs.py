"""What makers publish of the devices that models are trained on: the one table of peaks."""

from collections.abc import Sequence
from typing import NamedTuple

GIB = 1 << 30


class Device(NamedTuple):
    """One jax device: a chip, but one of a chip's two cores on TPU v2, v3 and 7x. 0: nobody plans for it yet.

    Attributes:
      flops: dense bfloat16 FLOP/s.
      memory: bytes that a program can use, or on GPUs all there are, of which jax takes a share.
      bandwidth: of its memory, bytes/s.
      link: bytes/s one way to its neighbours: of each of a TPU's links, of all of a GPU's NVLinks together.
      network: bytes/s one way to other slices or hosts, a device's share.
      ring: a TPU's torus closes into a ring along dimensions that are multiples of this; else it is a line.
      cubes: whether it does so only where all dimensions are.
      clock: Hz in which the TPU compiler counts.
    """

    flops: float
    memory: int = 0
    bandwidth: float = 0.0
    link: float = 0.0
    network: float = 0.0
    ring: int = 0
    cubes: bool = False
    clock: float = 0.0

    def rings(self, shape: Sequence[int]) -> tuple[bool, ...]:
        """Along which dimensions a slice of TPUs of this shape closes into a ring."""
        closed = tuple(self.ring > 0 and size % self.ring == 0 for size in shape)
        return (all(closed),) * len(closed) if self.cubes else closed


DEVICES = {
    "GB200": Device(2500e12),
    "B200": Device(2250e12, 191_514_411_008, 7.67e12, 900e9, 50e9),
    "H200": Device(989e12, 151_397_597_184, 4.8e12, 450e9, 50e9),
    "H100 PCIe": Device(756e12),
    "H100": Device(989e12, 84_942_979_072, 3.35e12, 450e9, 50e9),
    "A100": Device(312e12, 85_100_068_864, 2.04e12, 300e9, 25e9),
    "L40S": Device(362e12),
    "L4": Device(121e12),
    "TPU v2": Device(22.5e12),
    "TPU v3": Device(61.5e12),
    "TPU v4": Device(275e12, int(30.75 * GIB), 1.2e12, 45e9, 6.25e9, 4, True, 1.05e9),
    "TPU v5 lite": Device(197e12, int(15.75 * GIB), 0.81e12, 50e9, 6.25e9, 16, False, 1.5e9),
    "TPU v5e": Device(197e12, int(15.75 * GIB), 0.81e12, 50e9, 6.25e9, 16, False, 1.5e9),
    "TPU v5": Device(459e12, int(95.74 * GIB), 2.8e12, 100e9, 6.25e9, 4, True, 1.75e9),
    "TPU v6": Device(918e12, int(31.25 * GIB), 1.6e12, 100e9, 6.25e9, 16),
    "TPU7x": Device(1153.5e12),
}
"""By a part of jax's `device_kind`; the first key that is found in it holds. "TPU v5" without a letter is v5p.

Chips without bfloat16 arithmetic (V100, T4) are left out on purpose. Sources: FLOP/s, bandwidth of memory and NVLink
from the makers' data sheets (A100: the SXM card with 80 GB); a GPU's bytes from XLA's own description of it, a TPU's
are those that its compiler allows a program; a TPU's bandwidths, links and rings, and its share of the 25 GB/s of a
host of four, from "How to Scale Your Model" (Austin et al. 2025, part 2). A GPU's network is the adapter that its
maker's own systems have for each: 400 Gb/s, with the A100 200. Clocks follow from FLOP/s and the size of the matrix
units.
"""


def find(kind: str) -> Device | None:
    """The device of this `device_kind`, None where it is unknown, as a CPU is."""
    return next((device for name, device in DEVICES.items() if name in kind), None)
