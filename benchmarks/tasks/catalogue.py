"""Every task of the suite, training tasks and held-out ones."""

from benchmarks.tasks import emojis, formats, lexical, morphology, sounds, spelling, world
from benchmarks.tasks.spec import TaskSpec

TASKS: tuple[TaskSpec, ...] = (
    *morphology.TASKS,
    *spelling.TASKS,
    *lexical.TASKS,
    *sounds.TASKS,
    *world.TASKS,
    *emojis.TASKS,
    *formats.TASKS,
)
