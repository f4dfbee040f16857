"""A task from a context: the bare backbone reads it, the inventory's generator makes the routing.

The engine reads it, in the same steps as everybody's prompts, so it waits its turn as they do.
"""

import time
from collections.abc import Sequence
from dataclasses import replace

from fastapi import Request as Call

from polyhead.adapters.generator import Generator, piece, pieces
from polyhead.server.engine.errors import EngineDraining
from polyhead.server.engine.request import BASE_TASK, Output, Request
from polyhead.server.http.admission import CHARACTERS_PER_TOKEN
from polyhead.server.http.bridge import unless_client_leaves
from polyhead.server.http.checks import check_most
from polyhead.server.http.errors import InvalidValue, shown
from polyhead.server.http.registering import Generated, Registration, given_fields
from polyhead.server.http.schemas import ExampleBody
from polyhead.server.http.service import Service, request_id


async def with_generated(call: Call, service: Service, registered: Registration) -> Registration:
    """`registered` with the routing of its context; as it is where it has none.

    Whatever is wrong with it is found before the engine reads. Raises `InvalidValue`,
    `RoutingError` and what requests end in.
    """
    context = registered.body.context
    if context is None:
        return registered
    registered.check_sources()
    given_fields(registered.body, service.settings)
    generator = _generator_of(service)
    service.engine.check(BASE_TASK)
    asked = await service.pool.run(_admitted, service, context, request_id(call))

    async def read() -> list[Output]:
        async with service.bridge.ask(service.engine, asked) as answer:
            return [output async for batch in answer.batches() for output in batch]

    outputs = await unless_client_leaves(call.receive, read())
    if any(output.finish_reason == "abort" for output in outputs):
        raise EngineDraining("the server shut down before the context was read")
    made = await service.pool.run(_generated, service, generator, asked, outputs)
    return replace(registered, generated=made)


def _generator_of(service: Service) -> Generator:
    """Raises `InvalidValue` where there is none."""
    if service.tokenizer.decoder_start is not None:
        raise InvalidValue.of(
            "context",
            "no task can be made from a context here",
            found="an encoder-decoder as the backbone",
            expected="a causal backbone; examples, which a task is fitted from, are taken",
        )
    if service.inventory.generator is None:
        raise InvalidValue.of(
            "context",
            "the inventory has no generator",
            found="no generator.safetensors in its folder",
            expected="an inventory that `polyhead train --method generator` has written; "
            "examples, which a task is fitted from, are taken without",
        )
    return service.inventory.generator


def _admitted(service: Service, context: str | Sequence[ExampleBody], name: str) -> Request:
    limit = service.admission.max_context
    texts = _texts(context, limit * CHARACTERS_PER_TOKEN)
    unit = "lines" if isinstance(context, str) else "examples"
    check_most("context", len(texts), service.settings.max_context_lines, unit)
    ids = [tuple(service.tokenizer.encode(text)) for text in texts]
    check_most("context", sum(map(len, ids)), limit, "tokens")
    return Request(
        id=name,
        task=BASE_TASK,
        generation=BASE_TASK,
        prompt=(),
        continuations=tuple(ids),
        embeds=True,
        arrival=time.monotonic(),
    )


def _texts(context: str | Sequence[ExampleBody], most: int) -> list[str]:
    """What is read, each alone. Raises `InvalidValue` for what is empty or far too long."""
    if isinstance(context, str):
        check_most("context", len(context), most, "characters")
        found = pieces(context)
        if not found:
            raise InvalidValue.of(
                "context", "empty", found=shown(context), expected="at least 1 line of text"
            )
        return found
    for place, example in enumerate(context):
        for field in ("input", "output"):
            if not getattr(example, field).strip():
                path = f"context[{place}].{field}"
                raise InvalidValue.of(path, "empty", found="no text", expected="some text")
    check_most("context", sum(len(e.input) + len(e.output) for e in context), most, "characters")
    return [piece(example.input, example.output) for example in context]


def _generated(
    service: Service, generator: Generator, asked: Request, outputs: Sequence[Output]
) -> Generated:
    ordered = sorted(outputs, key=lambda output: output.index)
    routing = generator.routing_of([o.embedding for o in ordered], service.inventory.layout)
    tokens = sum(map(len, asked.continuations))
    how = {"how": "generated", "texts": len(asked.continuations), "tokens": tokens}
    return Generated(routing, generator.facts.template, how)
