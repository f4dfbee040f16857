"""The demo inventory: skills drawn from a seed and a few routings over them.

The skills are random and have learned nothing. They are just strong enough that each task
answers in words of its own while most answers stay readable, so that routing can be seen at work.
"""

from pathlib import Path

from polyhead.server.demo.folders import is_made_from, replaced

NAME = "inventory"
HEADS = 8
SKILLS = 8
RANK = 4
SCALING = 3.0
STD = 0.05
SEED = 7
RECIPE: dict[str, str | int] = {"inventory": "random", "seed": SEED, "version": 1}
"""Raise `version` whenever the same seed would give other files."""

FAVOURITES = {"amber": 0, "birch": 1, "coral": 2, "dune": 5}
"""Tasks that lean on one skill in every head."""
PATCHWORK = "patchwork"
"""The task that leans on another skill in every head, which one head alone cannot express."""
LIKED, DISLIKED = 3.0, -4.0
"""Logits: the favourite takes 0.88 of the weight."""


def prepare_inventory(folder: Path, backbone: Path) -> Path:
    """Make `folder/inventory` for the demo backbone at `backbone`, unless it is there already.

    Returns its path; takes a few seconds the first time, none later.
    """
    target = folder / NAME
    if not is_made_from(target, RECIPE):
        with replaced(target, RECIPE) as fresh:
            _write(fresh, backbone)
    return target


def _write(folder: Path, backbone: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from polyhead.adapters.inject import find_modules
    from polyhead.adapters.inventory import BackboneRef, Inventory
    from polyhead.adapters.routing import Routing

    model = AutoModelForCausalLM.from_pretrained(backbone, local_files_only=True)
    inventory = Inventory.random(
        BackboneRef.of(model, backbone.name),
        find_modules(model, "all-linear", heads=HEADS),
        heads=HEADS,
        skills=SKILLS,
        rank=RANK,
        scaling=SCALING,
        std=STD,
        seed=SEED,
        dtype="bfloat16",
    )
    chosen = {name: [skill] * HEADS for name, skill in FAVOURITES.items()}
    chosen[PATCHWORK] = list(range(HEADS))
    for name, skills in chosen.items():
        logits = torch.full((HEADS, SKILLS), DISLIKED)
        logits[torch.arange(HEADS), skills] = LIKED
        inventory.tasks[name] = Routing.checked(logits, inventory.layout, granularity="model")
    inventory.save(folder)
