"""PEFT's own Poly layers and models are the oracle: the conversion must compute what they do."""

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, PolyConfig, get_peft_model
from peft.tuners.poly.layer import Linear as PolyLinear
from safetensors.torch import load, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.pytorch_utils import Conv1D

from polyhead.adapters.convert.peft import convert_peft
from polyhead.adapters.errors import AdapterError, ConversionError
from polyhead.adapters.inject import inject
from polyhead.adapters.inventory import Inventory
from polyhead.adapters.plan import RoutedTask, use_plan

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # peft reads it
)

TASKS, SKILLS, HEADS, RANK, VOCABULARY = 3, 4, 4, 3, 97
EXACT = 1e-5
DIFFERENT = 1e-2
PREFIX = "base_model.model."

LLAMA_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
NO_STOP = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[Callable[[], PretrainedConfig], list[str] | str]] = {
    "llama": (lambda: LlamaConfig(**LLAMA_SHAPE, **NO_STOP), [*ATTENTION, *FEED_FORWARD]),
    "qwen2": (lambda: Qwen2Config(**LLAMA_SHAPE, **NO_STOP), [*ATTENTION, "down_proj"]),
    "qwen3": (
        lambda: Qwen3Config(**LLAMA_SHAPE, **NO_STOP, head_dim=24),
        r"model\.layers\.\d+\.(self_attn\.(q|v|o)_proj|mlp\.up_proj)",
    ),
    "gpt2": (
        lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=2, n_head=4, **NO_STOP),
        ["c_attn", "c_proj", "c_fc"],
    ),
}


@dataclass(frozen=True)
class Trained:
    """A checkpoint, the model that wrote it, and the backbone as anyone else would load it."""

    bare: PreTrainedModel
    peft: PeftModel
    folder: Path
    inventory: Inventory

    def layers(self) -> Iterator[tuple[str, PolyLinear]]:
        for name, module in self.peft.named_modules():
            if isinstance(module, PolyLinear):
                yield name.removeprefix(PREFIX), module


