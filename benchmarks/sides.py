"""The systems under comparison, each as a callable that answers a list of requests."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PolyConfig, get_peft_model
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from benchmarks.workload import Work
from polyhead.adapters.inject import Injection, find_modules, inject
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.measuring import measure_costs
from polyhead.adapters.plan import RoutedTask
from polyhead.server.engine.backbone import load_backbone
from polyhead.server.engine.cpu_norms import compile_norms
from polyhead.server.engine.engine import Engine, Watch
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.packed_linears import pack_linears
from polyhead.server.engine.quantized import quantize_linears
from polyhead.server.engine.request import Event, Failure, Output, Request, SamplingParams
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.tokenizer import Tokenizer

HEADS = SKILLS = RANK = 8
CPU = torch.device("cpu")
Side = Callable[[Sequence[Work]], None]


class Driven:
    """An engine in this process that answers a list of requests; None leaves its backbone bare."""

    def __init__(self, injection: Injection | None) -> None:
        self._injection = injection
        self._tasks: list[RoutedTask] = []
        self._changed = threading.Condition()
        self._left = 0
        if injection is not None:
            groups = [slot.group for slot in injection.slots]
            injection.planner.costs = measure_costs(groups)

    def start(self, engine: Engine) -> None:
        """engine: publishes to `receive`."""
        self.engine = engine
        self.engine.start()

    def __call__(self, work: Sequence[Work]) -> None:
        bare = self._injection is None
        tasks = [None if bare else self.task(item.task) for item in work]
        with self._changed:
            self._left = len(work)
        for number, (item, task) in enumerate(zip(work, tasks, strict=True)):
            self.submit(self.request(f"r{number}", item, task))
        with self._changed:
            self._changed.wait_for(lambda: self._left == 0)

    def submit(self, request: Request) -> None:
        self.engine.submit(request)

    def request(self, name: str, item: Work, task: RoutedTask | None) -> Request:
        params = SamplingParams(max_tokens=item.new_tokens, ignore_eos=True)
        label = f"task-{item.task}"
        return Request(name, label, label, item.prompt, task, params)

    @property
    def inventory(self) -> Inventory:
        """Of a routed engine."""
        assert self._injection is not None
        return self._injection.inventory

    def task(self, number: int) -> RoutedTask:
        """The routed engine's task of that number."""
        assert self._injection is not None
        header = self._injection.inventory.header
        while len(self._tasks) <= number:
            key = len(self._tasks)
            generator = torch.Generator().manual_seed(key)
            shape = (self._injection.count, header.heads, header.skills)
            logits = torch.randn(shape, generator=generator)
            self._tasks.append(RoutedTask(str(key), torch.softmax(logits, -1)))
        return self._tasks[number]

    def receive(self, events: list[Event]) -> None:
        failed = [event for event in events if isinstance(event, Failure)]
        assert not failed, failed
        ended = sum(1 for e in events if isinstance(e, Output) and e.finish_reason)
        with self._changed:
            self._left -= ended
            self._changed.notify_all()


class EngineSide(Driven):
    """Polyhead's engine over a causal backbone. routed=False leaves it bare; quantize: to int8 or
    int4."""

    def __init__(
        self,
        folder: Path,
        dtype: torch.dtype,
        *,
        routed: bool,
        seats: int,
        step_tokens: int = 128,
        watch: Watch | None = None,
        quantize: str | None = None,
    ) -> None:
        model = load_backbone(folder, dtype, CPU)
        reference = BackboneRef.of(model, folder.name)
        if quantize is not None:
            quantize_linears(model, quantize)
        pack_linears(model)
        compile_norms(model)
        injection = None
        if routed:
            modules = find_modules(model, heads=HEADS)
            inventory = Inventory.random(
                reference, modules, heads=HEADS, skills=SKILLS, rank=RANK, std=0.01
            )
            injection = inject(model, inventory)
        super().__init__(injection)
        space = KVSpace(65536, 2048)
        self.start(
            Engine(
                Runner(model, injection, space.capacities),
                Scheduler(SchedulerConfig(seats, max(seats, step_tokens)), space),
                Tokenizer.load(folder),
                self.receive,
                watch=watch,
            )
        )


def generate_model(folder: Path, dtype: torch.dtype, poly_tasks: int = 0) -> Any:
    """The backbone for `GenerateSide`; poly_tasks > 0 wraps it in PEFT's Poly layers."""
    model: Any = load_backbone(folder, dtype, CPU)
    if not poly_tasks:
        return model
    config = PolyConfig(
        r=RANK,
        n_tasks=poly_tasks,
        n_skills=SKILLS,
        n_splits=HEADS,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config).to(dtype).eval()


class GenerateSide:
    """transformers' `generate` over padded batches, in order of arrival."""

    def __init__(self, model: Any, *, batch: int) -> None:
        self._model = model
        self._poly = hasattr(model, "peft_config")
        self._batch = batch

    @torch.inference_mode()
    def __call__(self, work: Sequence[Work]) -> None:
        for start in range(0, len(work), self._batch):
            self._answer(work[start : start + self._batch])

    def _answer(self, work: Sequence[Work]) -> None:
        ids, mask = _left_pad([item.prompt for item in work])
        extra = {"task_ids": torch.tensor([item.task for item in work])} if self._poly else {}
        longest = max(item.new_tokens for item in work)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=longest,
            min_new_tokens=longest,
            do_sample=False,
            pad_token_id=0,
            **extra,
        )


class ContinuousSide:
    """transformers' continuous batching, whose thread waits between two runs."""

    def __init__(self, model: Any, *, seats: int, step_tokens: int) -> None:
        blocks = 2 * seats  # of 256 tokens, which one request does not fill
        self._manager = model.init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
            continuous_batching_config=ContinuousBatchingConfig(
                num_blocks=blocks, max_batch_tokens=step_tokens, max_requests_per_batch=seats
            ),
        )
        self._manager.start()

    def __call__(self, work: Sequence[Work]) -> None:
        for item in work:
            self._manager.add_request(list(item.prompt), max_new_tokens=item.new_tokens)
        tokens = 0
        for _ in work:
            found = None
            while found is None:
                found = self._manager.get_result(timeout=1)
            assert found.error is None, found.error
            tokens += len(found.generated_tokens)
        assert tokens == sum(item.new_tokens for item in work)

    def stop(self) -> None:
        self._manager.stop(block=True)


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    mask = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
