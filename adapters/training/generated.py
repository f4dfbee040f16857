"""Training a generator: routings made of contexts, over the frozen skills of an inventory.

Each step makes a context of every task that it draws, of examples that it does not ask, and
learns from the answers to those that it asks. Embeddings of single examples never change, so they
are computed once, and a context's is the mean of some of them, as it is when one is served.
"""

import random
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from polyhead.adapters.generator import Generator, GeneratorFacts, generated, piece
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.training.answers import Encoded
from polyhead.adapters.training.config import TrainingConfig
from polyhead.adapters.training.corpus import Corpus
from polyhead.adapters.training.embedding import embed
from polyhead.adapters.training.errors import ConfigError
from polyhead.adapters.training.factors import Factors
from polyhead.adapters.training.methods import Plan
from polyhead.adapters.training.skills import SharedSkills

SMALLEST_SCALE = 1e-6
RIDGE = 0.1
"""Times the mean diagonal of the tasks' products: what keeps the start from their noise."""


class GeneratedSource(nn.Module):
    """Shared skills, weighed for each task by what the generator makes of its context."""

    def __init__(
        self, skills: SharedSkills, bias: Tensor, left: Tensor, right: Tensor, tasks: int
    ) -> None:
        """bias `[M, H, S]`, left `[M, H, S, R]` and right `[R, D]` are trained, the skills not."""
        super().__init__()
        self.skills = skills.requires_grad_(False)
        self.bias = nn.Parameter(bias)
        self.left = nn.Parameter(left)
        self.right = nn.Parameter(right)
        self.contexts: Tensor  # [T, D], standardised
        self.register_buffer("contexts", torch.zeros(tasks, right.shape[1]), persistent=False)

    def factors(self, tasks: Tensor) -> Factors:
        with torch.autocast(self.left.device.type, enabled=False):
            weights = generated(self.bias, self.left, self.right, self.contexts[tasks])
        return self.skills.folded(weights)


