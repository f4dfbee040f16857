"""Builds the plan of each step from the adapters of its rows."""

from collections import Counter, OrderedDict
from collections.abc import Sequence
from itertools import groupby, repeat

import torch
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable
from polyhead.adapters.costs import FormCosts, RentOrBuy
from polyhead.adapters.errors import PlanError
from polyhead.adapters.kernels import Kernels, kernels_for
from polyhead.adapters.plan import (
    Adapter,
    CombinedPart,
    FactoredPart,
    GroupSlot,
    Plan,
    PreparedAdapter,
    RoutedTask,
    Tokens,
    adapter_key,
    nbytes_of,
)
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.weight_board import PlainBoard, WeightBoard

LONG_RUN = 16
"""Adjacent tokens of one task from which they share a row of weights: shorter runs would cost
more in separate products than they save in memory."""


class Planner:
    """Chooses a form for every task of a step and gathers what the layers need.

    Not thread-safe: it belongs to the thread that runs the model. Only `prepare` may be called on
    any other.
    """

    def __init__(
        self,
        slots: Sequence[GroupSlot],
        members: Sequence[Sequence[str]],
        module_order: Sequence[int],
        device: torch.device,
        *,
        costs: FormCosts | None = None,
        kernels: Kernels | None = None,
        factor_cache_bytes: int = 256 << 20,
    ) -> None:
        self._slots = slots
        self._members = members  # module names of each group
        self._order = torch.tensor(module_order)  # layout index of each module, in group order
        self._device = device
        self.costs = costs or FormCosts()
        first = slots[0].group
        self._cut = not all(slot.group.parts.is_whole for slot in slots)
        # The kernels take as many heads of A as of B.
        groups = [slot.group for slot in slots]
        chosen = kernels or kernels_for(first.a.dtype, first.a.device, groups)
        self._kernels = None if self._cut else chosen
        board = WeightBoard if self._kernels is None else PlainBoard
        self._board = board(first.heads, first.rank, slots[-1].columns.stop, self._order, device)
        self._factors: OrderedDict[str, Sequence[ops.Factors | None]] = OrderedDict()
        self._tables: dict[str, FactorTable] = {}  # of the resident factors, for the kernels
        self._on_board: Plan | None = None  # whose weights the board holds
        self._renting = RentOrBuy()
        self._factor_cache_bytes = factor_cache_bytes
        self._factor_bytes = 0

    def arrange(self, adapters: Sequence[Adapter], counts: Sequence[int]) -> list[int]:
        """An order of the rows that makes a step cheap: rows of one adapter side by side, and the
        adapters with the most tokens, which the combined form takes, last."""
        keys = [adapter_key(adapter) for adapter in adapters]
        tokens: Counter[str] = Counter()
        for key, count in zip(keys, counts, strict=True):
            tokens[key] += count
        private = [isinstance(a, PrivateAdapter | PreparedAdapter) for a in adapters]
        return sorted(range(len(keys)), key=lambda i: (private[i], tokens[keys[i]], keys[i]))

    def build(self, adapters: Sequence[Adapter], counts: Sequence[int]) -> Plan:
        """The plan for rows of `counts[i]` adjacent tokens, each answered by `adapters[i]`.

        Raises `PlanError` when a row has no tokens.
        """
        if min(counts, default=1) < 1:
            raise PlanError("a row has no tokens", found=str(min(counts)), expected="at least 1")
        tokens = [a for a, n in zip(adapters, counts, strict=True) for a in repeat(a, n)]
        distinct = {adapter_key(a): a for a in adapters}
        places: dict[str, list[int]] = {key: [] for key in distinct}
        for position, adapter in enumerate(tokens):
            places[adapter_key(adapter)].append(position)
        routed = {k: len(places[k]) for k, a in distinct.items() if isinstance(a, RoutedTask)}
        resident = self._factors.keys()
        available = resident | self._renting.due(self.costs, routed, resident)
        combined = self.costs.choose_combined(routed, available)
        private = {
            k for k, a in distinct.items() if isinstance(a, PrivateAdapter | PreparedAdapter)
        }
        forms = {
            "combined": len(combined),
            "factored": len(routed.keys() - combined),
            "private": len(private),
            "bare": int("" in distinct),
        }
        combined |= private
        factored = sorted(p for k in routed.keys() - combined for p in places[k])
        own = {k: places[k] for k in distinct if k in combined}
        parts = [
            CombinedPart(_tokens(positions, self._device), self._resident(k, distinct[k]))
            for k, positions in own.items()
        ]
        self._evict(keep=combined)
        shared = self._factored_part(factored, tokens, combined)
        plan = Plan(len(tokens), shared, parts, forms=forms)
        if self._kernels is not None and (plan.factored is not None or parts):
            tables = [self._table_of(key, distinct[key]) for key in own]
            plan.step = self._kernels.step(plan, tables, list(own.values()), self._device)
        if plan.factored is not None:
            self._on_board = plan
        return plan

    def prepare(self, adapter: PrivateAdapter) -> PreparedAdapter:
        """Lay an adapter out for the layers, so that no step has to."""
        factors = self._build_factors(adapter)
        whole = adapter if self._cut else None
        return PreparedAdapter(adapter.fingerprint, factors, self._table(factors), whole=whole)

    def _table_of(self, key: str, adapter: Adapter) -> FactorTable:
        prepared = adapter.table if isinstance(adapter, PreparedAdapter) else None
        return prepared or self._tables[key]

    def _factored_part(
        self, positions: list[int], tokens: Sequence[Adapter], combined: set[str]
    ) -> FactoredPart | None:
        if not positions:
            return None
        span = range(positions[0], positions[-1] + 1)
        if len(span) <= 2 * len(positions):
            positions = list(span)  # zero rows for a few others cost less than gathering
        own = [tokens[p] for p in positions]
        tasks = [a if isinstance(a, RoutedTask) and a.key not in combined else None for a in own]
        rows, pieces = _share_rows(tasks)
        if self._on_board is not None:
            self._on_board.stale = True
        weights = self._board.update(rows)
        return FactoredPart(_tokens(positions, self._device), weights, pieces)

    def _resident(self, key: str, adapter: Adapter) -> Sequence[ops.Factors | None]:
        if isinstance(adapter, PreparedAdapter):
            return adapter.factors
        factors = self._factors.get(key)
        if factors is None:
            factors = self._build_factors(adapter)
            self._factors[key] = factors
            self._factor_bytes += nbytes_of(factors)
            table = self._table(factors)
            if table is not None:
                self._tables[key] = table
        self._factors.move_to_end(key)
        return factors

    def _table(self, factors: Sequence[ops.Factors | None]) -> FactorTable | None:
        sizes = [slot.group.size for slot in self._slots]
        return FactorTable.of(factors, sizes) if self._kernels is not None else None

    def _build_factors(self, adapter: Adapter) -> Sequence[ops.Factors | None]:
        if isinstance(adapter, RoutedTask):
            return self.fold(adapter)
        assert isinstance(adapter, PrivateAdapter)
        pairs = zip(self._slots, self._members, strict=True)
        return [self._private_factors(adapter, slot, names) for slot, names in pairs]

    def fold(self, task: RoutedTask) -> Sequence[ops.Factors]:
        """A routed task's factors, by group."""
        weights = task.weights[self._order].to(self._device)
        sizes = [slot.group.size for slot in self._slots]
        pieces = zip(self._slots, torch.split(weights, sizes), strict=True)
        return [self._fold(slot, own) for slot, own in pieces]

    def _fold(self, slot: GroupSlot, weights: Tensor) -> ops.Factors:
        if self._kernels is None:
            return ops.fold_factors(slot.group, weights)
        return self._kernels.fold(slot.index, slot.group, weights)

    def _private_factors(
        self, adapter: PrivateAdapter, slot: GroupSlot, names: Sequence[str]
    ) -> ops.Factors | None:
        own = [name for name in names if name in adapter.a]
        if not own:
            return None
        parts, heads, dtype = slot.group.parts, slot.group.heads, slot.group.a.dtype
        a = torch.cat([parts.rows(adapter.a[name], heads) for name in own], dim=1)
        b = [parts.columns(adapter.b[name], heads) if name in adapter.b else None for name in names]
        moved = tuple(None if t is None else t.to(self._device, dtype).contiguous() for t in b)
        factors = ops.Factors(a.to(self._device, dtype), moved)
        return factors if self._kernels is None else self._kernels.lay(factors)

    def _evict(self, keep: set[str]) -> None:
        for key in list(self._factors):
            if self._factor_bytes <= self._factor_cache_bytes:
                return
            if key not in keep:
                self._factor_bytes -= nbytes_of(self._factors.pop(key))
                self._tables.pop(key, None)


def _share_rows(
    tasks: Sequence[RoutedTask | None],
) -> tuple[list[RoutedTask | None], list[tuple[slice, slice]]]:
    """One row of weights for a long run of tokens of one task, a row a token for the others."""
    rows: list[RoutedTask | None] = []
    pieces: list[tuple[slice, slice]] = []
    single = 0  # tokens since the last long run
    start = 0
    for _, found in groupby(tasks, key=adapter_key):
        run = list(found)
        stop = start + len(run)
        if len(run) >= LONG_RUN:
            if single:
                pieces.append(_ending(start, len(rows), single))
                single = 0
            rows.append(run[0])
            pieces.append((slice(start, stop), slice(len(rows) - 1, len(rows))))
        else:
            rows += run
            single += len(run)
        start = stop
    if single:
        pieces.append(_ending(start, len(rows), single))
    return rows, pieces


def _ending(token: int, row: int, length: int) -> tuple[slice, slice]:
    return slice(token - length, token), slice(row - length, row)


def _tokens(positions: list[int], device: torch.device) -> Tokens:
    if positions[-1] - positions[0] + 1 == len(positions):
        return slice(positions[0], positions[-1] + 1)
    return torch.tensor(positions, device=device)
