"""A coverage-guided fuzz of what a client's tensors, bodies and templates go through.

Run by `test_inputs.py` in a process of its own: `python inputs.py CORPUS -runs=N …` takes
libFuzzer's flags. Any exception that is not a refusal ends it, and so do a hang and a jump of
memory, by `-timeout` and `-rss_limit_mb`.
"""

import sys
from collections.abc import Callable

import atheris

with atheris.instrument_imports(
    include=[
        "polyhead.adapters.tensor_files",
        "polyhead.adapters.routing",
        "polyhead.adapters.private",
        "polyhead.adapters.peft_lora",
        "polyhead.server.http.folders",
        "polyhead.server.http.checks",
        "polyhead.server.http.bodies",
        "polyhead.server.http.schemas",
        "polyhead.server.http.templates",
        "polyhead.server.http.problems",
    ]
):
    from pydantic import ValidationError

    from polyhead.adapters.errors import PrivateAdapterError, RoutingError
    from polyhead.adapters.inventory import ModuleShape
    from polyhead.adapters.peft_lora import read_peft_lora
    from polyhead.adapters.private import PrivateAdapter
    from polyhead.adapters.routing import Layout, Routing
    from polyhead.server.http.bodies import parsed
    from polyhead.server.http.checks import from_base64
    from polyhead.server.http.errors import (
        ArchiveTooLarge,
        BadArchive,
        BodyTooComplex,
        InvalidValue,
    )
    from polyhead.server.http.folders import read_folder
    from polyhead.server.http.problems import problem_response
    from polyhead.server.http.schemas import EditBody, GenerateBody, TaskBody
    from polyhead.server.http.templates import filled, filled_length

MODULES = [ModuleShape(name="a", in_features=4, out_features=6)]
LAYOUT = Layout(("h.0.a", "h.1.b"), heads=2, skills=3)
REFUSALS = (
    RoutingError,
    PrivateAdapterError,
    InvalidValue,
    ValidationError,
    BodyTooComplex,
    BadArchive,
    ArchiveTooLarge,
)
MAX_REFUSAL = 64 << 10


def routing(data: bytes) -> None:
    found = Routing.from_safetensors(data, LAYOUT)
    again = Routing.from_safetensors(found.to_safetensors(), LAYOUT)
    assert again.fingerprint == found.fingerprint
    assert found.weights(LAYOUT).isfinite().all()


def private(data: bytes) -> None:
    found = PrivateAdapter.from_safetensors(data, MODULES)
    assert found.nbytes <= 8 * len(data)


def base64(data: bytes) -> None:
    routing(from_base64("routing.safetensors", data.decode("latin-1")))


def nested(data: bytes) -> None:
    body = parsed(TaskBody, b'{"routing": {"logits": ' + data + b"}}")
    if body.routing is not None:
        Routing.from_nested(body.routing.logits or [], LAYOUT)


def body(data: bytes) -> None:
    parsed(GenerateBody if len(data) % 2 else TaskBody, data)


def template(data: bytes) -> None:
    text, _, value = data.decode("utf-8", "replace").partition("\0")
    checked = EditBody(template=text).template or ""
    length = filled_length(checked, value)
    if length < 1 << 20:
        found = filled(checked, value)
        assert len(found) == length
        assert found == value.join(checked.split("{input}"))


def archive(data: bytes) -> None:
    found = read_folder(data, ("a", "b"), 1 << 16)
    assert set(found) == {"a", "b"}
    assert sum(map(len, found.values())) <= 1 << 16


def peft(data: bytes) -> None:
    config, _, weights = data.partition(b"\0\0\0\0")
    read_peft_lora(config, weights, MODULES)


TARGETS: list[Callable[[bytes], None]] = [
    routing,
    private,
    base64,
    nested,
    body,
    template,
    archive,
    peft,
]


def one(data: bytes) -> None:
    """The first byte chooses the target."""
    if not data:
        return
    refusal = None
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except REFUSALS as exc:
        refusal = exc
    assert refusal is None or len(problem_response(refusal).body) < MAX_REFUSAL


if __name__ == "__main__":
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
