"""Replicas' series side by side, none lost and none mixed up."""

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from polyhead.server.scale.merging import merged


def exposition(requests: int, extra: bool = False) -> str:
    registry = CollectorRegistry()
    counter = Counter("requests", "Answered", ["task"], registry=registry)
    counter.labels('a "quoted"\ntask').inc(requests)
    Gauge("running", "Now", registry=registry).set(requests / 2)
    Histogram("seconds", "Each", buckets=(1, 2), registry=registry).observe(1.5)
    if extra:
        Gauge("only_here", "Of one", registry=registry).set(7)
    return generate_latest(registry).decode()


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))  # each family in one piece
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def test_every_series_is_there_once_for_each_replica() -> None:
    found = samples(merged({"one": exposition(3), "other": exposition(5, extra=True)}).decode())
    expected = {}
    for replica, text in (("one", exposition(3)), ("other", exposition(5, extra=True))):
        for (name, labels), value in samples(text).items():
            expected[name, labels | {("replica", replica)}] = value
    assert found == expected
    assert found["running", frozenset({("replica", "other")})] == 2.5


def test_a_family_keeps_its_kind_and_text() -> None:
    text = merged({"one": exposition(1), "other": exposition(2)}).decode()
    assert text.count("# HELP requests_total Answered") == 1
    assert text.count("# TYPE seconds histogram") == 1


def test_nonsense_is_refused() -> None:
    with pytest.raises(ValueError, match=r".+"):
        merged({"one": "not { an exposition"})
