"""What is counted, under the names that vLLM's dashboards chart, after the prefix `polyhead_`."""

import threading
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from polyhead.server.engine.step_record import StepRecord
from polyhead.server.metrics import buckets
from polyhead.server.metrics.journey import Journey
from polyhead.server.metrics.scrape import Reading, Readings, TaskSeries
from polyhead.server.metrics.top_tasks import TaskFigures, TopTasks

FINISH_REASONS = ("stop", "length", "abort", "deadline", "error")
FORMS = ("combined", "factored", "private", "bare")
PHASES = ("schedule", "forward", "sample", "publish")
JOB_STATES = ("succeeded", "failed", "cancelled")


class Metrics:
    """The metrics of one server.

    named_tasks: how many tasks may have series of their own. No metric has any other label whose
    values a client can invent.
    refusal_codes: of the problems that calls are answered with.
    """

    def __init__(self, named_tasks: int = 32, refusal_codes: Iterable[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self._top_tasks = TopTasks(named_tasks)
        self._top_lock = threading.Lock()  # the event loop counts, a scrape reads
        self._latencies()
        self._counts(refusal_codes)
        self._steps()
        ProcessCollector(registry=self.registry)
        self.registry.register(TaskSeries(self._task_figures))

    def _histogram(self, key: str, text: str, bounds: Sequence[float], *labels: str) -> Histogram:
        return Histogram(f"polyhead_{key}", text, labels, buckets=bounds, registry=self.registry)

    def _counter(self, key: str, text: str, label: str = "", values: Iterable[str] = ()) -> Counter:
        """With every value of its label at 0: a rate needs a sample before the first event."""
        counter = Counter(f"polyhead_{key}", text, [label] * bool(label), registry=self.registry)
        for value in values:
            counter.labels(value)
        return counter

    def _latencies(self) -> None:
        histogram = self._histogram
        self.queue_time = histogram(
            "request_queue_time_seconds", "From arrival to the first step", buckets.QUEUE
        )
        self.prefill_time = histogram(
            "request_prefill_time_seconds", "From the first step to the first token", buckets.QUEUE
        )
        self.decode_time = histogram(
            "request_decode_time_seconds", "From the first token to the last", buckets.QUEUE
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "From arrival to the first token", buckets.FIRST_TOKEN
        )
        self.inter_token = histogram(
            "inter_token_latency_seconds", "Between two tokens of one choice", buckets.TOKEN
        )
        self.request = histogram(
            "e2e_request_latency_seconds", "From arrival to the last token", buckets.REQUEST
        )

    def _counts(self, refusal_codes: Iterable[str]) -> None:
        counter = self._counter
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens of answered requests")
        self.generation_tokens = counter("generation_tokens", "Tokens generated")
        self.prefix_queries = counter(
            "prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache"
        )
        self.prefix_hits = counter(
            "prefix_cache_hits", "Prompt tokens found there and not computed again"
        )
        self.finished = counter(
            "request_success", "Choices that ended", "finished_reason", FINISH_REASONS
        )
        self.refused = counter(
            "request_refusals", "Calls answered with a problem", "code", refusal_codes
        )
        self.fit_jobs = counter("fit_jobs", "Fits that ended", "state", JOB_STATES)
        self.fit_seconds = counter("fit_seconds", "Time during which a fit ran or paused")
        self.fit_worker_deaths = counter("fit_worker_deaths", "Fitting processes lost in a fit")

    def _steps(self) -> None:
        self.step_time = self._histogram("step_seconds", "One step of the engine", buckets.STEP)
        self.step_tasks = self._histogram("step_tasks", "Distinct tasks in one step", buckets.TASKS)
        self.step_tokens = self._histogram(
            "iteration_tokens", "Tokens computed in one step", buckets.TOKENS
        )
        self.phase_seconds = self._counter(
            "step_phase_seconds", "Time of the steps by phase", "phase", PHASES
        )
        self.forms = self._counter(
            "adapter_form_tasks", "Tasks of each step by the exact form chosen", "form", FORMS
        )

    def step(self, record: StepRecord) -> None:
        """Count one step; called on the engine's thread."""
        self.step_time.observe(sum(record.seconds.values()))
        self.step_tasks.observe(record.tasks)
        self.step_tokens.observe(record.tokens)
        for phase, seconds in record.seconds.items():
            self.phase_seconds.labels(phase).inc(seconds)
        for form, tasks in record.forms.items():
            if tasks:
                self.forms.labels(form).inc(tasks)

    def ended(self, journey: Journey) -> None:
        """Count a request that has been answered, broken off or left by its client."""
        request = journey.request
        for histogram, seconds in (
            (self.queue_time, journey.queue_seconds),
            (self.prefill_time, journey.prefill_seconds),
            (self.decode_time, journey.decode_seconds),
            (self.request, journey.seconds if journey.answered else None),
        ):
            if seconds is not None:
                histogram.observe(seconds)
        for reason in journey.reasons:
            self.finished.labels(reason).inc()
        if journey.started is not None:
            self.prompt_tokens.inc(len(request.asked))
            self.prefix_queries.inc(len(request.asked))
            self.prefix_hits.inc(journey.cached_tokens)
        figures = TaskFigures(1, len(request.asked), journey.tokens, journey.seconds or 0.0)
        with self._top_lock:
            self._top_tasks.add(request.task, figures)

    def _task_figures(self) -> dict[str, TaskFigures]:
        with self._top_lock:
            figures = self._top_tasks.figures()
            return {task: TaskFigures(**vars(found)) for task, found in figures.items()}

    def watch(self, read: Callable[[], Iterable[Reading]]) -> None:
        """Ask `read` at every scrape."""
        self.registry.register(Readings(read))

    def exposition(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
