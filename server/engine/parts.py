"""What every process of a server loads: the backbone, or its part of it, and the skills."""

import os
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.sharding import Ranks, check_heads, shard
from polyhead.server.config import Settings
from polyhead.server.engine.backbone import load_backbone, pick_device, pick_dtype
from polyhead.server.engine.cpu_norms import compile_norms
from polyhead.server.engine.errors import BackboneError
from polyhead.server.engine.packed_linears import pack_linears
from polyhead.server.engine.quantized import quantize_linears

SUM_SECONDS = 600.0
"""How long one process waits in a sum for another. One that has ended is noticed at once; this is
for one that hangs, and must be longer than loading takes."""


@dataclass(frozen=True)
class PartOptions:
    """What is loaded, as words that can be sent to another process."""

    folder: str  # of the backbone
    name: str
    inventory: str  # a folder
    dtype: str
    device: str
    threads: int | None  # of each process
    pack: bool
    quantize: str | None

    @classmethod
    def of(cls, settings: Settings, folder: Path) -> "PartOptions":
        """Several processes share the cores, unless threads are given."""
        threads = settings.threads
        if threads is None and settings.tensor_parallel > 1:
            threads = max(1, torch.get_num_threads() // settings.tensor_parallel)
        return cls(
            folder=str(folder),
            name=Path(settings.backbone).name,
            inventory=str(settings.inventory),
            dtype=settings.dtype,
            device=settings.device,
            threads=threads,
            pack=settings.pack_weights,
            quantize=settings.quantize,
        )


@dataclass(frozen=True)
class Part:
    """A backbone or this process's part of it, without adapters so far."""

    model: PreTrainedModel
    backbone: BackboneRef  # the whole one
    inventory: Inventory
    device: torch.device


def load_part(options: PartOptions, ranks: Ranks | None) -> Part:
    """ranks: None loads everything.

    Raises `BackboneError`, `InventoryError` or `InjectionError`.
    """
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    device = pick_device(options.device)
    if ranks is not None:
        device = _own_device(device, ranks)
    dtype = pick_dtype(options.dtype, device)
    # A device that has to share a backbone could not hold it.
    first = device if ranks is None else torch.device("cpu")
    model = load_backbone(Path(options.folder), dtype, first)
    if ranks is not None and model.config.is_encoder_decoder:
        raise BackboneError(
            f"--tensor-parallel {ranks.size}: {options.name} is an encoder-decoder, "
            "which is not cut; expected a causal model"
        )
    backbone = BackboneRef.of(model, options.name)
    inventory = Inventory.load(Path(options.inventory))
    inventory.check_backbone(backbone)
    if ranks is not None:
        check_heads(inventory.header.heads, ranks)
        shard(model, ranks)
        model.to(device)  # type: ignore[arg-type]
    if options.quantize is not None:
        quantize_linears(model, options.quantize)
    if options.pack:
        pack_linears(model)
    compile_norms(model)
    return Part(model, backbone, inventory, device)


def join(ranks: Ranks, rendezvous: str, device: torch.device) -> None:
    """Become one of the processes that add up the layers' parts; waits for all of them."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # they are on one machine
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=rendezvous,
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=timedelta(seconds=SUM_SECONDS),
    )


def _own_device(device: torch.device, ranks: Ranks) -> torch.device:
    if device.type == "cpu":
        return device
    there = torch.cuda.device_count()
    if device.type != "cuda" or device.index is not None or there < ranks.size:
        raise BackboneError(
            f"--tensor-parallel {ranks.size} with --device {device}: {there} GPUs are there; "
            "expected cpu, or cuda without a number and a GPU for each process"
        )
    torch.cuda.set_device(ranks.rank)
    return torch.device("cuda", ranks.rank)
