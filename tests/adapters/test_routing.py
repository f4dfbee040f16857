import json
import math
import struct
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from polyhead.adapters.errors import RoutingError
from polyhead.adapters.routing import Granularity, Layout, Routing, RoutingKind, fold, mix
from polyhead.adapters.tensor_files import dump_tensors

HEADS, SKILLS = 2, 3
MODULES = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v", "layers.2.q")
LAYOUT = Layout(MODULES, HEADS, SKILLS)
SHAPES: dict[Granularity, tuple[int, ...]] = {
    "module": (5, 2, 3),
    "block": (3, 2, 3),
    "model": (2, 3),
}
FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


def logits(granularity: Granularity = "module", seed: int = 0) -> Tensor:
    return torch.randn(SHAPES[granularity], generator=torch.Generator().manual_seed(seed)) * 3


def weights_by_definition(row: list[float]) -> list[float]:
    """The formula of the Polytropon paper, one row of logits, in double precision."""
    s = [1 / (1 + math.exp(-value)) for value in row]
    return [value / (sum(s) + 1e-12) for value in s]


class TestLayout:
    @pytest.mark.parametrize("granularity", SHAPES)
    def test_shape_of_each_granularity(self, granularity: Granularity) -> None:
        assert LAYOUT.shape(granularity) == SHAPES[granularity]

    @pytest.mark.parametrize(
        ("modules", "blocks"),
        [
            (MODULES, (0, 0, 1, 1, 2)),
            (("model.layers.0.mlp.up", "model.layers.10.mlp.up", "model.layers.1.q"), (0, 1, 2)),
            (("transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"), (0, 1)),
            # T5: the number of the block counts, not that of the layer inside of it.
            (("encoder.block.0.layer.0.q", "encoder.block.0.layer.1.wi"), (0, 0)),
            (("encoder.block.0.layer.0.q", "decoder.block.0.layer.0.q"), (0, 1)),
            (("h.1.q", "h.0.q", "h.1.v"), (0, 1, 0)),
            (("0.q", "1.q"), (0, 1)),
            (("layers.0.w1", "layers.0.w2"), (0, 0)),
            (("layers.0.q", "lm_head", "score"), (0, 1, 1)),
        ],
    )
    def test_blocks_are_found_in_names(
        self, modules: tuple[str, ...], blocks: tuple[int, ...]
    ) -> None:
        assert Layout(modules, 1, 1).blocks == blocks


class TestFold:
    def test_equals_the_definition(self) -> None:
        values = logits()
        found = fold(values)
        for row, expected in zip(
            found.reshape(-1, SKILLS), values.reshape(-1, SKILLS), strict=True
        ):
            assert row.tolist() == pytest.approx(weights_by_definition(expected.tolist()), abs=1e-6)

    def test_is_not_a_softmax(self) -> None:
        assert (fold(logits()) - logits().softmax(-1)).abs().max() > 0.05

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("value", [1e4, -1e4, 89.0, -89.0, 0.0])
    def test_extreme_logits_stay_finite(self, value: float, dtype: torch.dtype) -> None:
        w = fold(torch.full((2, SKILLS), value, dtype=dtype))
        assert w.dtype == torch.float32
        assert torch.isfinite(w).all()
        assert (w >= 0).all()
        assert (w.sum(-1) <= 1 + 1e-6).all()

    def test_one_extreme_logit_takes_everything_or_nothing(self) -> None:
        assert fold(torch.tensor([1e4, -1e4, -1e4])).tolist() == [1, 0, 0]
        assert fold(torch.tensor([-1e4, 5.0, 5.0])).tolist() == pytest.approx([0, 0.5, 0.5])

    @settings(max_examples=50, deadline=None)
    @given(st.lists(FLOATS, min_size=1, max_size=8))
    def test_any_finite_logits_give_a_share_of_at_most_one(self, row: list[float]) -> None:
        w = fold(torch.tensor(row))
        assert torch.isfinite(w).all()
        assert (w >= 0).all()
        assert w.sum() <= 1 + 1e-5


