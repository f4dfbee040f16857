"""What is logged of something that is tried again and again while the database is away."""

import logging
import time
from collections.abc import Callable

EVERY_SECONDS = 30.0


class Outage:
    """Logs the first failure, then one in `EVERY_SECONDS`, and that it is over. For one thread.

    without: what does not happen meanwhile, as the beginning of a sentence.
    """

    def __init__(
        self, logger: logging.Logger, without: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._logger = logger
        self._without = without
        self._clock = clock
        self._began: float | None = None
        self._logged = 0.0
        self._failures = 0

    def failed(self, cause: BaseException) -> None:
        """It did not work."""
        now = self._clock()
        self._failures += 1
        if self._began is None:
            self._began = now
        elif now - self._logged < EVERY_SECONDS:
            return
        self._logged = now
        self._logger.error("%s: %s", self._without, cause)

    def over(self) -> None:
        """It works, maybe again."""
        if self._began is None:
            return
        seconds = self._clock() - self._began
        self._logger.warning(
            "%s for %.0f s, %d times: that is over", self._without, seconds, self._failures
        )
        self._began, self._failures = None, 0