class GeneratorPlan(Plan):
    """What `method = "generator"` trains. Everything about skills comes from `start`."""

    def __init__(
        self,
        config: TrainingConfig,
        model: PreTrainedModel,
        backbone: str,
        corpus: Corpus,
        tokenizer: Any,
    ) -> None:
        """Raises what `Plan` raises, and `ConfigError` for an encoder-decoder and for tasks of
        fewer examples than a context and a question need."""
        _check(model, corpus)
        super().__init__(config, model, backbone, corpus.tasks)
        pool = Pool(corpus, config.generator.pool, config.seed)
        embedded = embed(model, tokenizer, pool.texts)
        self._mean = embedded.mean(0)
        self._scale = embedded.std(0).clamp_min(SMALLEST_SCALE)
        self._embedded = (embedded - self._mean) / self._scale
        self._pool = pool
        self.routed = self.source  # the tasks' own routings, as far as the inventory has them
        start = self._beginning()
        self.source: Any = GeneratedSource(self.routed.skills, *start, len(corpus.tasks))

    def optimiser(self) -> torch.optim.AdamW:
        """One group: the map's bias and both its factors."""
        options = self.config.optimiser
        trained = [self.source.bias, self.source.left, self.source.right]
        group = {"params": trained, "lr": options.rate, "weight_decay": options.weight_decay}
        return torch.optim.AdamW([group], betas=(0.9, 0.98), fused=True)

    def begin(self, step: int, drawn: Sequence[tuple[int, Encoded]]) -> None:
        """Make the step's contexts, of examples that are not among the `drawn`."""
        asked: dict[int, set[Encoded]] = {}
        for task, example in drawn:
            asked.setdefault(task, set()).add(example)
        chance = random.Random(f"{self.config.seed}/contexts/{step}")
        for task in sorted(asked):
            size = chance.randint(1, self.config.generator.context)
            rows = self._pool.draw(task, size, asked[task], chance)
            self.source.contexts[task] = self._embedded[rows].mean(0)

    def inventory(self, provenance: Mapping[str, Any]) -> Inventory:
        """The one that the run started from, as it was, with the generator."""
        inventory = self.started
        facts = GeneratorFacts(
            backbone=self.backbone.fingerprint,
            inventory=inventory.fingerprint,
            template=self.config.data.template,
            provenance=dict(provenance),
        )
        own = self.source
        bias, left, right = (p.detach().cpu() for p in (own.bias, own.left, own.right))
        inventory.generator = Generator(bias, left, right, self._mean, self._scale, facts)
        return inventory

    @property
    def started(self) -> Inventory:
        """The inventory to start from."""
        assert self.config.start is not None  # the configuration has been checked
        return Inventory.load(self.config.start)

    def _beginning(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bias, left and right of the map that is next to the known routings at the tasks' mean
        embeddings, by ridge regression; routings of unknown tasks are about uniform."""
        rank = self.config.generator.rank
        means = torch.stack([self._embedded[rows].mean(0) for rows in self._pool.rows])  # [T, D]
        with torch.no_grad():
            weights = self.routed.routings.weights(torch.arange(len(means)))  # [T, M, H, S]
        bias = weights.mean(0)
        off = (weights - bias).flatten(1)  # [T, MHS]
        products = means @ means.T
        ridge = RIDGE * products.diagonal().mean() * torch.eye(len(means))
        left = torch.linalg.solve(products + ridge, off).T  # [MHS, T]: left · means is the map
        basis, mixed = torch.linalg.qr(means.T)  # [D, k], [k, T]
        u, s, vh = torch.linalg.svd(left @ mixed.T, full_matrices=False)
        kept = min(rank, len(s))
        chance = torch.Generator().manual_seed(self.config.seed + 2)
        right = torch.randn(rank, means.shape[1], generator=chance) / means.shape[1]
        right[:kept] = s[:kept, None].sqrt() * vh[:kept] @ basis.T
        start = torch.zeros(left.shape[0], rank)
        start[:, :kept] = u[:, :kept] * s[:kept].sqrt()
        return bias, start.view(*weights.shape[1:], rank), right


class Pool:
    """The examples that contexts are made of, at most so many of each task."""

    def __init__(self, corpus: Corpus, most: int, seed: int) -> None:
        self.rows: list[list[int]] = []  # of each task, into all texts
        self.texts: list[str] = []
        self._encoded: list[Encoded] = []
        for task, examples, encoded in zip(
            corpus.tasks, corpus.examples, corpus.encoded, strict=True
        ):
            chance = random.Random(f"{seed}/pool/{task}")
            chosen = chance.sample(range(len(encoded)), min(most, len(encoded)))
            self.rows.append(list(range(len(self.texts), len(self.texts) + len(chosen))))
            self.texts += [piece(examples[i].input, examples[i].output) for i in chosen]
            self._encoded += [encoded[i] for i in chosen]

    def encoded_of(self, task: int) -> list[Encoded]:
        """The tokens of a task's texts, in the order of its rows."""
        return [self._encoded[row] for row in self.rows[task]]

    def draw(self, task: int, size: int, asked: set[Encoded], chance: random.Random) -> list[int]:
        """Up to `size` rows of a task's texts that are not asked; of all where nothing is left."""
        rows = [row for row in self.rows[task] if self._encoded[row] not in asked]
        rows = rows or self.rows[task]
        return chance.sample(rows, min(size, len(rows)))


def _check(model: PreTrainedModel, corpus: Corpus) -> None:
    if model.config.is_encoder_decoder:
        raise ConfigError(
            "a generator reads hidden states of a causal backbone",
            field="backbone",
            found=f"an encoder-decoder ({model.config.model_type})",
        )
    for task, examples in zip(corpus.tasks, corpus.examples, strict=True):
        if any(one.messages is not None for one in examples):
            raise ConfigError(
                "a generator's contexts are made of inputs and outputs",
                field="data.train",
                found=f"messages in task {task!r}",
            )
        if len(examples) < 2:
            raise ConfigError(
                "a generator needs a context beside what it asks",
                field="data.train",
                found=f"{len(examples)} example of {task!r}",
                expected="at least 2 of each task",
            )
