"""Two machines and a third one in front, as Ray emulates them: processes on loopback.

As a program it builds the cluster, deploys, and does what it is told on standard input; the tests
use `ray_cluster`, which runs it, so that nothing of Ray is loaded into their process.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from ports import free_port

REPLICAS = 2
CORES = 2
"""Of a machine, and of a replica, as Ray counts them: no machine has room for two."""


@dataclass(frozen=True)
class RayCluster:
    """A client of the gateway, and the machines behind it."""

    client: httpx.Client
    process: subprocess.Popen[str]

    def tell(self, order: str) -> None:
        """`lose` a machine at once, or `drain`: take the application down in good order."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{order}\n")
        self.process.stdin.flush()

    def done(self) -> None:
        """Wait until the last order has been carried out."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line == "done\n", f"the cluster ended: {line!r}"


@contextlib.contextmanager
def ray_cluster(folder: Path, data_dir: Path, **changes: Any) -> Iterator[RayCluster]:
    """The application on two machines, over the model in `folder`."""
    from live_server import settings_for

    port = free_port()
    settings = settings_for(folder, data_dir, port=port, **changes)
    # Paths of Ray's sockets must be short.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as home:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "RAY_TMPDIR": home,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # which would mean other addresses
            "RAY_health_check_period_ms": "500",
        }
        with (data_dir / "ray.log").open("w") as log:
            process = subprocess.Popen(
                [sys.executable, __file__, settings.model_dump_json()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{port}"
        with process, httpx.Client(base_url=url, timeout=60, trust_env=False) as client:
            cluster = RayCluster(client, process)
            try:
                cluster.done()
                yield cluster
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def main() -> None:
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    from polyhead.server.config import Settings
    from polyhead.server.scale.deployment import APPLICATION, deploy
    from polyhead.server.scale.size import Scale

    say = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what Ray prints is not for the test
    settings = Settings.model_validate_json(sys.argv[1])
    here = {"node_ip_address": "127.0.0.1", "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **here})
    machines = [cluster.add_node(num_cpus=CORES, **here) for _ in range(REPLICAS)]
    ray.init(address=cluster.address, log_to_driver=False)
    deploy(settings, Scale(min_replicas=REPLICAS, max_replicas=REPLICAS, cpus=CORES))
    while True:
        print("done", file=say, flush=True)
        order = sys.stdin.readline().strip()
        if order == "lose":
            cluster.remove_node(machines.pop(), allow_graceful=False)
        elif order == "drain":
            serve.delete(APPLICATION)
        else:
            break


if __name__ == "__main__":
    main()
