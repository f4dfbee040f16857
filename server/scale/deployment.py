"""What is deployed: gateways that listen and replicas that answer, and how many of each."""

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.config import (
    AutoscalingConfig,
    HTTPOptions,
    ProxyLocation,
    RequestRouterConfig,
)
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from polyhead.server.config import Settings
from polyhead.server.scale.gateway import Gateway
from polyhead.server.scale.replica import Replica
from polyhead.server.scale.size import Scale

APPLICATION = "polyhead"
ROUTER = "polyhead.server.scale.router.TaskRouter"
"""By name: every gateway imports it for itself."""
LISTENING: Mapping[str, ProxyLocation] = {
    "head": ProxyLocation.HeadOnly,
    "every": ProxyLocation.EveryNode,
}
QUIET = LoggingConfig(enable_access_log=False)
"""The replicas log every request themselves."""


def application(settings: Settings, scale: Scale) -> serve.Application:
    """The Serve application. Raises `ValueError` where replicas would not share a registry."""
    scale.check(settings)
    # Every value goes along, so the file they came from need not be there on other machines.
    replicas = _replicas(settings, scale).bind(settings.model_dump(mode="json", exclude={"config"}))
    gateway: Any = serve.deployment(
        Gateway,
        name="gateway",
        num_replicas=scale.gateways,
        max_ongoing_requests=10_000,
        graceful_shutdown_timeout_s=settings.drain_seconds,
        logging_config=QUIET,
        ray_actor_options={"num_cpus": 0.1},
    )
    bound: serve.Application = gateway.bind(replicas, settings.max_body_bytes)
    return bound


def deploy(settings: Settings, scale: Scale) -> DeploymentHandle[Any]:
    """Run the application on the Ray cluster of this process; waits until it answers."""
    serve.start(
        proxy_location=LISTENING[scale.listen],
        http_options=HTTPOptions(host=settings.host, port=settings.port),
    )
    return serve.run(application(settings, scale), name=APPLICATION, route_prefix="/")


def _replicas(settings: Settings, scale: Scale) -> Any:
    """Replicas scale on calls that run or wait at them, of which a batch holds `max_running`."""
    return serve.deployment(
        Replica,
        name="replica",
        max_ongoing_requests=settings.max_running + settings.max_waiting,
        logging_config=QUIET,
        autoscaling_config=AutoscalingConfig(
            min_replicas=scale.min_replicas,
            max_replicas=scale.max_replicas,
            target_ongoing_requests=settings.max_running,
        ),
        graceful_shutdown_timeout_s=settings.drain_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5,
        health_check_timeout_s=30,
        request_router_config=RequestRouterConfig(request_router_class=ROUTER),  # type: ignore[arg-type]
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
    )