class TestWeights:
    def test_block_rows_serve_every_module_of_their_block(self) -> None:
        values = logits("block")
        w = Routing.checked(values, LAYOUT, granularity="block").weights(LAYOUT)
        assert w.shape == SHAPES["module"]
        assert torch.equal(w, fold(values)[[0, 0, 1, 1, 2]])
        assert not torch.equal(w[0], w[2])

    def test_a_model_row_serves_every_module(self) -> None:
        values = logits("model")
        w = Routing.checked(values, LAYOUT, granularity="model").weights(LAYOUT)
        assert torch.equal(w, fold(values).expand(SHAPES["module"]))

    def test_module_rows_serve_their_own_module(self) -> None:
        values = logits()
        w = Routing.checked(values, LAYOUT).weights(LAYOUT)
        assert torch.equal(w, fold(values))
        assert w.is_contiguous()

    def test_given_weights_are_kept_as_given(self) -> None:
        given_weights = fold(logits()).half().float()
        w = Routing.checked(given_weights, LAYOUT, "weights").weights(LAYOUT)
        assert torch.equal(w, given_weights)
        assert not torch.equal(w.sum(-1), torch.ones(5, HEADS))

    def test_uniform_uses_every_skill_alike(self) -> None:
        w = Routing.uniform(LAYOUT).weights(LAYOUT)
        assert torch.equal(w, torch.full(SHAPES["module"], 1 / SKILLS))


def spoil(values: Tensor, index: tuple[int, ...], value: float) -> Tensor:
    values = values.clone()
    values[index] = value
    return values


class TestRefusals:
    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("granularity", SHAPES)
    def test_numbers_that_are_not_finite_are_named(
        self, granularity: Granularity, value: float
    ) -> None:
        index = tuple(size - 1 for size in SHAPES[granularity])
        path = "".join(f"[{i}]" for i in index)
        with pytest.raises(RoutingError) as caught:
            Routing.checked(spoil(logits(granularity), index, value), LAYOUT, "logits", granularity)
        assert caught.value.field == f"routing.logits{path}"
        assert caught.value.found == f"{value:g}"

    def test_numbers_that_overflow_float32_are_named(self) -> None:
        values = spoil(logits().double(), (1, 0, 2), 1e39)
        with pytest.raises(RoutingError) as caught:
            Routing.checked(values, LAYOUT)
        assert caught.value.field == "routing.logits[1][0][2]"

    @pytest.mark.parametrize(
        ("row", "field"),
        [
            ([1.5, -0.5, 0.0], "routing.weights[3][1][1]"),
            ([0.5, 0.5, 0.5], "routing.weights[3][1]"),
            ([0.0, 0.0, 0.0], "routing.weights[3][1]"),
            ([math.nan, 0.5, 0.5], "routing.weights[3][1][0]"),
            ([0.0, math.inf, 0.0], "routing.weights[3][1][1]"),
            ([0.5, 0.5, 2e-3], "routing.weights[3][1]"),
        ],
    )
    def test_rows_that_are_no_weights_are_named(self, row: list[float], field: str) -> None:
        values = fold(logits())
        values[3, 1] = torch.tensor(row)
        with pytest.raises(RoutingError) as caught:
            Routing.checked(values, LAYOUT, "weights")
        assert caught.value.field == field

    @pytest.mark.parametrize(
        ("shape", "granularity"),
        [
            ((4, 2, 3), "module"),
            ((5, 3, 2), "module"),
            ((2, 3), "module"),
            ((5, 6), "module"),
            ((), "module"),
            ((0, 2, 3), "module"),
            ((5, 2, 3), "block"),
            ((1, 2, 3), "model"),
        ],
    )
    def test_a_wrong_shape_names_both(
        self, shape: tuple[int, ...], granularity: Granularity
    ) -> None:
        with pytest.raises(RoutingError) as caught:
            Routing.checked(
                torch.zeros(shape), LAYOUT, granularity=granularity, field="body.routing"
            )
        assert caught.value.field == "body.routing.logits"
        assert caught.value.found == str(list(shape))
        assert caught.value.expected == str(list(SHAPES[granularity]))

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_numbers_that_are_not_floating_are_refused(self, dtype: torch.dtype) -> None:
        with pytest.raises(RoutingError, match="wrong dtype"):
            Routing.checked(torch.zeros(SHAPES["module"], dtype=dtype), LAYOUT)


