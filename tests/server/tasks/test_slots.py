"""Private adapters within a budget: who stays, who goes, and who must wait."""

import random
import threading
import time
from collections.abc import Callable

import pytest
import torch
from factories import plain_prepare

from polyhead.adapters.plan import PreparedAdapter
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.routing import Layout
from polyhead.server.tasks.catalogue import Catalogue, ResolvedTask
from polyhead.server.tasks.errors import AdapterTooLarge, SlotsBusy, UnknownTask
from polyhead.server.tasks.registry import Registry
from polyhead.server.tasks.slots import Slots

ONE = 4 * (8 * 2 + 2 * 6)
"""Bytes of one adapter of `made`."""


def made(seed: int) -> PrivateAdapter:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(8, 2, generator=generator), torch.randn(2, 6, generator=generator)
    return PrivateAdapter({"m.0.q": a}, {"m.0.q": b})


@pytest.fixture
def open_slots(registry: Registry, layout: Layout) -> Callable[[int], Catalogue]:
    """A catalogue over the tasks t0 … t5 with room for so many private adapters."""
    for seed in range(6):
        registry.create(f"t{seed}", made(seed))
    return lambda count: Catalogue(registry, layout, Slots(plain_prepare, count * ONE + ONE // 2))


def is_of(found: ResolvedTask, seed: int) -> bool:
    assert isinstance(found.adapter, PreparedAdapter)
    return found.adapter.key == made(seed).fingerprint


def test_the_least_recently_used_makes_room(open_slots: Callable[[int], Catalogue]) -> None:
    catalogue = open_slots(3)
    for seed in (0, 1, 2, 0, 3):  # t1 is the one not used for longest
        assert is_of(catalogue.resolve(f"t{seed}"), seed)
        assert catalogue.slots.nbytes <= 3 * ONE
    loads = catalogue.slots.loads
    for seed in (0, 2, 3):
        catalogue.resolve(f"t{seed}")
    assert (catalogue.slots.loads, catalogue.slots.evictions) == (loads, 1) == (4, 1)
    catalogue.resolve("t1")
    assert (catalogue.slots.loads, len(catalogue.slots)) == (5, 3)


def test_who_runs_is_never_evicted(open_slots: Callable[[int], Catalogue]) -> None:
    catalogue = open_slots(2)
    held = catalogue.resolve("t0")
    for seed in (1, 2, 3, 4):
        catalogue.resolve(f"t{seed}")
    assert catalogue.slots.pinned == 1
    loads = catalogue.slots.loads
    assert catalogue.resolve("t0").adapter.factors is held.adapter.factors  # type: ignore[union-attr]
    assert catalogue.slots.loads == loads


def test_all_slots_in_use_is_a_refusal_until_one_is_let_go(
    open_slots: Callable[[int], Catalogue],
) -> None:
    catalogue = open_slots(2)
    told = []
    catalogue.slots.on_release = lambda: told.append(1)
    held = [catalogue.resolve("t0"), catalogue.resolve("t1")]
    for _ in range(2):  # the second time its size is known, and it is not even read
        with pytest.raises(SlotsBusy, match="t2"):
            catalogue.resolve("t2")
    again = catalogue.resolve("t1")  # what is resident is still found
    assert (len(told), len(catalogue.slots), catalogue.slots.pinned) == (0, 2, 2)
    held.pop()
    with pytest.raises(SlotsBusy):
        catalogue.resolve("t2")
    assert is_of(again, 1)
    del again
    assert len(told) == 2
    assert is_of(catalogue.resolve("t2"), 2)
    assert is_of(held[0], 0)


def test_an_adapter_over_the_whole_budget_is_refused(registry: Registry, layout: Layout) -> None:
    registry.create("t", made(0))
    small, enough = (Slots(plain_prepare, size) for size in (ONE - 1, ONE))
    with pytest.raises(AdapterTooLarge, match=f"{ONE} bytes"):
        Catalogue(registry, layout, small).resolve("t")
    with pytest.raises(AdapterTooLarge):
        small.check(made(0))
    enough.check(made(0))
    assert Catalogue(registry, layout, enough).resolve("t").adapter is not None
    assert (small.nbytes, enough.nbytes) == (0, ONE)


def test_a_changed_task_is_found_anew_and_its_old_adapter_goes_with_who_runs(
    registry: Registry, open_slots: Callable[[int], Catalogue]
) -> None:
    catalogue = open_slots(2)
    old = catalogue.resolve("t0")
    registry.replace("t0", made(9))
    assert is_of(old, 0)
    assert (len(catalogue.slots), catalogue.slots.nbytes) == (1, ONE)
    assert is_of(catalogue.resolve("t0"), 9)
    assert (len(catalogue.slots), catalogue.slots.pinned) == (2, 1)
    del old
    assert catalogue.slots.pinned == 0
    assert (len(catalogue.slots), catalogue.slots.nbytes) == (1, ONE)
    registry.delete("t0")
    assert (len(catalogue.slots), catalogue.slots.nbytes) == (0, 0)


def test_churn_of_many_threads_keeps_the_budget_and_the_right_adapters(
    registry: Registry, open_slots: Callable[[int], Catalogue]
) -> None:
    catalogue = open_slots(3)
    wrong, busy, served, most = [], [0], [0], [0]

    def work(seed: int) -> None:
        chance = random.Random(seed)
        for _ in range(150):
            pick = chance.randrange(6)
            try:
                found = catalogue.resolve(f"t{pick}")
            except SlotsBusy:
                busy[0] += 1
                continue
            most[0] = max(most[0], catalogue.slots.nbytes)
            served[0] += 1
            if not (is_of(found, pick) or (pick == 5 and is_of(found, 50))):
                wrong.append(pick)
            if chance.random() < 0.3:
                time.sleep(0.001)

    def change() -> None:
        for number in range(20):
            registry.replace("t5", made(50 if number % 2 else 5))
            time.sleep(0.005)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    threads.append(threading.Thread(target=change))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert served[0] > 300
    assert busy[0] > 0, "the slots were never all in use, so nothing was put to the test"
    assert 2 * ONE < most[0] <= 3 * ONE
    assert catalogue.slots.pinned == 0
    assert catalogue.slots.nbytes == ONE * len(catalogue.slots)


def test_what_is_staged_needs_no_reading_once_a_slot_is_free(
    open_slots: Callable[[int], Catalogue], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    catalogue = open_slots(2)
    held = [catalogue.resolve("t0"), catalogue.resolve("t1")]
    staged = catalogue.stage("t2")
    assert staged is not None
    assert (catalogue.slots.nbytes, catalogue.slots.staged_bytes) == (2 * ONE, ONE)
    with pytest.raises(SlotsBusy, match="t2"):
        catalogue.resolve("t2")
    monkeypatch.setattr(registry, "load", None)
    held.pop()
    assert is_of(catalogue.resolve("t2"), 2)
    assert (catalogue.slots.nbytes, catalogue.slots.staged_bytes) == (2 * ONE, 0)


def test_nothing_staged_outlasts_who_waits_for_it(open_slots: Callable[[int], Catalogue]) -> None:
    catalogue = open_slots(2)
    held = [catalogue.resolve("t0"), catalogue.resolve("t1")]
    staged = catalogue.stage("t2")
    assert catalogue.stage("t3") is None  # a quarter of the budget is less than one more
    del staged
    assert catalogue.slots.staged_bytes == 0
    other = catalogue.stage("t3")
    assert other is not None
    with pytest.raises(SlotsBusy):
        catalogue.resolve("t2")
    assert len(held) == 2


def test_as_much_is_staged_as_a_quarter_of_the_budget_holds(
    open_slots: Callable[[int], Catalogue],
) -> None:
    catalogue = open_slots(8)
    staged = [catalogue.stage(f"t{seed}") for seed in range(4)]
    assert [one is not None for one in staged] == [True, True, False, False]
    assert catalogue.slots.staged_bytes == 2 * ONE


def test_a_change_voids_what_is_staged(
    open_slots: Callable[[int], Catalogue], registry: Registry
) -> None:
    catalogue = open_slots(2)
    staged = catalogue.stage("t2")
    registry.replace("t2", made(9))
    assert staged is not None
    assert catalogue.slots.staged_bytes == 0
    assert is_of(catalogue.resolve("t2"), 9)
    with pytest.raises(UnknownTask):
        catalogue.stage("gone")
