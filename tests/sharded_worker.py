"""One of several processes that hold a backbone in parts: answers requests, writes what came out.

    sharded_worker.py FOLDER RANK SIZE [wrong]

Size 1 is the reference. `wrong` gives every process the heads of another.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from factories import (
    Collector,
    byte_tokenizer,
    random_private,
    random_task,
    tiny_inventory,
    tiny_model,
)

from polyhead.adapters.inject import inject
from polyhead.adapters.plan import Adapter
from polyhead.adapters.sharding import HeadParts, Ranks, ShardedLinear, shard
from polyhead.server.engine.answers import Answers
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.request import Output, Request, SamplingParams
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.tokenizer import Tokenizer


def main(folder: Path, rank: int, size: int, wrong: bool) -> None:
    torch.set_num_threads(1)
    model = tiny_model(attention_bias=True, mlp_bias=True)  # a bias is to be added once
    inventory = tiny_inventory(model)
    adapters: dict[str, Adapter] = {
        "routed": random_task(inventory, "routed", 1),
        "other": random_task(inventory, "other", 2),
        "private": random_private(inventory, 3),
        "base": None,
    }
    held = sum(p.numel() for p in model.parameters())
    if size > 1:
        rendezvous = f"file://{folder / 'rendezvous'}"
        dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=size)
        shard(model, Ranks.of_world())
    if wrong:
        mistake(size)
    runner = Runner(model, inject(model, inventory), KVSpace(4096, 512).capacities)
    found = answers_of(runner, requests(adapters))
    share = sum(p.numel() for p in model.parameters()) / held
    cache = sum(tensor.shape[1] for tensor in runner.store.keys[0]) / len(runner.store.keys[0])
    said = {"answers": found, "share": share, "heads": cache}
    (folder / f"found-{size}-{rank}.json").write_text(json.dumps(said))
    if size > 1:
        dist.destroy_process_group()


def mistake(size: int) -> None:
    right = HeadParts.of

    def of(layer: torch.nn.Module, heads: int) -> HeadParts:
        if isinstance(layer, ShardedLinear):
            ranks = layer.ranks
            layer.ranks = Ranks((ranks.rank + 1) % size, size)
            found = right(layer, heads)
            layer.ranks = ranks
            return found
        return right(layer, heads)

    HeadParts.of = of  # type: ignore[method-assign]


def requests(adapters: dict[str, Adapter]) -> list[Request]:
    """Prompts of several lengths, three for each adapter, some with log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for number, (name, adapter) in enumerate(list(adapters.items()) * 3):
        length = (1, 9, 40)[number % 3]
        prompt = tuple(torch.randint(0, 256, (length,), generator=generator).tolist())
        params = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=0)
        made.append(Request(f"{name}-{number}", name, "g", prompt, adapter, params))
    return made


def answers_of(runner: Runner, asked: list[Request]) -> dict[str, list[tuple[int, float]]]:
    """Tokens and log-probabilities of each request, all in one batch, step by step."""
    space, collected = KVSpace(4096, 512), Collector()
    scheduler = Scheduler(SchedulerConfig(16, 32), space)
    answers = Answers(Tokenizer(byte_tokenizer(), [256]))
    for request in asked:
        for sequence in answers.open(request):
            scheduler.add(sequence)
    while (batch := scheduler.schedule()) is not None:
        sampled = runner.run(batch)
        scheduler.advance(batch)
        collected.publish(answers.take(batch, sampled))
        for sequence in answers.finished():
            scheduler.finish(sequence)
    found: dict[str, list[tuple[int, float]]] = {request.id: [] for request in asked}
    for event in collected.order:
        assert isinstance(event, Output), event
        found[event.request_id] += [(p.token_id, p.logprob) for p in event.logprobs]
    return found


if __name__ == "__main__":
    place, number, count, *more = sys.argv[1:]
    main(Path(place), int(number), int(count), bool(more))
