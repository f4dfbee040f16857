"""What is counted, under the names that vLLM's dashboards chart, after the prefix `polyhead_`."""

import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from polyhead.server.engine.request import Output, Request

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5),
    *(5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0),
    *(60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)

Load = tuple[int, int, float]
"""Requests running, requests waiting, share of the key-value cache in use (0 to 1)."""


class Metrics:
    """The metrics of one server. No label per task: thousands of tasks would be as many series."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        name = "polyhead_{}".format

        def histogram(key: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name(key), text, buckets=buckets, registry=self.registry)

        def counter(key: str, text: str, *labels: str) -> Counter:
            return Counter(name(key), text, labels, registry=self.registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice", TOKEN_BUCKETS
        )
        self.request = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", REQUEST_BUCKETS
        )
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.cached_tokens = counter("prompt_tokens_cached", "Prompt tokens not computed again")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.finished = counter("request_success", "Choices that ended", "finished_reason")
        self.fit_jobs = counter("fit_jobs", "Fits that ended", "state")
        self.fit_seconds = counter("fit_seconds", "Time during which a fit ran or paused")
        self.fit_worker_deaths = counter("fit_worker_deaths", "Fitting processes lost in a fit")
        self.refused = counter("request_refusals", "Calls answered with a problem", "code")

    def watch_load(self, load: Callable[[], Load]) -> None:
        """Read `load` at every scrape for the gauges of the engine."""
        self.registry.register(_LoadGauges(load))

    def watch_jobs(self, counts: Callable[[], Mapping[str, int]]) -> None:
        """Read `counts`, jobs by state, at every scrape."""
        self.registry.register(_JobGauges(counts))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


class Stopwatch:
    """Observes one request's latencies as its outputs arrive."""

    def __init__(self, metrics: Metrics, request: Request) -> None:
        self._metrics = metrics
        self._request = request
        self._last: dict[int, float] = {}
        self._cached = 0

    def saw(self, output: Output) -> None:
        """Account for one output; `time.monotonic` is the clock, as for `Request.arrival`."""
        now, metrics = time.monotonic(), self._metrics
        tokens = len(output.token_ids)
        self._cached = max(self._cached, output.cached_tokens)
        if tokens and not self._request.continuations:
            metrics.generation_tokens.inc(tokens)
            if not self._last:
                metrics.first_token.observe(now - self._request.arrival)
            elif output.index in self._last:
                metrics.inter_token.observe((now - self._last[output.index]) / tokens)
            self._last[output.index] = now
        if output.finish_reason is not None:
            metrics.finished.labels(output.finish_reason).inc()

    def finished(self) -> None:
        """The whole request has been answered."""
        self._metrics.request.observe(time.monotonic() - self._request.arrival)
        self._metrics.prompt_tokens.inc(len(self._request.prompt))
        self._metrics.cached_tokens.inc(self._cached)


class _LoadGauges(Collector):
    def __init__(self, load: Callable[[], Load]) -> None:
        self._load = load

    def collect(self) -> Iterator[Metric]:
        running, waiting, used = self._load()
        yield _gauge(
            "num_requests_running", "Sequences in the batch: a request has one per choice", running
        )
        yield _gauge(
            "num_requests_waiting", "Sequences in line: a request has one per choice", waiting
        )
        yield _gauge("kv_cache_usage_perc", "Share of the key-value cache in use, 0 to 1", used)


class _JobGauges(Collector):
    def __init__(self, counts: Callable[[], Mapping[str, int]]) -> None:
        self._counts = counts

    def describe(self) -> list[Metric]:
        """Nothing: else registering would read the database, which may not be there yet."""
        return []

    def collect(self) -> Iterator[Metric]:
        counts = self._counts()
        yield _gauge("fit_jobs_queued", "Fits in line", counts.get("queued", 0))
        yield _gauge("fit_jobs_running", "Fits being computed", counts.get("running", 0))


def _gauge(key: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(f"polyhead_{key}", text, value=value)