def tiny_backbone(family: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        FAMILIES[family][0](), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # they are initialised to zero, which would hide them
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def linearised(model: PreTrainedModel) -> PreTrainedModel:
    """The same function with Linear for Conv1D, which PEFT's Poly refuses to adapt."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(module.nx, module.nf)
            linear.weight = nn.Parameter(module.weight.detach().T.contiguous())
            linear.bias = module.bias
            model.set_submodule(name, linear)
    return model


def adapted(model: PreTrainedModel, targets: list[str] | str, **options: Any) -> PeftModel:
    """`model` under PEFT's Poly, with strong random skills and logits."""
    sizes = {"n_tasks": TASKS, "n_skills": SKILLS, "n_splits": HEADS, "r": RANK} | options
    wrapped = get_peft_model(
        model, PolyConfig(task_type="CAUSAL_LM", target_modules=targets, **sizes)
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in wrapped.named_parameters():
        if "poly_" in name:
            std = 3.0 if "module_logits" in name else 0.3
            parameter.data = torch.randn(parameter.shape, generator=generator) * std
    # In train() PEFT draws the routing at random.
    return wrapped.eval()


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(request.param)
    bare = tiny_backbone(request.param)
    wrapped = adapted(linearised(copy.deepcopy(bare)), FAMILIES[request.param][1])
    wrapped.save_pretrained(folder)
    return Trained(bare, wrapped, folder, convert_peft(folder, bare, request.param))


def delta_by_definition(inventory: Inventory, module: str, task: str, x: Tensor) -> Tensor:
    """`scaling * (x A_t) B_t` as the method's paper writes it; x `[..., I]`."""
    index = inventory.layout.modules.index(module)
    w = inventory.tasks[task].weights(inventory.layout)[index]
    a = torch.cat(
        [torch.einsum("s,sdr->dr", w[h], inventory.a[module][h]) for h in range(HEADS)], 0
    )
    b = torch.cat(
        [torch.einsum("s,srd->rd", w[h], inventory.b[module][h]) for h in range(HEADS)], 1
    )
    return inventory.header.scaling * (x @ a @ b)


@torch.no_grad()
def test_every_layer_computes_what_pefts_own_layer_computes(trained: Trained) -> None:
    generator = torch.Generator().manual_seed(2)
    compared = []
    for name, layer in trained.layers():
        bare = copy.deepcopy(layer)
        for parameter in bare.get_base_layer().parameters():
            parameter.zero_()  # the delta alone, not a small difference of large numbers
        x = torch.randn(TASKS, 5, layer.in_features, generator=generator)
        wanted = bare(x, task_ids=torch.arange(TASKS))
        for task in range(TASKS):
            found, control = (
                delta_by_definition(trained.inventory, name, f"task-{chosen}", x[task])
                for chosen in (task, (task + 1) % TASKS)
            )
            assert (found - wanted[task]).abs().max() < EXACT
            assert (control - wanted[task]).abs().max() > DIFFERENT
        compared.append(name)
    assert compared == list(trained.inventory.layout.modules)


def plan_of(inventory: Inventory, tasks: list[int]) -> list[RoutedTask]:
    names = [f"task-{task}" for task in tasks]
    return [RoutedTask(n, inventory.tasks[n].weights(inventory.layout)) for n in names]


def prompts(rows: int, length: int = 6) -> Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
@pytest.mark.parametrize("tasks", [[0, 1, 2], [2, 0, 0, 1, 2, 1, 0], [1]])
def test_logits_of_a_mixed_batch_equal_pefts(trained: Trained, tasks: list[int]) -> None:
    ids = prompts(len(tasks))
    counts = [ids.shape[1]] * len(tasks)
    wanted = trained.peft(input_ids=ids, task_ids=torch.tensor(tasks)).logits
    wrong = [(task + 1) % TASKS for task in tasks]
    injection = inject(trained.bare, trained.inventory)
    try:
        with use_plan(injection.plan(plan_of(trained.inventory, tasks), counts)):
            found = trained.bare(input_ids=ids).logits
        with use_plan(injection.plan(plan_of(trained.inventory, wrong), counts)):
            control = trained.bare(input_ids=ids).logits
    finally:
        injection.remove()
    assert (found - wanted).abs().max() < EXACT
    assert (control - wanted).abs().amax((1, 2)).min() > DIFFERENT


@torch.no_grad()
def test_greedy_tokens_of_a_mixed_batch_equal_pefts(trained: Trained) -> None:
    tasks, new = [2, 0, 1, 2, 1], 8
    ids = prompts(len(tasks))
    wanted = trained.peft.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        task_ids=torch.tensor(tasks),
        max_new_tokens=new,
        do_sample=False,
    )
    wrong = [(task + 1) % TASKS for task in tasks]
    found, control = (greedy(trained, ids, chosen, new) for chosen in (tasks, wrong))
    assert found.tolist() == wanted.tolist()
    assert (control != wanted).any(1).all()


def greedy(trained: Trained, ids: Tensor, tasks: list[int], new: int) -> Tensor:
    """Each step runs the whole text again: nothing but the adapters can differ from PEFT's."""
    injection = inject(trained.bare, trained.inventory)
    try:
        for _ in range(new):
            counts = [ids.shape[1]] * len(tasks)
            with use_plan(injection.plan(plan_of(trained.inventory, tasks), counts)):
                last = trained.bare(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, last.argmax(-1, keepdim=True)], 1)
    finally:
        injection.remove()
    return ids


@torch.no_grad()
@pytest.mark.parametrize(
    ("rank", "skills", "heads", "count"), [(1, 8, 16, 2), (4, 3, 1, 12), (2, 1, 4, 1)]
)
def test_other_sizes_equal_pefts_after_saving(
    tmp_path: Path, rank: int, skills: int, heads: int, count: int
) -> None:
    """Many heads of rank 1, Poly's one head with more than ten tasks, and a single skill."""
    bare = tiny_backbone("llama")
    sizes = {"r": rank, "n_skills": skills, "n_splits": heads, "n_tasks": count}
    wrapped = adapted(copy.deepcopy(bare), [*ATTENTION, *FEED_FORWARD], **sizes)
    wrapped.save_pretrained(tmp_path / "peft")
    convert_peft(tmp_path / "peft", bare, "tiny").save(tmp_path / "inventory")
    inventory = Inventory.load(tmp_path / "inventory")
    tasks = list(range(count))
    ids = prompts(count)
    wanted = wrapped(input_ids=ids, task_ids=torch.tensor(tasks)).logits
    unadapted = bare(input_ids=ids).logits
    injection = inject(bare, inventory)
    with use_plan(injection.plan(plan_of(inventory, tasks), [ids.shape[1]] * count)):
        found = bare(input_ids=ids).logits
    assert (found - wanted).abs().max() < EXACT
    assert (unadapted - wanted).abs().amax((1, 2)).min() > DIFFERENT


