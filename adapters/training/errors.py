"""What can be wrong with training.

TrainingError         base; an `AdapterError`, so it carries field, found and expected
├── DataError         examples that cannot be read or encoded; names file, line and field
├── ConfigError       a configuration file: unknown keys, values out of range
└── CheckpointError   a checkpoint of another run, or one that cannot be read
"""

from polyhead.adapters.errors import AdapterError


class TrainingError(AdapterError):
    """Base of everything that training raises on purpose."""


class DataError(TrainingError):
    """Examples that cannot be read, or that do not fit the backbone."""


class ConfigError(TrainingError):
    """A training configuration with unknown keys or impossible values."""


class CheckpointError(TrainingError):
    """A checkpoint that belongs to another run or cannot be read."""
