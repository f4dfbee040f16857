"""The weights of a step's factored tokens, kept from step to step."""

from collections.abc import Sequence

import torch
from torch import Tensor

from polyhead.adapters import ops
from polyhead.adapters.plan import RoutedTask, adapter_key


class WeightBoard:
    """Routing weights of the factored tokens as its form reads them, kept between steps.

    A decode step's rows are mostly those of the step before: only rows that changed are written.
    """

    def __init__(
        self, heads: int, rank: int, columns: int, order: Tensor, device: torch.device
    ) -> None:
        self._rank = rank
        self._order = order
        self._columns = columns
        self._heads = heads
        self._device = device
        self._rows = self._zeros(0)
        self._keys: list[str] = []

    def _zeros(self, rows: int) -> Tensor:
        return torch.zeros(rows, self._heads, self._columns, device=self._device)

    def update(self, tasks: Sequence[RoutedTask | None]) -> Tensor:
        """Rows for these tokens, `[n, H, M*S*r]`; None is a row of zeros."""
        if len(tasks) > len(self._keys):
            with torch.inference_mode(False):  # else later updates outside of it would fail
                grown = self._zeros(len(tasks))
            grown[: len(self._keys)] = self._rows[: len(self._keys)]
            self._rows = grown
            self._keys += [""] * (len(tasks) - len(self._keys))
        keys, self._keys = self._keys, []  # an update that fails leaves an empty board
        held = {key: row for row, key in enumerate(keys)}
        moved: list[tuple[int, int]] = []  # (from, to)
        fresh: dict[str, list[int]] = {}
        wanted = {adapter_key(task): task for task in tasks}
        for row, task in enumerate(tasks):
            key = adapter_key(task)
            if key == keys[row]:
                continue
            if key in held:
                moved.append((held[key], row))
            else:
                fresh.setdefault(key, []).append(row)
            keys[row] = key
        if moved:  # copied by way of a snapshot, since rows may trade places
            self._rows[[to for _, to in moved]] = self._rows[[at for at, _ in moved]]
        for key, rows in fresh.items():
            self._rows[rows] = self._spread(wanted[key])
        self._keys = keys
        return self._rows[: len(tasks)]

    def _spread(self, task: RoutedTask | None) -> Tensor:
        if task is None:
            return self._rows.new_zeros(())
        weights = task.weights[self._order].to(self._rows.device)
        return self._arranged(weights)

    def _arranged(self, weights: Tensor) -> Tensor:
        return ops.spread(weights, self._rank)


class PlainBoard(WeightBoard):
    """The same for the compiled kernels, which read weights as they are: `[n, M, H, S]`."""

    def _zeros(self, rows: int) -> Tensor:
        modules = len(self._order)
        skills = self._columns // (modules * self._rank)
        by_module = torch.zeros(modules, rows, self._heads, skills, device=self._device)
        return by_module.transpose(0, 1)  # a module's weights adjacent: a kernel reads no others

    def _arranged(self, weights: Tensor) -> Tensor:
        return weights
