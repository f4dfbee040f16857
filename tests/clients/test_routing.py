"""Routings from arrays, tensors, lists and files, beside what the server makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save

from polyhead.adapters.routing import Layout, fold, mix
from polyhead.adapters.routing import Routing as ServerRouting
from polyhead.clients import Routing

LAYOUT = Layout(tuple(f"layers.{block}.{name}" for block in range(2) for name in "qv"), 3, 5)
SHAPES: dict[Any, tuple[int, ...]] = {"module": (4, 3, 5), "block": (2, 3, 5), "model": (3, 5)}


def values(shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def as_read(routing: Routing) -> ServerRouting:
    return ServerRouting.from_safetensors(routing.safetensors, LAYOUT)


@pytest.mark.parametrize("granularity", SHAPES)
def test_the_server_reads_what_each_form_says(granularity: Any) -> None:
    logits = values(SHAPES[granularity])
    forms = [logits, logits.numpy(), logits.tolist(), logits.double().requires_grad_()]
    for form in forms:
        read = as_read(Routing.from_logits(form, granularity))
        assert (read.kind, read.granularity) == ("logits", granularity)
        assert torch.equal(read.values, logits)
    weights = Routing.from_weights(fold(logits).numpy(), granularity)
    assert torch.equal(as_read(weights).values, fold(logits))
    assert weights.kind == "weights"


@pytest.mark.parametrize("granularity", SHAPES)
def test_coefficients_are_sent_and_mixed_as_they_are(granularity: Any) -> None:
    given = [values(SHAPES[granularity], seed) for seed in range(2)]
    sent = [Routing.from_coefficients(one, granularity) for one in given]
    read = as_read(sent[0])
    assert (read.kind, read.granularity) == ("coefficients", granularity)
    assert torch.equal(read.values, given[0])
    assert torch.equal(torch.tensor(sent[0].weights()), given[0])
    mixed = as_read(Routing.mix([(sent[0], 3), (sent[1], 1)]))
    assert mixed.kind == "coefficients"
    torch.testing.assert_close(mixed.values, 0.75 * given[0] + 0.25 * given[1])


def test_the_granularity_follows_from_the_dimensions() -> None:
    assert Routing.from_logits(values((3, 5))).granularity == "model"
    assert Routing.from_logits(values((4, 3, 5))).granularity == "module"


def test_weights_are_the_servers() -> None:
    logits = 30 * values((4, 3, 5))  # far enough out for sigmoids of 0 and 1
    found = Routing.from_logits(logits).weights()
    torch.testing.assert_close(torch.tensor(found), fold(logits), rtol=1e-5, atol=1e-7)
    sunk = Routing.from_logits(np.full((3, 5), -1e6)).weights()
    assert torch.equal(torch.tensor(sunk), fold(torch.full((3, 5), -1e6)))


def test_a_mixture_is_the_servers() -> None:
    parts = [ServerRouting(values((4, 3, 5), seed)) for seed in range(2)]
    ours = [Routing(part.to_safetensors()) for part in parts]
    mixed = as_read(Routing.mix([(ours[0], 1), (ours[1], 3)])).weights(LAYOUT)
    theirs = mix([(parts[0].weights(LAYOUT), 1), (parts[1].weights(LAYOUT), 3)])
    torch.testing.assert_close(mixed, theirs)
    assert not torch.allclose(mixed, mix([(part.weights(LAYOUT), 1) for part in parts]), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_files_of_every_precision_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    logits = values((4, 3, 5)).to(dtype)
    data = save({"logits": logits}, {"granularity": "module"})
    (tmp_path / "file").write_bytes(data)
    for source in (data, tmp_path / "file", str(tmp_path / "file")):
        routing = Routing.from_safetensors(source)
        assert routing.shape == (4, 3, 5)
        assert routing.tolist() == logits.double().tolist()
    routing.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == data


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Routing.from_logits([[1, 2], [3]]), r"logits\[1\]: found shape \[1\], expected"),
        (lambda: Routing.from_logits([[1, "x"]]), r"logits\[0\]\[1\]: found 'x'"),
        (lambda: Routing.from_weights([1, 2]), "weights: found 1 dimensions, expected 2 or 3"),
        (lambda: Routing.from_weights([[1]], "block"), "found 2 dimensions, expected 3"),
        (lambda: Routing.from_logits([]), "expected numbers or a list"),
        (lambda: Routing.from_safetensors(b"PK\3\4 not this"), "not a safetensors file"),
        (lambda: Routing.from_safetensors(save({"a": values((2, 2))})), r"found \['a'\]"),
        (lambda: Routing.mix([]), "shares: found"),
        (lambda: Routing.mix([(Routing.from_logits([[1]]), -1)]), "expected positive"),
        (
            lambda: Routing.mix([(Routing.from_logits(values(s)), 1) for s in ((1, 2), (2, 1))]),
            "only routings of one shape can be mixed",
        ),
    ],
)
def test_what_cannot_be_a_routing_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
