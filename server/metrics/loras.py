"""The gauge by which the gateway-api-inference-extension routes to a replica that has a task warm.

https://github.com/kubernetes-sigs/gateway-api-inference-extension, docs/proposals/
003-model-server-protocol: value, the time; labels, the names in vLLM's format.
"""

import time
from collections.abc import Iterable

from polyhead.server.engine.request import BASE_TASK
from polyhead.server.metrics.scrape import Reading

LISTED = 128
"""Names in one label: a line of thousands would make every scrape as long."""


def active_adapters(running: Iterable[str], waiting: Iterable[str], most: int) -> Reading:
    """`most` is how many tasks a batch can hold: as many as it has seats."""
    return Reading(
        "lora_requests_info",
        "Tasks with running and with waiting requests",
        time.time(),
        {
            "max_lora": str(most),
            "running_lora_adapters": _listed(running),
            "waiting_lora_adapters": _listed(waiting),
        },
    )


def _listed(tasks: Iterable[str]) -> str:
    """Registered tasks only: mixtures and routings of a single request can be warm nowhere."""
    names = (task for task in tasks if task != BASE_TASK and not task.startswith("("))
    return ",".join(sorted(names)[:LISTED])
