import math
import struct
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyhead.adapters.errors import PrivateAdapterError
from polyhead.adapters.inventory import ModuleShape
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.tensor_files import dump_tensors

MODULES = (
    ModuleShape(name="layers.0.q", in_features=8, out_features=4),
    ModuleShape(name="layers.0.up", in_features=8, out_features=12),
    ModuleShape(name="layers.1.q", in_features=8, out_features=4),
)
Pair = tuple[dict[str, Tensor], dict[str, Tensor]]


def factors(**ranks: int) -> Pair:
    """A and B of the modules whose last names are given, `{"q": 2}`, in layer 0."""
    generator = torch.Generator().manual_seed(0)
    a, b = {}, {}
    for module in MODULES[:2]:
        rank = ranks.get(module.name.rpartition(".")[2])
        if rank is not None:
            a[module.name] = torch.randn(module.in_features, rank, generator=generator)
            b[module.name] = torch.randn(rank, module.out_features, generator=generator)
    return a, b


def test_scaling_is_folded_into_b() -> None:
    a, b = factors(q=2, up=3)
    adapter = PrivateAdapter.checked(a, b, MODULES, scaling=0.25)
    x = torch.randn(5, 8)
    for name in a:
        found = x @ adapter.a[name] @ adapter.b[name]
        assert torch.allclose(found, 0.25 * (x @ a[name] @ b[name]), atol=1e-6)
        assert not torch.allclose(found, x @ a[name] @ b[name], atol=1e-2)


def test_ranks_may_differ_and_modules_may_be_left_bare() -> None:
    adapter = PrivateAdapter.checked(*factors(q=1, up=7), MODULES)
    assert [t.shape[1] for t in adapter.a.values()] == [1, 7]
    assert "layers.1.q" not in adapter.a


def test_numbers_are_served_in_float32() -> None:
    a, b = factors(q=2)
    halves = [{name: t.half() for name, t in part.items()} for part in (a, b)]
    adapter = PrivateAdapter.checked(*halves, MODULES)
    assert adapter.a["layers.0.q"].dtype == adapter.b["layers.0.q"].dtype == torch.float32
    assert adapter.nbytes == 4 * (8 * 2 + 2 * 4)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("layers.0.q.A", lambda t: t.T),
        ("layers.0.q.B", lambda t: t[0]),
        ("layers.0.q.A", lambda t: t[None]),
        ("layers.0.up.A", lambda t: t[:, :1]),
        ("layers.0.up.A", lambda t: t.index_fill(0, torch.tensor(3), math.nan)),
        ("layers.0.up.B", lambda t: t.index_fill(1, torch.tensor(5), -math.inf)),
        ("layers.0.q.A", lambda t: t.int()),
        ("layers.0.q.B", lambda t: t.to(torch.complex64)),
        ("layers.0.q.A", lambda t: t.double() * 1e39),
    ],
)
def test_a_tensor_that_does_not_fit_names_its_module(
    name: str, change: Callable[[Tensor], Tensor]
) -> None:
    a, b = factors(q=2, up=3)
    tensors, module = (a if name.endswith(".A") else b), name[:-2]
    tensors[module] = change(tensors[module])
    with pytest.raises(PrivateAdapterError) as caught:
        PrivateAdapter.checked(a, b, MODULES)
    assert caught.value.field == module


def test_a_and_b_name_the_same_adapted_modules() -> None:
    a, b = factors(q=2, up=3)
    q = "layers.0.q"
    for odd_a, odd_b in [
        ({}, {}),
        (a, {}),
        ({q: a[q]}, b),
        (a | {"layers.9.q": a[q]}, b | {"layers.9.q": b[q]}),
    ]:
        with pytest.raises(PrivateAdapterError, match="same, adapted modules"):
            PrivateAdapter.checked(odd_a, odd_b, MODULES)


@pytest.mark.parametrize("scaling", [math.nan, math.inf, 1e39])
def test_a_scaling_that_leaves_float32_is_refused(scaling: float) -> None:
    with pytest.raises(PrivateAdapterError, match="finite"):
        PrivateAdapter.checked(*factors(q=2), MODULES, scaling=scaling)


def test_the_rank_has_a_limit() -> None:
    PrivateAdapter.checked(*factors(q=4), MODULES, max_rank=4)
    for rank in (0, 5):
        with pytest.raises(PrivateAdapterError, match="1 <= r <= 4"):
            PrivateAdapter.checked(*factors(q=rank), MODULES, max_rank=4)


def test_round_trip_is_exact() -> None:
    adapter = PrivateAdapter.checked(*factors(q=2, up=3), MODULES, scaling=0.3)
    again = PrivateAdapter.from_safetensors(adapter.to_safetensors(), MODULES)
    assert again.a.keys() == adapter.a.keys()
    for name in adapter.a:
        assert torch.equal(again.a[name], adapter.a[name])
        assert torch.equal(again.b[name], adapter.b[name])
    assert again.fingerprint == adapter.fingerprint


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_the_fingerprint_changes_with_any_number(data: st.DataObject) -> None:
    a, b = factors(q=2, up=3)
    before = PrivateAdapter.checked(a, b, MODULES).fingerprint
    flat = data.draw(st.sampled_from([a, b]))[data.draw(st.sampled_from(sorted(a)))].view(-1)
    index = data.draw(st.integers(0, flat.numel() - 1))
    flat[index] = torch.nextafter(flat[index], torch.tensor(9.0))
    assert PrivateAdapter.checked(a, b, MODULES).fingerprint != before


def test_the_fingerprint_changes_with_the_module_and_not_with_the_order() -> None:
    (a,), (b,) = (list(part.values()) for part in factors(q=2))
    found = {
        PrivateAdapter.checked({name: a}, {name: b}, MODULES).fingerprint
        for name in ("layers.0.q", "layers.1.q")
    }
    assert len(found) == 2
    ordered = factors(q=2, up=3)
    turned = [dict(reversed(part.items())) for part in ordered]
    assert (
        PrivateAdapter.checked(*turned, MODULES).fingerprint
        == PrivateAdapter.checked(*ordered, MODULES).fingerprint
    )


@pytest.mark.parametrize(
    "spoiled",
    [
        lambda _: b"",
        lambda data: data[:-1],
        lambda data: struct.pack("<Q", 1 << 42) + data[8:],
        lambda data: data.replace(b"layers.0.q.A", b"layers.0.q.C"),
        lambda data: data.replace(b"F32", b"I32"),
        lambda data: data.replace(b"[8,2]", b"[2,8]"),
    ],
)
def test_a_broken_file_is_refused(spoiled: Callable[[bytes], bytes]) -> None:
    data = PrivateAdapter.checked(*factors(q=2), MODULES).to_safetensors()
    assert spoiled(data) != data
    with pytest.raises(PrivateAdapterError):
        PrivateAdapter.from_safetensors(spoiled(data), MODULES)


def test_the_rank_of_a_file_has_the_same_limit() -> None:
    a, b = factors(q=4)
    data = dump_tensors({"layers.0.q.A": a["layers.0.q"], "layers.0.q.B": b["layers.0.q"]}, {})
    assert PrivateAdapter.from_safetensors(data, MODULES, max_rank=4).a.keys() == a.keys()
    with pytest.raises(PrivateAdapterError, match="1 <= r <= 3"):
        PrivateAdapter.from_safetensors(data, MODULES, max_rank=3)