def test_the_header_says_what_was_converted(trained: Trained, tmp_path: Path) -> None:
    header = trained.inventory.header
    assert (header.heads, header.skills, header.rank) == (HEADS, SKILLS, RANK)
    assert header.scaling == 1 / RANK
    assert sorted(trained.inventory.tasks) == ["task-0", "task-1", "task-2"]
    trained.inventory.save(tmp_path)
    again = Inventory.load(tmp_path)
    assert again.fingerprint == trained.inventory.fingerprint
    assert {n: r.fingerprint for n, r in again.tasks.items()} == {
        n: r.fingerprint for n, r in trained.inventory.tasks.items()
    }


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, PreTrainedModel]:
    """A small Llama's checkpoint that a test may spoil."""
    bare = tiny_backbone("llama")
    adapted(copy.deepcopy(bare), ["q_proj", "down_proj"]).save_pretrained(tmp_path)
    return tmp_path, bare


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load(path.read_bytes())  # load_file would map the very file that is written
    edit(tensors)
    save_file(tensors, path)


Q_PROJ = f"{PREFIX}model.layers.0.self_attn.q_proj"


def test_names_take_the_place_of_pefts_numbers(saved: tuple[Path, PreTrainedModel]) -> None:
    named = convert_peft(*saved, "tiny", names=["boolq", "rte-1", "x.y_z"])
    plain = convert_peft(*saved, "tiny")
    assert list(named.tasks) == ["boolq", "rte-1", "x.y_z"]
    assert named.tasks["rte-1"].fingerprint == plain.tasks["task-1"].fingerprint
    assert named.tasks["rte-1"].fingerprint != plain.tasks["task-0"].fingerprint


@pytest.mark.parametrize(
    ("names", "field"),
    [
        (["a", "b"], "names"),
        (["a", "b", "c", "d"], "names"),
        (["a", "b", "../c"], "names[2]"),
        (["a", "", "c"], "names[1]"),
        (["a", "b", "a"], "names[2]"),
        (["base", "b", "c"], "names[0]"),
        (["a", "b\n", "c"], "names[1]"),
        (["a", "b", "c" * 129], "names[2]"),
    ],
)
def test_unusable_names_are_refused(
    saved: tuple[Path, PreTrainedModel], names: list[str], field: str
) -> None:
    with pytest.raises(ConversionError) as caught:
        convert_peft(*saved, "tiny", names=names)
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"peft_type": "LORA"}, "'LORA'"),
        ({"poly_type": "x-poly"}, "'x-poly'"),
        ({"modules_to_save": ["lm_head"]}, "['lm_head']"),
        ({"r": 0}, "0"),
        ({"n_skills": "4"}, "'4'"),
        ({"n_tasks": None}, "None"),
        ({"target_modules": None}, "None"),
        ({"target_modules": ["no_such_layer"]}, "['no_such_layer']"),
        ({"target_modules": "(q_proj"}, "missing )"),
        ({"use_shared_skill": True}, "True"),
    ],
)
def test_options_that_are_not_implemented_are_refused_by_name(
    saved: tuple[Path, PreTrainedModel], changes: dict[str, object], found: str
) -> None:
    edit_config(saved[0], **changes)
    with pytest.raises(ConversionError) as caught:
        convert_peft(*saved, "tiny")
    assert caught.value.field == f"adapter_config.{next(iter(changes))}"
    assert found in caught.value.found


