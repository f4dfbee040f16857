"""Checks on a CUDA device what the tests check in Triton's interpreter: both forms' kernels over
shapes and dtypes, and that the engine there answers as `generate` does on a CPU.

    PYTHONPATH=tests python -m gpu_check
"""

import random
import sys

import torch
from factories import (
    Collector,
    alone,
    byte_tokenizer,
    make_engine,
    merged,
    random_private,
    random_task,
    restless_t5,
    tiny_inventory,
    tiny_model,
)
from transformers import PreTrainedModel

from polyhead.adapters import ops
from polyhead.adapters.compiled import FactorTable
from polyhead.adapters.inject import inject
from polyhead.adapters.private import PrivateAdapter
from polyhead.adapters.triton_step import TritonCombined, TritonFactored
from polyhead.server.engine.request import Request, SamplingParams
from polyhead.server.engine.tokenizer import Tokenizer

CUDA = torch.device("cuda")
BOUNDS = {torch.float32: 64 * 2**-24, torch.bfloat16: 12 * 2**-8, torch.float16: 6 * 2**-11}
SHAPES = [  # heads, skills, rank, features of a head
    (4, 8, 16, 24), (64, 8, 1, 3), (2, 3, 5, 70), (1, 8, 64, 130), (1, 1, 32, 16), (8, 8, 16, 512),
]  # fmt: skip
TASKS = 6


def kernels(shape: tuple[int, int, int, int], tokens: int, dtype: torch.dtype) -> tuple[float, ...]:
    """Relative errors of factored and combined, and the least of them for wrong tasks."""
    heads, skills, rank, wide = shape
    draw = torch.Generator(CUDA).manual_seed(tokens)

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw, device=CUDA).to(dtype)

    a = [normal(heads, skills, wide, rank) for _ in range(2)]
    b = [normal(heads, skills, rank, wide + g) for g in range(2)]
    x = normal(tokens, heads * wide)
    weights = torch.softmax(4 * normal(TASKS, 2, heads, skills).float(), -1)
    group = ops.SkillGroup.pack(a, b, 0.7, dtype)
    owners = [random.Random(tokens + i).randrange(TASKS) for i in range(tokens)]
    factored = TritonFactored(
        torch.arange(tokens, device=CUDA), torch.tensor(owners, device=CUDA), weights
    )
    own = [ops.fold_factors(group, weights[task]) for task in range(TASKS)]
    present = sorted(set(owners))
    tables = [FactorTable.of([own[task]], [2]) for task in present]
    places = [[p for p, owner in enumerate(owners) if owner == task] for task in present]
    combined = TritonCombined(tables, places, CUDA)
    errors: list[list[float]] = [[], [], []]
    mixed, hidden = factored.shrink(group, 0, x), combined.shrink(0, x)
    outs = [t.shape[0] * t.shape[3] for t in b]
    ys = [torch.zeros(tokens, out, dtype=dtype, device=CUDA) for out in outs]
    factored.expand_all(group, 0, mixed, ys)
    for g, y in enumerate(ys):
        z = torch.zeros_like(y)
        combined.expand(g, hidden, z)
        right = ops.reference(x, a[g], b[g], weights[owners, g], 0.7)
        others = [(owner + 1) % TASKS for owner in owners]
        wrong = ops.reference(x, a[g], b[g], weights[others, g], 0.7)
        for kind, (found, wanted) in enumerate([(y, right), (z, right), (y, wrong)]):
            errors[kind].append(float((found.float() - wanted).norm() / wanted.norm()))
    return max(errors[0]), max(errors[1]), min(errors[2])


def engine(model: PreTrainedModel) -> tuple[int, int, int]:
    """Requests of tasks, private adapters and the backbone in one batch: how many there were, how
    many were answered as by `generate`, and how many as `generate` does for the task beside."""
    inventory = tiny_inventory(model)
    place = Tokenizer(byte_tokenizer(), (), 0 if model.config.is_encoder_decoder else None).placed
    adapters = [random_task(inventory, f"t{i}", i) for i in range(6)]
    every = [*adapters, random_private(inventory, 1), None]
    expected = [merged(model, inventory, adapter) for adapter in every]
    model.to(CUDA)
    injection = inject(model, inventory)
    prepared = [injection.planner.prepare(a) if isinstance(a, PrivateAdapter) else a for a in every]
    collector = Collector()
    served = make_engine(model, injection, collector)
    served.start()
    asked = [
        Request(
            f"r{i}", f"r{i}", "g", adapter=adapter,
            params=SamplingParams(max_tokens=24, ignore_eos=True),
            **place(tuple((3 + i + 7 * k) % 256 for k in range(5 + 4 * i))),
        )
        for i, adapter in enumerate(prepared)
    ]  # fmt: skip
    for request in asked:
        served.submit(request)
    answers = [collector.tokens(request) for request in asked]
    served.stop()
    right = sum(alone(m, r) == t for m, r, t in zip(expected, asked, answers, strict=True))
    beside = [*expected[1:], expected[0]]
    wrong = sum(alone(m, r) == t for m, r, t in zip(beside, asked, answers, strict=True))
    return len(asked), right, wrong


def engines() -> int:
    """How many of the kinds of backbones are not answered as by `generate`."""
    failed = 0
    for model in (tiny_model("llama"), restless_t5()):
        asked, right, wrong = engine(model)
        kind = model.config.model_type
        print(f"{kind} on {CUDA}: {right} of {asked} as generate, {wrong} wrong")
        failed += right != asked or wrong > 0
    return failed


@torch.inference_mode()
def main() -> int:
    failed = engines()
    for dtype, bound in BOUNDS.items():
        for shape in SHAPES:
            found = [kernels(shape, tokens, dtype) for tokens in (5, 200)]
            worst = max(max(one[:2]) for one in found)
            least = min(one[2] for one in found)
            bad = not worst < bound or not (least > 0.1 or shape[1] == 1)
            failed += bad
            print(
                f"{dtype} {shape}: {worst:.1e} of {bound:.1e}, wrong task {least:.2f}", flush=True
            )
    failed += engines()
    print("FAILED" if failed else "all checks hold", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
