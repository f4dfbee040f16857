"""Small real things that tests build: backbones, tokenizers, inventories, engines."""

import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MT5Config,
    MT5ForConditionalGeneration,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from polyhead.adapters.generator import Generator, GeneratorFacts
from polyhead.adapters.inject import Injection, find_modules
from polyhead.adapters.inventory import BackboneRef, Inventory
from polyhead.adapters.ops import Factors
from polyhead.adapters.plan import Adapter, PreparedAdapter, RoutedTask
from polyhead.adapters.private import PrivateAdapter
from polyhead.server.engine.engine import Engine
from polyhead.server.engine.kv_space import KVSpace
from polyhead.server.engine.prefix_cache import PrefixCache
from polyhead.server.engine.request import Event, Failure, Output, Request
from polyhead.server.engine.runner import Runner
from polyhead.server.engine.scheduler import Scheduler, SchedulerConfig
from polyhead.server.engine.source_cache import SourceCache
from polyhead.server.engine.source_runner import SourceRunner
from polyhead.server.engine.tokenizer import Tokenizer

END = "<|end|>"
VOCAB = 257  # every byte and END
SHAPE = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
ROPE = {**SHAPE, "num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": 256}


def tiny_model(family: str = "llama", seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A random float32 backbone whose greedy output does not repeat itself at once."""
    torch.manual_seed(seed)
    extra = {"bos_token_id": None, "initializer_range": 0.15, **changes}
    if family == "llama":
        model: PreTrainedModel = LlamaForCausalLM(LlamaConfig(**{**ROPE, **extra}))
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**{**ROPE, **extra}))
    elif family == "mistral":
        model = MistralForCausalLM(MistralConfig(**{**ROPE, **extra}))
    elif family == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**{**ROPE, "head_dim": 16, **extra}))
    else:
        config = GPT2Config(
            vocab_size=VOCAB, n_embd=64, n_layer=2, n_head=4, eos_token_id=256, **extra
        )
        model = GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval().requires_grad_(False)


def tiny_t5(
    kind: str = "gated-gelu", factor: float = 8.0, family: str = "t5", **changes: Any
) -> PreTrainedModel:
    """kind: of T5, `relu`, or of T5 1.1, Flan-T5, T0 and mT5, which with weights times 8 repeats
    itself less."""
    torch.manual_seed(1)
    values: dict[str, Any] = {
        "vocab_size": VOCAB,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": kind,
        "tie_word_embeddings": False,
        "decoder_start_token_id": 0,
        "initializer_factor": factor,
    }
    mt5 = family == "mt5"
    config = (MT5Config if mt5 else T5Config)(**{**values, **changes})
    model = (MT5ForConditionalGeneration if mt5 else T5ForConditionalGeneration)(config)
    return model.eval().requires_grad_(False)


def restless_t5(kind: str = "gated-gelu", **changes: Any) -> PreTrainedModel:
    """One with so small embeddings and so large other weights that its answers keep changing."""
    model = tiny_t5(kind, 1.0, **changes)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in model.named_parameters():
        std = 2.0 if "relative" in name else 2 * parameter.shape[-1] ** -0.5
        std = {"shared.weight": 0.03, "lm_head.weight": 1.0}.get(name, std)
        if parameter.dim() > 1:
            parameter.normal_(std=std, generator=generator)
    return model


def byte_tokenizer(*, ends: bool = False) -> PreTrainedTokenizerFast:
    """Every byte is a token, in byte order; 256 ends a text. ends: it is added, as T5's is."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    order = sorted(alphabet, key=lambda c: _byte_of(c))
    fast = FastTokenizer(models.BPE(vocab={c: i for i, c in enumerate(order)}, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    if ends:
        fast.add_special_tokens([END])
        fast.post_processor = processors.TemplateProcessing(
            single=f"$A {END}", special_tokens=[(END, 256)]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=END)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
    )
    return tokenizer


def _byte_of(symbol: str) -> int:
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    shifted = [b for b in range(256) if b not in printable]
    code = ord(symbol)
    return code if code in printable else shifted[code - 256]


def tiny_inventory(
    model: PreTrainedModel, heads: int = 4, skills: int = 4, rank: int = 3, std: float = 0.35
) -> Inventory:
    """Random skills over all linear layers, strong enough that tasks really differ."""
    modules = find_modules(model, heads=heads)
    return Inventory.random(
        BackboneRef.of(model, "tiny"), modules, heads=heads, skills=skills, rank=rank, std=std
    )


def tiny_generator(
    inventory: Inventory, mean: torch.Tensor, template: str = "{input}\n"
) -> Generator:
    """So strong that two contexts answer differently; `mean` `[D]` has uniform weights."""
    chance = torch.Generator().manual_seed(4)
    shape = inventory.layout.shape("module")
    return Generator(
        bias=torch.full(shape, 1 / inventory.layout.skills),
        left=torch.randn(*shape, 6, generator=chance),
        right=torch.randn(6, len(mean), generator=chance) * 0.2,
        mean=mean,
        scale=torch.full((len(mean),), 0.5),
        facts=GeneratorFacts(
            backbone=inventory.header.backbone.fingerprint,
            inventory=inventory.fingerprint,
            template=template,
        ),
    )


def random_task(inventory: Inventory, key: str, seed: int) -> RoutedTask:
    """A task with sharp random weights."""
    generator = torch.Generator().manual_seed(seed)
    layout = inventory.layout
    shape = (len(layout.modules), layout.heads, layout.skills)
    return RoutedTask(key, torch.softmax(4 * torch.randn(shape, generator=generator), -1))


def random_private(
    inventory: Inventory, seed: int, rank: int = 5, std: float = 0.2
) -> PrivateAdapter:
    """A private adapter over every other module."""
    generator = torch.Generator().manual_seed(seed)
    modules = inventory.header.modules[::2]
    a = {m.name: torch.randn(m.in_features, rank, generator=generator) * std for m in modules}
    b = {m.name: torch.randn(rank, m.out_features, generator=generator) * std for m in modules}
    return PrivateAdapter.checked(a, b, inventory.header.modules)


def plain_prepare(adapter: PrivateAdapter) -> PreparedAdapter:
    """As a planner of one group for each module would lay it out."""
    factors = [Factors(adapter.a[name], (adapter.b[name],)) for name in adapter.a]
    return PreparedAdapter(adapter.fingerprint, factors)


def save_backbone(model: PreTrainedModel, folder: Path) -> Path:
    """Backbone and byte tokenizer as a transformers folder."""
    model.save_pretrained(folder)
    byte_tokenizer(ends=model.config.is_encoder_decoder).save_pretrained(folder)
    return folder


class Collector:
    """Receives an engine's events and hands them to whoever waits for a request's end."""

    def __init__(self) -> None:
        self.events: dict[str, list[Event]] = {}
        self.order: list[Event] = []
        self._changed = threading.Condition()

    def publish(self, events: list[Event]) -> None:
        with self._changed:
            for event in events:
                self.events.setdefault(event.request_id, []).append(event)
                self.order.append(event)
            self._changed.notify_all()

    def wait(self, request: Request, timeout: float = 60) -> list[Event]:
        """All events of a request, once every choice has its finish reason."""
        choices = len(request.continuations) or request.params.n
        with self._changed:
            done = self._changed.wait_for(lambda: self._finished(request.id, choices), timeout)
            assert done, f"{request.id} did not finish in {timeout} s"
            return list(self.events[request.id])

    def _finished(self, name: str, choices: int) -> bool:
        events = self.events.get(name, [])
        ended = sum(1 for e in events if isinstance(e, Output) and e.finish_reason)
        return ended >= choices or any(isinstance(e, Failure) for e in events)

    def tokens(self, request: Request, index: int = 0) -> list[int]:
        events = self.wait(request)
        failures = [e for e in events if isinstance(e, Failure)]
        assert not failures, failures
        outputs = [e for e in events if isinstance(e, Output) and e.index == index]
        return [token for e in outputs for token in e.token_ids]

    def text(self, request: Request, index: int = 0) -> str:
        return "".join(
            e.text for e in self.wait(request) if isinstance(e, Output) and e.index == index
        )


def make_engine(
    model: PreTrainedModel,
    injection: Injection | None,
    collector: Collector,
    *,
    max_running: int = 8,
    max_step_tokens: int = 32,
    kv_tokens: int = 4096,
    longest: int = 512,
    kept: int = 0,
    key: Callable[[Request], str] | None = None,
    **options: Any,
) -> Engine:
    """A real engine over a model, not started."""
    encodes = model.config.is_encoder_decoder
    space = KVSpace(kv_tokens, longest, parking=kept > 0 or encodes)
    how: dict[str, Any] = {} if key is None else {"key": key}
    if encodes:
        how |= {"step_tokens": max_step_tokens, "depth": model.config.num_layers}
    return Engine(
        (SourceRunner if encodes else Runner)(model, injection, space.capacities),
        Scheduler(
            SchedulerConfig(max_running, max_step_tokens),
            space,
            (SourceCache if encodes else PrefixCache)(space, kept, **how),
        ),
        Tokenizer(byte_tokenizer(), [256]),
        collector.publish,
        **options,
    )


def merged(model: PreTrainedModel, inventory: Inventory, adapter: Adapter) -> PreTrainedModel:
    """A copy of a bare backbone with one task's A_t and B_t added to its weights for good."""
    copy = deepcopy(model)
    copy.generation_config.eos_token_id = None
    copy.generation_config.pad_token_id = 0
    for m, module in enumerate(inventory.header.modules):
        layer: Any = copy.get_submodule(module.name)
        delta = _delta(inventory, adapter, m, module.name)
        if delta is not None:
            layer.weight += delta.T if isinstance(layer, torch.nn.Linear) else delta
    return copy


def _delta(inventory: Inventory, adapter: Adapter, m: int, name: str) -> torch.Tensor | None:
    if isinstance(adapter, PrivateAdapter):
        return adapter.a[name] @ adapter.b[name] if name in adapter.a else None
    if adapter is None or isinstance(adapter, PreparedAdapter):
        return None
    heads = list(zip(adapter.weights[m], inventory.a[name], inventory.b[name], strict=True))
    a = torch.cat([sum(w * a for w, a in zip(ws, skills, strict=True)) for ws, skills, _ in heads])
    b = torch.cat(
        [sum(w * b for w, b in zip(ws, skills, strict=True)) for ws, _, skills in heads], 1
    )
    return inventory.header.scaling * a @ b


def alone(model: PreTrainedModel, request: Request) -> list[int]:
    """What transformers' own greedy `generate` answers to one request."""
    prompt = torch.tensor([request.asked])
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=request.params.max_tokens,
    )
    return ids[0, len(request.prompt) :].tolist()
