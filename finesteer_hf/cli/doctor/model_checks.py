"""What works on a model: looked up in its config and its modules, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from finesteer_hf.cli.adapters.list import size
from finesteer_hf.cli.doctor.check import Check
from finesteer_hf.cli.doctor.environment import installed
from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.sites import Site, SiteKind, TextTower


@dataclass(frozen=True)
class Looked:
    """A model without weights.

    Attributes:
        model: the model on the meta device.
        tokenizer: its tokenizer.
        tower: its text tower; None if it cannot be steered.
        checks: what was found.
    """

    model: Any
    tokenizer: Any
    tower: TextTower | None
    checks: list[Check]


def look_at_model(name: str, **arguments: Any) -> Looked:
    """Build a model from its config alone and check it.

    Args:
        name: Hub id, folder or `playground`.
        **arguments: for transformers' `from_pretrained` of config and tokenizer.

    Raises:
        OSError: if there is no such model.
        ValueError: if transformers does not know its architecture.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from finesteer_hf.adapters.base_models import located

    location = located(name)
    trusted = arguments.get("trust_remote_code", False)
    attention = arguments.pop("attn_implementation", None)
    config = AutoConfig.from_pretrained(location, **arguments)
    tokenizer = AutoTokenizer.from_pretrained(location, **arguments)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=trusted, attn_implementation=attention or config._attn_implementation
        )
    model.config._name_or_path = location
    weights = weights_of(model)
    try:
        tower = TextTower(model)
    except UnsupportedModelError as error:
        return Looked(model, tokenizer, None, [weights, Check("steering", "no", str(error), needed=True)])
    return Looked(
        model,
        tokenizer,
        tower,
        [
            weights,
            Check("steering", "yes", f"{tower.num_layers} blocks, residual stream {tower.hidden_size} wide"),
            inner(tower, "head_out", "heads"),
            inner(tower, "mlp_act", "neurons"),
            attention_weights(tower),
            chat_template(tokenizer),
            padding(tokenizer),
            continuous_batching(model, tower),
            compiled(model),
            backtracking(model),
            tensor_parallel(model, tower),
            quantization(),
        ],
    )


def weights_of(model: Any) -> Check:
    """How large the weights are."""
    count = sum(parameter.numel() for parameter in model.parameters())
    dtype = getattr(model.config, "dtype", None) or "float32"
    each = {"float32": 4, "float64": 8}.get(str(dtype).removeprefix("torch."), 2)
    text = f"{type(model).__name__}, {count / 1e6:,.0f} M parameters, {size(count * each)} as saved"
    return Check("model", "yes", text)


def inner(tower: TextTower, kind: SiteKind, what: str) -> Check:
    """Whether the sites of a kind inside blocks exist, and in which blocks."""
    lacking = []
    for layer in range(tower.num_layers):
        try:
            tower.check(Site(kind, layer))
        except (ValueError, NotImplementedError):
            lacking.append(layer)
    has = tower.num_layers - len(lacking)
    if not has:
        return Check(f"{what} ({kind})", "no", "no block has them; use methods that steer the residual stream")
    if lacking:
        return Check(f"{what} ({kind})", "partly", f"in {has} of {tower.num_layers} blocks, not in {ranges(lacking)}")
    return Check(f"{what} ({kind})", "yes", "in all blocks")


def ranges(numbers: list[int]) -> str:
    """Sorted numbers as text: the first few, and how many more there are."""
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown} and {len(numbers) - 8} more"


def attention_weights(tower: TextTower) -> Check:
    """Whether attention weights can be read, which TAD does."""
    if tower.shows_attention:
        return Check("attention weights", "yes", "attn_implementation='eager' returns them")
    own = getattr(tower.config, "_attn_implementation", None)
    return Check(
        "attention weights",
        "partly",
        f"for methods that read them (TAD), load with --model-arg attn_implementation=eager; {own!r} returns none",
    )


def chat_template(tokenizer: Any) -> Check:
    """Whether prompts can be chats."""
    if tokenizer.chat_template:
        return Check("chat template", "yes", "prompts are chats")
    return Check(
        "chat template", "partly", "has none: a base model. Use generate --plain, and rows of plain text to fit"
    )


def padding(tokenizer: Any) -> Check:
    """Whether batches can be padded."""
    if tokenizer.pad_token_id is not None:
        return Check("padded batches", "yes", f"pad token {tokenizer.pad_token!r}")
    return Check(
        "padded batches",
        "partly",
        "the tokenizer has no pad token: this package pads by itself; in your own batches set tokenizer.pad_token",
    )


def continuous_batching(model: Any, tower: TextTower) -> Check:
    """Whether transformers' engine of packed batches runs the model, and can be steered."""
    from transformers.generation.continuous_batching import cache

    from finesteer_hf.serving.contract import TESTED, problems

    name = "continuous batching"
    missing = problems()
    if missing:
        return Check(
            name, "no", f"transformers lacks {', '.join(missing)}: install transformers {TESTED}, or use generate"
        )
    if model._is_stateful:
        return Check(name, "no", "the model keeps a recurrent state, which packed batches cannot; use generate")
    packed = getattr(cache, "ATTN_TYPE_TO_ALLOCATOR", None)
    unknown = sorted(set(getattr(tower.config, "layer_types", None) or ()) - set(packed)) if packed is not None else []
    if unknown:
        return Check(name, "no", f"the engine has no cache for layers of type {', '.join(unknown)}; use generate")
    return Check(name, "yes", "without CUDA graphs and asynchronous batching, which skip the hooks that steer")


def compiled(model: Any) -> Check:
    """Whether decoding can be compiled."""
    if model._can_compile_fullgraph:
        return Check("compiled decoding", "yes", "generate(cache_implementation='static')")
    return Check(
        "compiled decoding", "no", "transformers does not compile this architecture; generate runs it as it is"
    )


def backtracking(model: Any) -> Check:
    """Whether tokens can be taken back, which FASB does."""
    from transformers import DynamicCache

    from finesteer_hf.runtime.decoding.cache_rows import can_move_rows

    if not model._is_stateful and can_move_rows(DynamicCache(config=model.config)):
        return Check("backtracking", "yes", "FASB cuts the cache; greedy or sampling, no beams, no static cache")
    return Check(
        "backtracking",
        "partly",
        "its cache cannot be cut: FASB reads the text again after each step back, which costs a forward",
    )


def tensor_parallel(model: Any, tower: TextTower) -> Check:
    """Whether the model can be split over devices by tensor parallelism."""
    if not getattr(model, "_tp_plan", None) and not getattr(tower.config, "base_model_tp_plan", None):
        return Check("tensor parallel", "no", "the architecture has no plan for it; use --device-map auto")
    return Check(
        "tensor parallel",
        "partly",
        "methods on the residual stream; heads and neurons are split over devices and cannot be steered",
    )


def quantization() -> Check:
    """Whether the model can be loaded in 4 or 8 bits."""
    import torch

    if installed("bitsandbytes") is None:
        return Check("4 and 8 bits", "no", "needs bitsandbytes: pip install bitsandbytes")
    where = "" if torch.cuda.is_available() else "; slow without a GPU"
    return Check("4 and 8 bits", "yes" if not where else "partly", f"--quantization 4bit{where}")