def test_a_missing_option_is_refused_by_name(saved: tuple[Path, PreTrainedModel]) -> None:
    path = saved[0] / "adapter_config.json"
    config = json.loads(path.read_text())
    del config["n_splits"]
    path.write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=r"adapter_config\.n_splits"):
        convert_peft(*saved, "tiny")


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"r": RANK + 1}, f"{PREFIX}model.layers.0.self_attn.q_proj.poly_lora_A"),
        ({"n_splits": 2}, f"{PREFIX}model.layers.0.self_attn.q_proj.poly_lora_A"),
        ({"n_tasks": 4}, f"{PREFIX}model.layers.0.self_attn.q_proj.poly_router.module_logits"),
        ({"target_modules": ["q_proj"]}, f"{PREFIX}model.layers.0.mlp.down_proj.poly_lora_A"),
        (
            {"target_modules": ["q_proj", "down_proj", "k_proj"]},
            f"{PREFIX}model.layers.0.self_attn.k_proj.poly_lora_A",
        ),
        ({"target_modules": ["q_proj", "down_proj", "norm"]}, "model.norm"),
        ({"exclude_modules": ["q_proj"]}, f"{PREFIX}model.layers.0.self_attn.q_proj.poly_lora_A"),
    ],
)
def test_a_config_at_odds_with_its_tensors_is_refused(
    saved: tuple[Path, PreTrainedModel], changes: dict[str, object], field: str
) -> None:
    edit_config(saved[0], **changes)
    with pytest.raises(ConversionError) as caught:
        convert_peft(*saved, "tiny")
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (lambda t: t.pop(f"{Q_PROJ}.poly_lora_B"), f"{Q_PROJ}.poly_lora_B"),
        (
            lambda t: t.pop(f"{Q_PROJ}.poly_router.module_logits"),
            f"{Q_PROJ}.poly_router.module_logits",
        ),
        (
            lambda t: t.update({f"{PREFIX}lm_head.weight": torch.zeros(2)}),
            f"{PREFIX}lm_head.weight",
        ),
        (
            lambda t: t.update({f"{Q_PROJ}.poly_lora_B": t[f"{Q_PROJ}.poly_lora_B"].bfloat16()}),
            f"{Q_PROJ}.poly_lora_B",
        ),
        (
            lambda t: t.update(
                {f"{Q_PROJ}.poly_lora_A": t[f"{Q_PROJ}.poly_lora_A"].mT.contiguous()}
            ),
            f"{Q_PROJ}.poly_lora_A",
        ),
        (lambda t: t.update({k: v.double() for k, v in t.items()}), None),
        (
            lambda t: t[f"{Q_PROJ}.poly_lora_B"].fill_(torch.inf),
            "model.layers.0.self_attn.q_proj.B",
        ),
        (
            lambda t: t[f"{Q_PROJ}.poly_router.module_logits"][1, 6].fill_(torch.nan),
            "tasks.task-1.logits[0][1][2]",
        ),
    ],
)
def test_tensors_at_odds_with_the_config_are_refused(
    saved: tuple[Path, PreTrainedModel],
    edit: Callable[[dict[str, Tensor]], object],
    field: str | None,
) -> None:
    edit_tensors(saved[0], edit)
    with pytest.raises(AdapterError) as caught:
        convert_peft(*saved, "tiny")
    assert field is None or caught.value.field == field


def test_a_backbone_of_another_width_or_depth_is_refused(
    saved: tuple[Path, PreTrainedModel],
) -> None:
    folder, _ = saved
    for change in ({"intermediate_size": 128}, {"num_hidden_layers": 1}, {"num_hidden_layers": 3}):
        config = LlamaConfig(**LLAMA_SHAPE | change, **NO_STOP)
        with pytest.raises(ConversionError):
            convert_peft(folder, AutoModelForCausalLM.from_config(config), "tiny")


def test_heads_that_do_not_divide_the_features_are_refused(tmp_path: Path) -> None:
    bare = tiny_backbone("llama")
    adapted(copy.deepcopy(bare), ["q_proj"], n_splits=3).save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="multiple of 3"):
        convert_peft(tmp_path, bare, "tiny")


def test_a_bfloat16_checkpoint_stays_bfloat16(saved: tuple[Path, PreTrainedModel]) -> None:
    whole = convert_peft(*saved, "tiny")
    edit_tensors(saved[0], lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    half = convert_peft(*saved, "tiny")
    assert half.header.dtype == "bfloat16"
    assert half.tasks["task-0"].values.dtype == torch.float32
    name = half.layout.modules[0]
    assert torch.equal(half.a[name], whole.a[name].bfloat16())


def test_a_pickle_is_read_only_when_it_holds_tensors_alone(
    saved: tuple[Path, PreTrainedModel],
) -> None:
    folder, bare = saved
    wanted = convert_peft(folder, bare, "tiny").fingerprint
    whole = folder / "adapter_model.safetensors"
    torch.save(load(whole.read_bytes()), folder / "adapter_model.bin")
    whole.unlink()
    assert convert_peft(folder, bare, "tiny").fingerprint == wanted
    torch.save({"weights": Reaches(folder / "reached")}, folder / "adapter_model.bin")
    with pytest.raises(ConversionError, match=r"adapter_model\.bin"):
        convert_peft(folder, bare, "tiny")
    assert not (folder / "reached").exists()


class Reaches:
    """Writes a file when it is unpickled by a loader that runs what it reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1, 2]", b"{\x00"])
def test_files_that_cannot_be_read_are_named(
    saved: tuple[Path, PreTrainedModel], name: str, content: bytes | None
) -> None:
    path = saved[0] / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConversionError) as caught:
        convert_peft(*saved, "tiny")
    assert name in str(caught.value)
