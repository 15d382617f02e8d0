"""Steered models in lm-eval: its model `finesteer`.

lm-eval's `HFLM` runs a context and its continuation in one forward and does not say where the context ends. Here each
row's context length is passed on, so steering decides on the context, as in `generate`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from safetensors.torch import save
from torch.nn import functional
from tqdm import tqdm

from finesteer_hf.adapters.adapter import SteeringAdapter
from finesteer_hf.model.auto import SteeredModelForCausalLM, steered
from finesteer_hf.processors import SteeringProcessor


try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import Collator
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(f"{error}. lm-eval is an extra: pip install 'finesteer-hf[eval]'.") from error


# lm-eval's request: context and continuation as texts (None for a piece of a running text), and the ids of both.
Request: TypeAlias = tuple[tuple[str, str] | None, list[int], list[int]]


class _Row(NamedTuple):
    """One row of a forward: the requests that it answers, and the ids that lm-eval batches by."""

    requests: list[int]
    context: list[int]
    continuation: list[int]


@register_model("finesteer")
class FineSteerLM(HFLM):
    """A steered model for lm-eval: `HFLM` with all its arguments, plus steering.

    Args:
        pretrained: the base model's id or folder; or a model from `SteeredModelForCausalLM`, which is evaluated with
            its active steering, including `with model.steering(...)` around the evaluation.
        steering: the adapter, if `pretrained` is an id: `org/name`, `org/name@revision`, a folder or a
            `SteeringAdapter`; or several, as a dict from name to one of these or as such a dict in JSON. All are
            active, in order.
        steering_scale: a number that multiplies all scales, or a dict from name to number, or such a dict in JSON.
        steering_revision: branch, tag or commit of the adapters' repos; `revision` is the base model's.
        **kwargs: as for `HFLM`: `batch_size`, `device`, `dtype`, `peft`, `tokenizer`, `max_length`, ...

    Raises:
        ValueError: for a model object that is not steered, a model object together with `steering`, a scale without an
            adapter, or an encoder-decoder.

    Example:
        >>> lm = FineSteerLM("org/model", steering="org/model-truthful@v1", steering_scale=1.5, batch_size=8)
        >>> lm_eval.simple_evaluate(model=lm, tasks=["truthfulqa_mc2"], apply_chat_template=True)
    """

    def __init__(
        self,
        pretrained: Any,
        steering: str | SteeringAdapter | Mapping[str, str | SteeringAdapter] | None = None,
        steering_scale: float | str | Mapping[str, float] = 1.0,
        steering_revision: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(pretrained, str):
            if not steered(pretrained):
                raise ValueError(
                    f"This {type(pretrained).__name__} is not steered. Give `pretrained` and `steering` as ids or folders, "
                    "or steer the model first: SteeredModelForCausalLM.from_model(model, steering=...)."
                )
            if steering is not None or steering_scale != 1.0:
                raise ValueError(
                    "A model object is evaluated with its own steering. Instead of `steering` and `steering_scale` use "
                    "`model.set_steering(...)`, or `with model.steering(name, scale=...)` around the evaluation."
                )
        self._adapters = _load(_parsed(steering), steering_revision)
        self._selection = _selection(self._adapters, _parsed(steering_scale))
        self._digests: dict[str, tuple[SteeringAdapter, str]] = {}
        super().__init__(pretrained=pretrained, **kwargs)
        if self.backend != "causal":
            raise ValueError(
                f"Steering needs a causal language model; lm-eval treats this one as a {self.backend} model."
            )

    def _create_model(self, *args: Any, **kwargs: Any) -> None:
        super()._create_model(*args, **kwargs)
        SteeredModelForCausalLM.from_model(self._model, steering=self._adapters or None)
        self._model.set_steering(self._selection)

    # -- scoring ------------------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is the greedy one; the queries are the contexts' ends.

        A piece of a running text (`loglikelihood_rolling`) has no prompt; the token before its first scored one serves
        as prompt.
        """
        answers: list[Any] = [None] * len(requests)
        rows = self._rows(requests)
        by_length = Collator(rows, sort_fn=lambda row: (-len(row[1]) - len(row[2]), row[1] + row[2]))
        automatic = self.batch_size == "auto"
        schedule = self._batch_scheduler if automatic and rows and not override_bs else None
        if schedule is not None:
            self.batch_sizes: dict[int, int] = {}
        batches = by_length.get_batched(n=override_bs or 0 if automatic else self.batch_size, batch_fn=schedule)
        with tqdm(
            total=len(requests), disable=disable_tqdm or self.rank != 0, desc="Running loglikelihood requests"
        ) as progress:
            for batch in batches:
                for row, logits in self._batch_logits(batch):
                    for index in row.requests:
                        pair, _, continuation = requests[index]
                        answers[index] = self._answer(logits, continuation)
                        if pair is not None:
                            self.cache_hook.add_partial("loglikelihood", pair, answers[index])
                    progress.update(len(row.requests))
        return answers

    def _rows(self, requests: Sequence[Request]) -> list[_Row]:
        """One row for all requests of one prompt that differ only in their last token, such as options A to D."""
        rows: dict[tuple[int, tuple[int, ...]], _Row] = {}
        for index, (pair, context, continuation) in enumerate(requests):
            if not context or not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"Request {index} has {len(context)} tokens of context and {len(continuation)} of continuation; each "
                    f"needs one, and a continuation may have at most {self.max_length}."
                )
            ids = context + continuation
            end = self._prompt_length(pair, context, continuation)
            row = rows.setdefault((end, tuple(ids[:-1])), _Row([], ids[:end], ids[end:]))
            row.requests.append(index)
        return list(rows.values())

    def _prompt_length(self, pair: tuple[str, str] | None, context: list[int], continuation: list[int]) -> int:
        """Number of tokens up to the one at which `generate` would decide.

        lm-eval moves whitespace at a context's end to the continuation, including the newline that ends a chat
        template. It is scored there, but the prompt ends after it, unless it is merged into one token with what
        follows.
        """
        if pair is None or pair[0] == pair[0].rstrip():
            return len(context)
        whole, prompt = context + continuation, self.tok_encode(pair[0])
        return len(prompt) if len(prompt) < len(whole) and whole[: len(prompt)] == prompt else len(context)

    def _batch_logits(self, batch: Sequence[_Row]) -> Iterator[tuple[_Row, torch.Tensor]]:
        """Logits `[tokens, vocabulary]` that predict the tokens of each row, from the second one on."""
        # The last token predicts nothing that is scored. Texts that are too long lose their beginning.
        ids = [(row.context + row.continuation)[-(self.max_length + 1) : -1] for row in batch]
        ends = [max(len(kept) + 1 - len(row.continuation), 1) for kept, row in zip(ids, batch, strict=True)]
        width = max(map(len, ids))
        padded = torch.tensor([kept + [0] * (width - len(kept)) for kept in ids], device=self.device)
        mask = torch.tensor([[1] * len(kept) + [0] * (width - len(kept)) for kept in ids], device=self.device)
        logits = self._model_call(padded, mask, prompt_lengths=torch.tensor(ends))
        for row, kept, row_logits in zip(batch, ids, logits, strict=True):
            yield row, row_logits[: len(kept)]

    def _answer(self, logits: torch.Tensor, continuation: list[int]) -> tuple[float, bool]:
        log_probs = functional.log_softmax(logits[-len(continuation) :], dim=-1, dtype=self.softmax_dtype)
        wanted = torch.tensor(continuation, device=log_probs.device)
        chosen = log_probs.gather(1, wanted[:, None])[:, 0]
        return float(chosen.sum()), bool((log_probs.argmax(dim=-1) == wanted).all())

    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        prompt_lengths: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits `[rows, tokens, vocabulary]` of right-padded rows.

        Args:
            inps: `[rows, tokens]`.
            attn_mask: `[rows, tokens]`, 0 at pads.
            labels: for encoder-decoders; not used.
            prompt_lengths: `[rows]`; None if the rows are only prompts, as when lm-eval tries batch sizes.
        """
        if prompt_lengths is None:
            prompt_lengths = torch.full((len(inps),), inps.shape[1])
        if not any(self._active()):
            # As in lm-eval: right padding changes nothing before it, and the base's scores equal HFLM's to the bit.
            attn_mask = None
        mixed = self.mixed_precision_dtype
        with torch.no_grad(), torch.autocast(self.device.type, dtype=mixed, enabled=mixed is not None):
            return self.model(inps, attention_mask=attn_mask, prompt_lengths=prompt_lengths, use_cache=False).logits

    # -- what is evaluated --------------------------------------------------------------------------------------------

    def _active(self) -> tuple[dict[str, float], tuple[SteeringProcessor, ...]]:
        """The active steering: adapters with their scales, and the user's own processors."""
        selection, processors = self.model._steering.active()
        return {name: scale for name, scale in selection if scale != 0}, processors

    def _digest(self, name: str) -> str:
        """SHA-256 of an adapter's config and tensors."""
        adapter = self.model.steering_adapters[name]
        known = self._digests.get(name)
        if known is None or known[0] is not adapter:
            settings = {key: value for key, value in adapter.config.to_dict().items() if key != "fit"}
            content = json.dumps(settings, sort_keys=True, default=str).encode()
            content += save({key: tensor.contiguous() for key, tensor in sorted(adapter.tensors.items())})
            known = self._digests[name] = (adapter, hashlib.sha256(content).hexdigest())
        return known[1]

    def _identity(self) -> str:
        """A name for what is evaluated: the base model and its active steering.

        Raises:
            ValueError: under `steering_with`, since processors have no name.
        """
        active, processors = self._active()
        if processors:
            raise ValueError(
                "The cache cannot identify processors of `model.steering_with(...)`; leave `use_cache` out."
            )
        config = self.model.config
        base = [
            config._name_or_path,
            getattr(config, "_commit_hash", None),
            self.peft,
            self.delta,
            str(self.model.dtype),
        ]
        steering = [(self._digest(name), scale) for name, scale in active.items()]
        return hashlib.sha256(json.dumps([base, steering]).encode()).hexdigest()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Make lm-eval's cache of answers (`use_cache`), keyed by requests only, distinguish adapters and scales."""
        super().set_cache_hook(cache_hook)
        if cache_hook.dbdict is not None:
            cache_hook.dbdict.encode_key = lambda key: f"{self._identity()}:{key}"
            cache_hook.dbdict.decode_key = lambda stored: stored.rpartition(":")[2]

    def get_model_info(self) -> dict[str, Any]:
        """Metadata for lm-eval's results, with each active adapter's method, origin, scale and SHA-256."""
        adapters = self.model.steering_adapters
        steering = {
            name: {
                "steering_type": adapters[name].config.steering_type,
                "source": adapters[name].source,
                "revision": adapters[name].revision,
                "scale": scale,
                "sha256": self._digest(name),
            }
            for name, scale in self._active()[0].items()
        }
        return {**super().get_model_info(), "steering": steering}


def _parsed(value: Any) -> Any:
    """lm-eval's command line passes numbers and dicts, its argument string passes a dict as JSON."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{value!r} is not JSON: {error}. Give several adapters as model_args in a dict."
            ) from error
    return value


def _load(steering: Any, revision: str | None) -> dict[str, SteeringAdapter]:
    if steering is None:
        return {}
    sources = steering if isinstance(steering, Mapping) else {"default": steering}
    return {
        name: source
        if isinstance(source, SteeringAdapter)
        else SteeringAdapter.from_pretrained(source, revision=revision)
        for name, source in sources.items()
    }


def _selection(adapters: Mapping[str, SteeringAdapter], scale: Any) -> dict[str, float]:
    if not isinstance(scale, Mapping):
        if not adapters and scale != 1.0:
            raise ValueError(f"steering_scale={scale!r} has no effect: no `steering` was given.")
        return dict.fromkeys(adapters, float(scale))
    unknown = sorted(set(scale) - set(adapters))
    if unknown:
        raise ValueError(f"steering_scale names {unknown}; the adapters are {sorted(adapters)}.")
    return {name: float(value) for name, value in scale.items()}


def main() -> None:
    """lm-eval's command, for versions that do not find models of other packages."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