class TestNestedLists:
    @pytest.mark.parametrize("granularity", SHAPES)
    def test_json_gives_the_numbers_back(self, granularity: Granularity) -> None:
        values = logits(granularity)
        carried = json.loads(json.dumps(values.tolist()))
        routing = Routing.from_nested(carried, LAYOUT, granularity=granularity)
        assert torch.equal(routing.values, values)

    @pytest.mark.parametrize(
        "values",
        [
            [],
            {},
            None,
            3,
            "text",
            [None],
            [["a"]],
            [[1, 2], [3]],
            [[{}]],
            [10**400],
            [[[10**400] * 3] * 2] * 5,
            [[["1"] * 3] * 2] * 5,
            [[[1j] * 3] * 2] * 5,
        ],
    )
    def test_what_is_no_array_of_numbers_is_refused(self, values: Any) -> None:
        with pytest.raises(RoutingError) as caught:
            Routing.from_nested(values, LAYOUT, field="body.routing")
        assert caught.value.field == "body.routing.logits"

    def test_deep_nesting_is_refused(self) -> None:
        values: list[Any] = []
        for _ in range(5000):
            values = [values]
        with pytest.raises(RoutingError):
            Routing.from_nested(values, LAYOUT)


class TestSafetensors:
    @pytest.mark.parametrize("granularity", SHAPES)
    @pytest.mark.parametrize("kind", ["logits", "weights"])
    def test_round_trip_is_exact(self, granularity: Granularity, kind: RoutingKind) -> None:
        values = logits(granularity) if kind == "logits" else fold(logits(granularity))
        routing = Routing.checked(values, LAYOUT, kind, granularity)
        again = Routing.from_safetensors(routing.to_safetensors(), LAYOUT)
        assert torch.equal(again.values, values)
        assert (again.kind, again.granularity) == (kind, granularity)
        assert again.fingerprint == routing.fingerprint

    @settings(max_examples=30, deadline=None)
    @given(st.lists(FLOATS, min_size=6, max_size=6))
    def test_round_trip_keeps_any_finite_number(self, numbers: list[float]) -> None:
        values = torch.tensor(numbers).reshape(HEADS, SKILLS)
        routing = Routing.checked(values, LAYOUT, granularity="model")
        again = Routing.from_safetensors(routing.to_safetensors(), LAYOUT)
        assert again.values.numpy().tobytes() == values.numpy().tobytes()

    def test_half_precision_is_read(self) -> None:
        values = logits().half()
        routing = Routing.from_safetensors(dump_tensors({"logits": values}, {}), LAYOUT)
        assert torch.equal(routing.values, values.float())

    @pytest.mark.parametrize(
        ("tensors", "metadata", "reason"),
        [
            ({}, {"granularity": "module"}, "wrong tensors"),
            ({"routing": logits()}, {}, "wrong tensors"),
            ({"logits": logits(), "weights": fold(logits())}, {}, "wrong tensors"),
            ({"logits": logits()}, {"granularity": "head"}, "unknown granularity"),
            ({"logits": logits()}, {"granularity": "model"}, "wrong shape"),
            ({"logits": logits("block")}, {}, "wrong shape"),
            ({"logits": logits().int()}, {}, "wrong dtype"),
            ({"logits": logits().to(torch.complex64)}, {}, "wrong dtype"),
            ({"logits": logits() / 0}, {}, "finite"),
            ({"weights": logits()}, {}, "at least 0"),
        ],
    )
    def test_a_file_that_does_not_fit_is_refused(
        self, tensors: dict[str, Tensor], metadata: dict[str, str], reason: str
    ) -> None:
        with pytest.raises(RoutingError, match=reason):
            Routing.from_safetensors(dump_tensors(tensors, metadata), LAYOUT)

    @pytest.mark.parametrize(
        "spoiled",
        [
            lambda _: b"",
            lambda data: data[:-1],
            lambda data: data[:20],
            lambda data: data + b"\0",
            lambda data: struct.pack("<Q", 1 << 42) + data[8:],
            lambda data: data.replace(b"[5,2,3]", b"[9,9,9]"),
        ],
    )
    def test_a_broken_file_is_refused(self, spoiled: Callable[[bytes], bytes]) -> None:
        data = Routing.checked(logits(), LAYOUT).to_safetensors()
        assert spoiled(data) != data
        with pytest.raises(RoutingError) as caught:
            Routing.from_safetensors(spoiled(data), LAYOUT, field="body.routing")
        assert caught.value.field == "body.routing.safetensors"

    @settings(max_examples=100, deadline=None)
    @given(st.data())
    def test_a_flipped_byte_is_refused_or_read_as_sound_numbers(self, data: st.DataObject) -> None:
        whole = bytearray(Routing.checked(logits(), LAYOUT).to_safetensors())
        whole[data.draw(st.integers(0, len(whole) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            routing = Routing.from_safetensors(bytes(whole), LAYOUT)
        except RoutingError:
            return
        assert torch.isfinite(routing.weights(LAYOUT)).all()


class TestFingerprint:
    def test_changes_with_any_number(self) -> None:
        values = logits()
        before = Routing.checked(values, LAYOUT).fingerprint
        for index in torch.cartesian_prod(*map(torch.arange, values.shape)).tolist():
            number = values[tuple(index)]
            nudged = spoil(values, tuple(index), torch.nextafter(number, number + 1).item())
            assert Routing.checked(nudged, LAYOUT).fingerprint != before

    def test_changes_with_kind_and_granularity(self) -> None:
        # One block and one module: every granularity holds the same numbers.
        layout = Layout(("layers.0.q",), HEADS, SKILLS)
        row = fold(logits("model"))
        granularities: list[tuple[Granularity, Tensor]] = [
            ("module", row[None]),
            ("block", row[None]),
            ("model", row),
        ]
        kinds: list[RoutingKind] = ["logits", "weights"]
        found = {
            Routing.checked(values, layout, kind, granularity).fingerprint
            for granularity, values in granularities
            for kind in kinds
        }
        assert len(found) == 6


class TestMixture:
    def test_is_the_weighted_mean(self) -> None:
        first, second = fold(logits(seed=1)), fold(logits(seed=2))
        assert torch.allclose(mix([(first, 1), (second, 3)]), first / 4 + second * 0.75)
        assert not torch.allclose(mix([(first, 1), (second, 3)]), first * 0.75 + second / 4)

    def test_of_one_task_is_that_task(self) -> None:
        w = fold(logits())
        assert torch.allclose(mix([(w, 0.3)]), w)

    @pytest.mark.parametrize(
        ("shares", "field"),
        [
            ([], "mixture"),
            ([0.0], "mixture[0]"),
            ([2.0, -1.0], "mixture[1]"),
            ([1.0, math.nan], "mixture[1]"),
            ([math.inf, 1.0], "mixture[0]"),
            ([1e308, 1e308], "mixture"),
        ],
    )
    def test_shares_that_cannot_be_normalised_are_refused(
        self, shares: list[float], field: str
    ) -> None:
        with pytest.raises(RoutingError) as caught:
            mix([(fold(logits()), share) for share in shares])
        assert caught.value.field == field
