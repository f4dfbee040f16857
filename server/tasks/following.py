"""Following what other processes change in the same database."""

import logging
import threading
import time
from collections.abc import Callable, Iterable

import psycopg

from polyhead.server.tasks import audit
from polyhead.server.tasks.errors import RegistryUnavailable
from polyhead.server.tasks.outages import Outage
from polyhead.server.tasks.sql import Database

logger = logging.getLogger(__name__)

PAGE = 1000
CONNECT_SECONDS = 5
TIDY_SECONDS = 3600.0


class Follower:
    """Reads the log of changes in a thread and tells each task in it to `tell`, once.

    PostgreSQL says at once when the log has grown. What it says may get lost, so the log is read
    every `seconds` besides; that is all there is with SQLite. Now and then it calls `tidy`.
    """

    def __init__(
        self,
        database: Database,
        tell: Callable[[str], None],
        tidy: Callable[[], object],
        seconds: float,
    ) -> None:
        self._database = database
        self._tell = tell
        self._tidy = tidy
        self._tidied_at = float("-inf")
        self._seconds = seconds
        self._outage = Outage(logger, "changes of other servers are not heard of")
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="polyhead-follower", daemon=True)
        self._own: set[int] = set()
        with database.read() as connection:
            self._seen = audit.last_number(connection)
        self._caught_up_at = time.monotonic()

    @property
    def lag(self) -> float:
        """For how many seconds changes may have been missed; 0 where nobody follows."""
        return time.monotonic() - self._caught_up_at if self._thread.is_alive() else 0.0

    def start(self) -> None:
        if not self._thread.is_alive():
            self._thread.start()

    def stop(self) -> None:
        """May be called twice, and without a start."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()

    def skip(self, numbers: Iterable[int]) -> None:
        """Entries of this process's own changes, whose listeners have been told."""
        if self._thread.is_alive():
            self._own.update(number for number in numbers if number > self._seen)

    def catch_up(self) -> None:
        """Tell of everything that has been changed until now. Raises `RegistryUnavailable`."""
        began = time.monotonic()
        while True:
            with self._database.read() as connection:
                entries = audit.since(connection, self._seen, PAGE)
            changed = dict.fromkeys(task for number, task in entries if number not in self._own)
            for task_id in changed:
                self._tell(task_id)
            if entries:
                self._seen = entries[-1][0]
                self._own -= {number for number, _ in entries}
            if len(entries) < PAGE:
                self._caught_up_at = began
                return

    def _step(self) -> None:
        self.catch_up()
        self._outage.over()
        if time.monotonic() - self._tidied_at >= TIDY_SECONDS:
            self._tidied_at = time.monotonic()
            self._tidy()

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                if self._database.is_shared:
                    self._listen()
                else:
                    self._poll()
            except (RegistryUnavailable, psycopg.Error) as exc:
                self._outage.failed(exc)
                self._stopping.wait(self._seconds)

    def _poll(self) -> None:
        while not self._stopping.wait(self._seconds):
            self._step()

    def _listen(self) -> None:
        with psycopg.connect(
            self._database.address, autocommit=True, connect_timeout=CONNECT_SECONDS
        ) as connection:
            connection.execute(f"LISTEN {audit.CHANNEL}".encode())
            while not self._stopping.is_set():
                self._step()  # also what was said before anybody listened
                for _ in connection.notifies(timeout=self._seconds, stop_after=1):
                    pass
