"""What can go wrong around the engine.

EngineError
├── EngineFull      the waiting line is full: try again later
├── EngineDraining  the engine is shutting down and takes nothing new
├── EngineDead      the engine's thread ended; nothing will ever be answered
│   └── WorkerLost  a process that holds a part of the backbone has ended
├── BackboneError   the backbone's folder cannot be loaded
└── RequestTooLarge the request can never fit into the key-value cache
"""


class EngineError(Exception):
    """Base of everything the engine raises on purpose."""


class EngineFull(EngineError):
    """The waiting line is full; `retry_after` is a guess in seconds."""

    def __init__(self, message: str, retry_after: float) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class EngineDraining(EngineError):
    """The engine is shutting down and takes nothing new."""


class EngineDead(EngineError):
    """The engine's thread has ended."""


class WorkerLost(EngineDead):
    """A process that holds a part of the backbone has ended, or is out of step with the others."""


class BackboneError(EngineError):
    """The backbone's folder cannot be loaded."""


class RequestTooLarge(EngineError):
    """The request needs more tokens than the model's context or the whole cache can hold."""
