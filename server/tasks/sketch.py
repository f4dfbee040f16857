"""Directions of routings, and short sketches of them that keep their cosines roughly.

A direction is a routing's weights minus the uniform average, flattened, of length 1. A sketch adds
up its entries, each under a random sign, in `SKETCH_WIDTH` random buckets (Charikar et al., 2002,
"Finding frequent items in data streams"): the product of two sketches is the cosine of the two
directions with a standard error of about 1/sqrt(SKETCH_WIDTH) = 0.09.
"""

import numpy as np
from numpy.typing import NDArray

from polyhead.adapters.routing import Layout, Routing

SKETCH_WIDTH = 128
SKETCH_SEED = 20221220
"""Width and seed are part of the stored data: changing them needs a migration."""

Vector = NDArray[np.float32]
STORED = np.dtype("<f4")


def direction(routing: Routing, layout: Layout) -> Vector:
    """`[M * H * S]`; all zero for the average itself, which has no direction."""
    offset: Vector = routing.weights(layout).numpy().reshape(-1) - np.float32(1 / layout.skills)
    length = float(np.linalg.norm(offset))
    # Below the rounding error of the weights what is left of the offset is noise.
    return offset / np.float32(length) if length > 1e-6 * len(offset) ** 0.5 else offset * 0


class Sketcher:
    """Sketches for directions of one length. The random numbers are the same on every machine."""

    def __init__(self, layout: Layout) -> None:
        size = len(layout.modules) * layout.heads * layout.skills
        # The raw stream, because NumPy promises the same values across its versions only for it.
        raw = np.random.PCG64(SKETCH_SEED).random_raw(size)
        self._bucket = (raw % np.uint64(SKETCH_WIDTH)).astype(np.int64)
        self._sign = np.where(raw >> np.uint64(63), np.float32(1), np.float32(-1))

    def sketch(self, vector: Vector) -> bytes:
        """`[SKETCH_WIDTH]` float32 of a direction, as stored."""
        sums = np.bincount(self._bucket, weights=vector * self._sign, minlength=SKETCH_WIDTH)
        return sums.astype(STORED).tobytes()


def closest(wanted: bytes, sketches: list[bytes], count: int) -> list[int]:
    """Indices of the `count` sketches with the highest estimated cosine with `wanted`, in order."""
    matrix = np.frombuffer(b"".join(sketches), dtype=STORED).reshape(-1, SKETCH_WIDTH)
    estimates = matrix @ np.frombuffer(wanted, dtype=STORED)
    order: list[int] = np.argsort(-estimates, kind="stable")[:count].tolist()
    return order
