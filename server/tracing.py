"""OpenTelemetry traces of requests, by OTLP over HTTP. Imported only where they are switched on.

A request is a server span with the GenAI semantic conventions' attributes, with the spans `queue`,
`prefill` and `decode` in it and the event `gen_ai.first_token`. Spans are made when a request has
ended: while it runs, tracing does nothing. Prompts and answers are never in them.
"""

import time
from importlib.metadata import version
from typing import Any

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from polyhead.server.metrics import Journey

PATH = "/v1/traces"


class Tracing:
    """Turns journeys into spans and sends them in batches from a thread of its own.

    endpoint: of a collector, such as `http://127.0.0.1:4318`. The sampler, batch sizes, headers
    and resource attributes are the SDK's own settings, the environment's `OTEL_…`.
    """

    def __init__(self, endpoint: str) -> None:
        url = endpoint.rstrip("/").removesuffix(PATH) + PATH
        names = {"service.name": "polyhead", "service.version": version("polyhead")}
        self._provider = TracerProvider(resource=Resource.create(names), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=url)))
        self._tracer = self._provider.get_tracer("polyhead", version("polyhead"))
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, journey: Journey) -> None:
        """Make the spans of a request that has ended."""
        clock = time.time_ns() - time.monotonic_ns()

        def at(moment: float) -> int:
            return clock + int(moment * 1e9)

        request = journey.request
        ended = journey.ended if journey.ended is not None else time.monotonic()
        span = self._tracer.start_span(
            f"{_operation(journey)} {request.task}",
            context=self._parent(journey),
            kind=SpanKind.SERVER,
            attributes=_attributes(journey),
            start_time=at(request.arrival),
        )
        if journey.error is not None:
            span.set_attribute("error.type", journey.error)
            span.set_status(Status(StatusCode.ERROR))
        if journey.first_token is not None:
            span.add_event("gen_ai.first_token", timestamp=at(journey.first_token))
        for name, start, end in _parts(journey, ended):
            self._part(span, name, at(start), at(end))
        span.end(at(ended))

    def shutdown(self) -> None:
        """Send what is left, within the exporter's time limit."""
        self._provider.shutdown()

    def _part(self, parent: Span, name: str, start: int, end: int) -> None:
        context = trace.set_span_in_context(parent)
        self._tracer.start_span(name, context=context, start_time=start).end(end)

    def _parent(self, journey: Journey) -> Context:
        call = journey.call
        if call is None or call.traceparent is None:
            return Context()
        return self._propagator.extract({"traceparent": call.traceparent}, Context())


def _operation(journey: Journey) -> str:
    request = journey.request
    if request.embeds:
        return "embeddings"
    return "score" if request.continuations else "text_completion"


def _parts(journey: Journey, ended: float) -> list[tuple[str, float, float]]:
    """Name, begin and end of what a request went through; it may have been left at any point."""
    parts = [("queue", journey.request.arrival, journey.started or ended)]
    if journey.started is not None:
        parts.append(("prefill", journey.started, journey.first_token or ended))
    if journey.first_token is not None:
        parts.append(("decode", journey.first_token, ended))
    return parts


def _attributes(journey: Journey) -> dict[str, Any]:
    request, params = journey.request, journey.request.params
    found: dict[str, Any] = {
        "gen_ai.operation.name": _operation(journey),
        "gen_ai.provider.name": "polyhead",
        "gen_ai.request.model": request.task,
        "gen_ai.response.model": request.task,
        "gen_ai.response.id": request.id,
        "gen_ai.response.finish_reasons": journey.reasons,
        "gen_ai.usage.input_tokens": len(request.asked),
        "gen_ai.usage.output_tokens": journey.tokens,
        "gen_ai.usage.cache_read.input_tokens": journey.cached_tokens,
        "polyhead.task.generation": request.generation,
        "polyhead.request.id": journey.call.request_id if journey.call else request.id,
    }
    if not request.continuations:
        found |= {
            "gen_ai.request.max_tokens": params.max_tokens,
            "gen_ai.request.temperature": params.temperature,
            "gen_ai.request.top_p": params.top_p,
            "gen_ai.request.top_k": params.top_k,
            "gen_ai.request.choice.count": params.n,
        }
        if params.seed is not None:
            found["gen_ai.request.seed"] = params.seed
    if journey.first_token is not None:
        seconds = journey.first_token - request.arrival
        found["gen_ai.response.time_to_first_chunk"] = seconds
    return found
