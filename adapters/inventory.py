"""The inventory: the skills that all tasks share, for every adapted module of one backbone."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor, nn

from polyhead.adapters.errors import BackboneMismatch, InventoryError, RoutingError
from polyhead.adapters.generator import GENERATOR_FILE, Generator
from polyhead.adapters.routing import Layout, Routing
from polyhead.adapters.tensor_files import read_tensors, tensor_bytes, write_tensors

HEADER_FILE = "inventory.json"
TENSOR_FILE = "inventory.safetensors"
TASK_FOLDER = "tasks"
TEMPLATE_FILE = "templates.json"
INPUT = "{input}"
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
RESERVED_TASK = "base"
"""The task id of the bare backbone, which no routing may take."""
DtypeName = Literal["float32", "bfloat16", "float16"]
DTYPES: dict[DtypeName, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


class ModuleShape(BaseModel):
    """One adapted linear layer of the backbone: its name, input width I and output width O."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    in_features: int = Field(gt=0)
    out_features: int = Field(gt=0)


class BackboneRef(BaseModel):
    """Which backbone an inventory belongs to."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    fingerprint: str

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "BackboneRef":
        return cls(name=name, fingerprint=backbone_fingerprint(model))


class InventoryHeader(BaseModel):
    """`inventory.json`."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    backbone: BackboneRef
    modules: tuple[ModuleShape, ...] = Field(min_length=1)
    heads: int = Field(gt=0)
    skills: int = Field(gt=0)
    rank: int = Field(gt=0)
    scaling: float = Field(allow_inf_nan=False)
    dtype: DtypeName = "float32"
    provenance: dict[str, Any] = Field(default_factory=dict)

    @field_validator("modules")
    @classmethod
    def _distinct(cls, modules: tuple[ModuleShape, ...]) -> tuple[ModuleShape, ...]:
        names = [module.name for module in modules]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"modules named twice: {twice[:3]}")
        return modules

    def shape_a(self, module: ModuleShape) -> tuple[int, ...]:
        """`[H, S, I/H, r]`."""
        return (self.heads, self.skills, module.in_features // self.heads, self.rank)

    def shape_b(self, module: ModuleShape) -> tuple[int, ...]:
        """`[H, S, r, O/H]`."""
        return (self.heads, self.skills, self.rank, module.out_features // self.heads)


class Inventory:
    """Skills of every module: `a[name]` is `[H, S, I/H, r]`, `b[name]` is `[H, S, r, O/H]`.

    `tasks` holds the routings that were trained together with the skills, by task name;
    `templates` what those tasks wrap around an input, where they were trained with one;
    `generator`, where there is one, makes routings of contexts. None of them is in the fingerprint.
    Raises `InventoryError` when header and tensors disagree or a number is not finite.
    """

    def __init__(
        self,
        header: InventoryHeader,
        a: Mapping[str, Tensor],
        b: Mapping[str, Tensor],
        tasks: Mapping[str, Routing] | None = None,
        templates: Mapping[str, str] | None = None,
    ) -> None:
        self.header = header
        dtype = DTYPES[header.dtype]
        names = {module.name for module in header.modules}
        odd = sorted((a.keys() | b.keys()) - names)
        if odd:
            raise InventoryError("tensors of modules that the header lacks", found=str(odd[:3]))
        self.a = {
            m.name: _checked(a, m, "A", header.shape_a(m), header, dtype) for m in header.modules
        }
        self.b = {
            m.name: _checked(b, m, "B", header.shape_b(m), header, dtype) for m in header.modules
        }
        self.tasks = dict(tasks or {})
        self.templates = dict(templates or {})
        self.generator: Generator | None = None

    @cached_property
    def layout(self) -> Layout:
        names = tuple(module.name for module in self.header.modules)
        return Layout(names, self.header.heads, self.header.skills)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the canonical header and the tensor bytes, in module order."""
        # Through JSON and back, so that a header hashes as it will once it is saved and loaded.
        plain = json.loads(self.header.model_dump_json())
        canonical = json.dumps(plain, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode())
        for module in self.header.modules:
            digest.update(tensor_bytes(self.a[module.name]))
            digest.update(tensor_bytes(self.b[module.name]))
        return digest.hexdigest()

    @classmethod
    def random(
        cls,
        backbone: BackboneRef,
        modules: Sequence[ModuleShape],
        *,
        heads: int,
        skills: int,
        rank: int,
        scaling: float = 1.0,
        seed: int = 0,
        std: float = 0.02,
        dtype: DtypeName = "float32",
    ) -> "Inventory":
        """Skills drawn from a normal distribution, B too, so that tasks differ from the start."""
        header = InventoryHeader(
            backbone=backbone,
            modules=tuple(modules),
            heads=heads,
            skills=skills,
            rank=rank,
            scaling=scaling,
            dtype=dtype,
            provenance={"method": "random", "seed": seed, "std": std},
        )
        generator = torch.Generator().manual_seed(seed)

        def draw(shape: tuple[int, ...]) -> Tensor:
            return (torch.randn(shape, generator=generator) * std).to(DTYPES[dtype])

        a = {m.name: draw(header.shape_a(m)) for m in header.modules}
        b = {m.name: draw(header.shape_b(m)) for m in header.modules}
        return cls(header, a, b)

    @classmethod
    def load(cls, folder: Path | str) -> "Inventory":
        """Read a folder. Raises `InventoryError` that names the file and what is wrong in it."""
        folder = Path(folder)
        header = _read_header(folder / HEADER_FILE)
        try:
            tensors = read_tensors(folder / TENSOR_FILE)
        except ValueError as exc:
            raise InventoryError(str(exc)) from exc
        odd = sorted(name for name in tensors if not name.endswith((".A", ".B")))
        if odd:
            raise InventoryError("unknown tensors", field=TENSOR_FILE, found=str(odd[:3]))
        a = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".A")}
        b = {name[:-2]: tensor for name, tensor in tensors.items() if name.endswith(".B")}
        inventory = cls(header, a, b)
        for path in sorted((folder / TASK_FOLDER).glob("*.safetensors")):
            _check_task_name(path.stem)
            try:
                inventory.tasks[path.stem] = Routing.from_safetensors(
                    path.read_bytes(), inventory.layout
                )
            except RoutingError as exc:
                raise InventoryError(f"{path}: {exc}") from exc
        inventory.templates = _read_templates(folder / TASK_FOLDER / TEMPLATE_FILE, inventory.tasks)
        if (folder / GENERATOR_FILE).exists():
            inventory.generator = inventory.read_generator((folder / GENERATOR_FILE).read_bytes())
        return inventory

    def read_generator(self, data: bytes) -> Generator:
        """Raises `InventoryError` where it is unsound or was made for other skills."""
        backbone = self.header.backbone.fingerprint
        return Generator.from_safetensors(data, self.layout, self.fingerprint, backbone)

    def check_generator(self, width: int) -> None:
        """Raises `InventoryError` where a generator does not read hidden states `[width]`."""
        if self.generator is not None and self.generator.width != width:
            raise InventoryError(
                "the generator reads other hidden states than the backbone's",
                field=f"{GENERATOR_FILE}: right",
                found=f"width {self.generator.width}",
                expected=f"width {width}",
            )

    def save(self, folder: Path | str) -> None:
        """Write the folder that `load` reads; what an older inventory left there goes.

        Raises `InventoryError` when a task's name cannot be a file's.
        """
        folder = Path(folder)
        for name in self.tasks:
            _check_task_name(name)
        (folder / TASK_FOLDER).mkdir(parents=True, exist_ok=True)
        for path in (folder / TASK_FOLDER).glob("*.safetensors"):
            if path.stem not in self.tasks:
                path.unlink()
        tensors = {f"{name}.A": tensor for name, tensor in self.a.items()}
        tensors |= {f"{name}.B": tensor for name, tensor in self.b.items()}
        write_tensors(folder / TENSOR_FILE, tensors, {"format": "1"})
        (folder / HEADER_FILE).write_text(self.header.model_dump_json(indent=2) + "\n")
        for name, routing in self.tasks.items():
            (folder / TASK_FOLDER / f"{name}.safetensors").write_bytes(routing.to_safetensors())
        templates = folder / TASK_FOLDER / TEMPLATE_FILE
        templates.unlink(missing_ok=True)
        if self.templates:
            templates.write_text(json.dumps(self.templates, indent=2, sort_keys=True) + "\n")
        (folder / GENERATOR_FILE).unlink(missing_ok=True)
        if self.generator is not None:
            (folder / GENERATOR_FILE).write_bytes(self.generator.to_safetensors())

    def check_backbone(self, backbone: BackboneRef) -> None:
        """Raises `BackboneMismatch` that names both when this inventory is for another backbone."""
        if self.header.backbone.fingerprint != backbone.fingerprint:
            raise BackboneMismatch(
                "the inventory was made for another backbone",
                field="backbone",
                found=f"{backbone.name} ({backbone.fingerprint[:12]})",
                expected=f"{self.header.backbone.name} ({self.header.backbone.fingerprint[:12]})",
            )


def backbone_fingerprint(model: nn.Module, samples: int = 64) -> str:
    """SHA-256 of every parameter's name and shape and of `samples` evenly spaced values of each.

    The values are rounded to bfloat16 first, so loading the same checkpoint as float32 or as
    bfloat16 gives the same fingerprint; sampling keeps it under 0.1 s for any size.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}:{list(parameter.shape)}".encode())
        flat = parameter.detach().reshape(-1)
        index = torch.linspace(0, flat.numel() - 1, samples, dtype=torch.float64).long()
        digest.update(tensor_bytes(flat[index.to(flat.device)].to(torch.bfloat16)))
    return digest.hexdigest()


def _check_task_name(name: str) -> None:
    if not TASK_NAME.fullmatch(name) or name == RESERVED_TASK:
        raise InventoryError(
            "unusable task name",
            field=f"tasks.{name}",
            found=repr(name),
            expected=f"a match of {TASK_NAME.pattern}, not {RESERVED_TASK!r}",
        )


def _read_header(path: Path) -> InventoryHeader:
    try:
        return InventoryHeader.model_validate_json(path.read_bytes())
    except OSError as exc:
        raise InventoryError(f"{path}: {exc.strerror}") from exc
    except ValidationError as exc:
        error = exc.errors()[0]
        where = ".".join(str(part) for part in error["loc"])
        raise InventoryError(f"{path}: {error['msg']}", field=where) from exc


def _read_templates(path: Path, tasks: Mapping[str, Routing]) -> dict[str, str]:
    """By task; a missing file is no templates."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except ValueError as exc:
        raise InventoryError(f"{path}: {exc}") from exc
    wrong = "not an object" if not isinstance(found, dict) else None
    for name, template in {} if wrong else found.items():
        if name not in tasks:
            wrong = f"{name!r} is no task of the inventory"
        elif not isinstance(template, str) or template.count(INPUT) != 1:
            wrong = f"the template of {name!r} does not hold {INPUT} once"
    if wrong:
        raise InventoryError(str(path), found=wrong, expected="a template for each of some tasks")
    return dict(found)


def _checked(
    tensors: Mapping[str, Tensor],
    module: ModuleShape,
    letter: str,
    shape: tuple[int, ...],
    header: InventoryHeader,
    dtype: torch.dtype,
) -> Tensor:
    field = f"{module.name}.{letter}"
    for width in (module.in_features, module.out_features):
        if width % header.heads:
            raise InventoryError(
                "features cannot be split into heads",
                field=module.name,
                found=f"{width} features",
                expected=f"a multiple of {header.heads}",
            )
    tensor = tensors.get(module.name)
    if tensor is None:
        raise InventoryError("the tensor is missing", field=field)
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise InventoryError(
            "wrong shape or dtype",
            field=field,
            found=f"{tensor.dtype} {list(tensor.shape)}",
            expected=f"{dtype} {list(shape)}",
        )
    if not torch.isfinite(tensor).all():
        raise InventoryError("not every number is finite", field=field)
    return tensor
