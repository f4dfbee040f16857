"""Which replicas a call should go to: the one that has its task warm, unless that one is busier.

Rendezvous hashing (Thaler and Ravishankar, 1998) with bounded loads (Mirrokni et al., 2016): every
gateway ranks the replicas alike without talking to the others, and a replica that comes or goes
moves only the tasks for which it is the first. A task with more calls than one replica can take
spreads over the next ones of its order, as far as it has to.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence

SLACK = 4
"""Calls that a replica may have above its share before a task's calls go elsewhere too."""
SHARE = 1.25
"""Of the mean load: what a replica may have before that."""


def ranked(key: str, replicas: Sequence[str]) -> list[str]:
    """The replicas in a key's own order, the same everywhere."""
    return sorted(replicas, key=lambda replica: _weight(key, replica), reverse=True)


def choose(
    key: str, loads: Mapping[str, int], draw: random.Random | None = None
) -> list[list[str]]:
    """Ranks of replicas to try; of several in a rank, the least loaded is to be taken.

    key: what makes a replica warm, the task; "" where nothing does.
    loads: calls at every replica, as far as known.
    """
    replicas = sorted(loads)
    if len(replicas) < 2:
        return [replicas] if replicas else []
    if not key:
        return [(draw or random).sample(replicas, 2), replicas]
    bound = SHARE * sum(loads.values()) / len(loads) + SLACK
    order = ranked(key, replicas)
    return [[next(replica for replica in order if loads[replica] < bound)], replicas]


def _weight(key: str, replica: str) -> bytes:
    """Not `hash`, which differs from process to process."""
    return hashlib.blake2b(f"{key}\n{replica}".encode(), digest_size=8).digest()
