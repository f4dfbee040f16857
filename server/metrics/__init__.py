"""What one server counts, measures and shows to Prometheus."""

from polyhead.server.metrics.counted import Metrics
from polyhead.server.metrics.journey import Journey
from polyhead.server.metrics.scrape import Reading
from polyhead.server.metrics.stopwatch import Stopwatch, Witness

__all__ = ["Journey", "Metrics", "Reading", "Stopwatch", "Witness"]
