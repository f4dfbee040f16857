"""Token buckets: how much of something a caller may use in a minute."""

from collections.abc import Callable


class Bucket:
    """Holds at most one minute's worth and fills evenly. Used on the event loop only.

    It may go below zero: what a request costs is known while it runs, and a debt is paid by
    waiting before the next one.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._per_minute = per_minute
        self._level = per_minute
        self._seen = clock()

    def set_rate(self, per_minute: float) -> None:
        """Another rate from now on; what was used stays used."""
        self._fill()
        self._level = min(self._level, per_minute)
        self._per_minute = per_minute

    def wait_for(self, amount: float) -> float:
        """Seconds until `amount`, or a full bucket where that is less, is there; 0 if it is."""
        self._fill()
        missing = min(amount, self._per_minute) - self._level
        return max(0.0, missing) * 60 / self._per_minute

    def take(self, amount: float) -> None:
        """Use `amount`, whether it is there or not."""
        self._fill()
        self._level -= amount

    def _fill(self) -> None:
        now = self._clock()
        gained = (now - self._seen) * self._per_minute / 60
        self._level = min(self._per_minute, self._level + gained)
        self._seen = now
