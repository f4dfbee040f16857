"""Which server runs a job, where several share one database."""

import fcntl
import logging
import secrets
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from polyhead.server.tasks.errors import RegistryUnavailable
from polyhead.server.tasks.jobs import LEASE_SECONDS, Jobs
from polyhead.server.tasks.outages import Outage

logger = logging.getLogger(__name__)

FILE_NAME = "server.id"


class Leases:
    """Keeps this server's running jobs its own while it lives, in a thread.

    lost: is told of each job that is not this server's any more, because it was cancelled or taken
    over elsewhere; of those that ended here as well. found: is called when jobs are in line that
    this server may not have heard of.
    """

    def __init__(self, jobs: Jobs, lost: Callable[[str], None], found: Callable[[], None]) -> None:
        self._jobs = jobs
        self._lost = lost
        self._found = found
        self._file: IO[str] | None = None
        self._held: set[str] = set()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._main, name="polyhead-leases", daemon=True)

    def start(self) -> None:
        """Run jobs in this server's name from now on."""
        self._file, name = own_name(self._jobs.data_dir)
        self._jobs.run_as(name)
        self._thread.start()

    def stop(self) -> None:
        """Let another process run jobs in this server's name. May be called twice."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._file is not None:
            self._file.close()
            self._file = None

    def tick(self) -> None:
        """Renew, look for what was lost and for what others left. Raises `RegistryUnavailable`."""
        held = self._jobs.renew()
        for job_id in self._held - held:
            self._lost(job_id)
        self._held = held
        self._jobs.recover_expired()
        if self._jobs.counts().get("queued"):
            self._found()

    def _main(self) -> None:
        outage = Outage(logger, "the leases of running jobs cannot be renewed")
        while not self._stopping.wait(LEASE_SECONDS / 3):
            try:
                self.tick()
                outage.over()
            except RegistryUnavailable as exc:
                outage.failed(exc)


def own_name(folder: Path) -> tuple[IO[str] | None, str]:
    """The name of the one server that works in `folder`, the same after a restart, and the file
    whose lock says that it lives. A second server there gets a name for once and no file."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / FILE_NAME).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None, secrets.token_hex(16)
    file.seek(0)
    name = file.read().strip()
    if not name:
        name = secrets.token_hex(16)
        file.write(name)
        file.flush()
    return file, name
