"""What several replicas show to Prometheus, as one text: every series says whose it is."""

from collections.abc import Iterator, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Shown(Collector):
    """Families of all replicas, each of them once."""

    def __init__(self, families: Mapping[str, Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        yield from self._families.values()


def merged(texts: Mapping[str, str]) -> bytes:
    """One exposition of all, from each replica's by its name; its series get the label `replica`.

    Raises `ValueError` for a text that is no exposition.
    """
    families: dict[str, Metric] = {}
    for replica, text in sorted(texts.items()):
        for family in text_string_to_metric_families(text):
            whole = families.setdefault(
                family.name, Metric(family.name, family.documentation, family.type)
            )
            whole.samples += [
                sample._replace(labels={**sample.labels, LABEL: replica})
                for sample in family.samples
            ]
    registry = CollectorRegistry()
    registry.register(_Shown(families))
    return generate_latest(registry)
