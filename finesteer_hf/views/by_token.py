"""Where steering acted: for each token how far it moved the state, read off the very run that steers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from finesteer_hf.evaluation.measures.generation import end_token_ids, until_end
from finesteer_hf.evaluation.measures.likelihood import is_steerable, model_device
from finesteer_hf.evaluation.measures.prompts import encode_pairs
from finesteer_hf.fitting.data.templating import format_query, text_tokenizer, tokenise
from finesteer_hf.runtime.arguments import UNSET, Unset, as_number
from finesteer_hf.runtime.forwards.streams import Prompt
from finesteer_hf.runtime.plan import Plan, SelectionLike
from finesteer_hf.runtime.session import CallSession
from finesteer_hf.sites import Site
from finesteer_hf.views.token_text import token_texts


#: A text as it is, a chat, token ids `[n]` or `[1, n]`, or a tokenizer's output of one row, pads included.
PromptLike: TypeAlias = "str | Sequence[dict[str, Any]] | Sequence[int] | torch.Tensor | Mapping[str, Any]"


@dataclass(frozen=True)
class AdapterReading:
    """What an adapter of a call decided.

    Attributes:
        name: the adapter's name, or `processor_<i>`.
        scale: its run-time scale.
        gate: its gate, in [0, 1]; None if it has none.
        score: the score that the gate was computed from; None if it has none.
        sites: the sites that it writes.
        acts_on_logits: whether it changes logits, which no site shows.
    """

    name: str
    scale: float
    gate: float | None
    score: float | None
    sites: tuple[Site, ...]
    acts_on_logits: bool

    def in_words(self) -> str:
        """The decision as a sentence."""
        gate = "no gate" if self.gate is None else f"gate {self.gate:.3f}"
        score = "" if self.score is None else f", score {self.score:.3g}"
        logits = ", also acts on logits, which no site shows" if self.acts_on_logits else ""
        return f"{self.name}: {gate}{score}, scale {self.scale:g}{logits}."


@dataclass(frozen=True)
class SteeredTokens:
    """The tokens of a prompt and its answer, with what steering did at each.

    Attributes:
        tokens: the tokens' texts, which joined give the whole text. Of a character that spans several tokens, the last
            has it and the others are empty.
        ids: their ids.
        prompt_length: number of prompt tokens.
        sites: the write sites in forward order.
        shares: float32 `[tokens, sites]`: the norm of what all adapters together added at the site, as a share of the
            state's norm there, |delta| / |h|. h is what the site gets in this run, so it includes what earlier sites
            added. Exactly 0 where nothing was added.
        adapters: what each adapter decided, in the order in which they act.
    """

    tokens: tuple[str, ...]
    ids: tuple[int, ...]
    prompt_length: int
    sites: tuple[Site, ...]
    shares: torch.Tensor
    adapters: tuple[AdapterReading, ...]

    @property
    def query(self) -> int:
        """Index of the query, the prompt's last token."""
        return self.prompt_length - 1

    @property
    def largest(self) -> torch.Tensor:
        """Each token's largest share over the sites, float32 `[tokens]`; zeros if nothing is written."""
        return self.shares.amax(dim=1) if self.sites else torch.zeros(len(self.tokens))

    @property
    def deepest_colour(self) -> float:
        """The share that views draw in the full colour: the largest one, or 1 where all are 0."""
        return float(self.largest.max()) or 1.0

    def site_of(self, token: int) -> Site | None:
        """The site at which a token has its largest share; None if it was not steered."""
        if not self.sites or not self.largest[token]:
            return None
        return self.sites[int(self.shares[token].argmax())]

    def describe(self) -> str:
        """The view in words, for readers who see no colours."""
        largest, count = self.largest, len(self.tokens)
        acted = int((largest > 0).sum())
        if not acted:
            said = f"Steering added nothing at any of the {count} tokens."
        else:
            top = int(largest.argmax())
            said = (
                f"Steering acted on {acted} of {count} tokens, {int((largest[: self.prompt_length] > 0).sum())} of them in "
                f"the prompt. The largest share of the state's norm is {float(largest[top]):.3g}, at token {top + 1}, "
                f"{self.tokens[top]!r}, site {self.site_of(top)}."
            )
        return " ".join([said, *(reading.in_words() for reading in self.adapters)])

    def to_dict(self) -> dict[str, Any]:
        """The view as plain JSON values."""
        return {
            "tokens": [
                {
                    "text": text,
                    "id": number,
                    "part": "prompt" if i < self.prompt_length else "answer",
                    "shares": shares,
                }
                for i, (text, number, shares) in enumerate(
                    zip(self.tokens, self.ids, self.shares.tolist(), strict=True)
                )
            ],
            "query": self.query,
            "sites": [str(site) for site in self.sites],
            "adapters": [{**vars(reading), "sites": [str(s) for s in reading.sites]} for reading in self.adapters],
        }


@torch.no_grad()
def steering_by_token(
    model: Any,
    tokenizer: Any,
    prompt: PromptLike,
    *,
    steering: SelectionLike | Unset = UNSET,
    steering_scale: float = 1.0,
    answer: str | Sequence[int] | None = None,
    max_new_tokens: int = 64,
) -> SteeredTokens:
    """How far steering moves the state of each token of a prompt and its answer.

    Prompt and answer go through the model once, teacher forced, and each write site is seen before and after steering.
    An adapter that takes tokens back while it generates is shown on the text that it kept.

    Args:
        model: a steered model.
        tokenizer: its tokenizer.
        prompt: text as it is, a chat, ids, or a tokenizer's output of one row. Pads are left out.
        steering: as for `generate`: a name, names, a dict of name to scale, None. By default what is active.
        steering_scale: multiplies the scales.
        answer: the answer's text, or ids; "" looks at the prompt alone. By default the model answers greedily, steered.
        max_new_tokens: most tokens of that answer.

    Returns:
        The tokens, with an answer's last one too: its share is what the next token would be computed from.

    Raises:
        TypeError: if the model is not steered, or the prompt has another form.
        ValueError: if the prompt has no token or several rows.
        AdapterNotFoundError: for a name that is not loaded.

    Example:
        >>> seen = steering_by_token(model, tokenizer, [{"role": "user", "content": "Are bats blind?"}])
        >>> for token, share in zip(seen.tokens, seen.largest): print(f"{share:.2f} {token!r}")
    """
    if not is_steerable(model):
        raise TypeError(
            f"{type(model).__name__} is not steered. Load it with SteeredModelForCausalLM.from_pretrained or from_model."
        )
    scale = as_number(steering_scale, "steering_scale")
    prompt_ids, answer_ids = _encoded(tokenizer, prompt, answer)
    device = model_device(model)
    if answer_ids is None:
        ids = torch.tensor([prompt_ids], device=device)
        ends = end_token_ids(model, tokenizer)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=min(ends, default=0),
            steering=steering,
            steering_scale=scale,
        )
        answer_ids = until_end(out[0, len(prompt_ids) :].tolist(), ends)
    ids = torch.tensor([[*prompt_ids, *answer_ids]], device=device)
    plan, _ = model._call_plan(steering, scale, ())
    session = _run_watched(model, plan, ids, len(prompt_ids))
    sites = tuple(sorted(plan.steps))
    return SteeredTokens(
        tokens=tuple(token_texts(tokenizer, ids[0].tolist())),
        ids=tuple(ids[0].tolist()),
        prompt_length=len(prompt_ids),
        sites=sites,
        shares=torch.stack([session.shares[site] for site in sites], dim=1) if sites else torch.zeros(ids.shape[1], 0),
        adapters=_readings(session),
    )


class _WatchedSession(CallSession):
    """A call of one row that keeps, for each write site, the share by which it moved each token."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.shares: dict[Site, torch.Tensor] = {}

    def visit(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        steered = super().visit(site, hidden)
        if site in self.plan.steps and not self.runs_ahead:
            self.shares[site] = moved_share(hidden, hidden if steered is None else steered)[0].cpu()
        return steered


def moved_share(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """|after - before| / |before| of each token, float32 `[rows, tokens]`, from `[rows, tokens, width]`.

    0 where nothing changed, whatever the state.
    """
    moved = (after.float() - before.float()).norm(dim=-1)
    return torch.where(moved == 0, 0.0, moved / before.float().norm(dim=-1))


def _run_watched(model: Any, plan: Plan, ids: torch.Tensor, prompt_length: int) -> _WatchedSession:
    runtime = model._steering
    prompt = Prompt(ids.shape[1], lengths=torch.tensor([prompt_length], device=ids.device))
    runtime.follow_modules()
    runtime.hook(plan.sites)
    session = _WatchedSession(runtime, plan, prompt)
    try:
        with session:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        runtime.unhook(plan.sites)
    return session


def _readings(session: _WatchedSession) -> tuple[AdapterReading, ...]:
    records = session.records_of_sequences(1)

    def number(name: str, key: str) -> float | None:
        value = records.get(name, {}).get(key)
        return None if value is None or value.numel() != 1 else float(value)

    return tuple(
        AdapterReading(
            name=entry.name,
            scale=float(entry.scale),  # type: ignore[arg-type]
            gate=number(entry.name, "gate"),
            score=number(entry.name, "score"),
            sites=tuple(sorted({*entry.processor.writes, *entry.processor.maps})),
            acts_on_logits=entry.processor.acts_on_logits,
        )
        for entry in session.plan.entries
    )


def _encoded(
    tokenizer: Any, prompt: PromptLike, answer: str | Sequence[int] | None
) -> tuple[list[int], list[int] | None]:
    """Ids of the prompt and of the answer; None if the model is to answer."""
    words = isinstance(prompt, str) or (
        isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)
    )
    if words and isinstance(answer, str):
        prompts, answers = encode_pairs(tokenizer, [prompt], [answer])  # type: ignore[list-item]
        return prompts[0], answers[0]
    ids = format_query(tokenizer, prompt) if words else _ids_of(prompt)  # type: ignore[arg-type]
    if not ids:
        raise ValueError("The prompt has no token; the last one is the query.")
    if isinstance(answer, str):
        return ids, tokenise(text_tokenizer(tokenizer), [answer], special_tokens=False)[0]
    return ids, None if answer is None else [int(token) for token in answer]


def _ids_of(prompt: Any) -> list[int]:
    mask = None
    if isinstance(prompt, Mapping):
        prompt, mask = prompt["input_ids"], prompt.get("attention_mask")
    try:
        ids = torch.as_tensor(prompt)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"The prompt must be text, a chat, or token ids, got {type(prompt).__name__}.") from error
    if ids.ndim == 2 and ids.shape[0] != 1:
        raise ValueError(f"The prompt has {ids.shape[0]} rows; look at one row at a time.")
    ids = ids.reshape(-1)
    if mask is not None:
        ids = ids[torch.as_tensor(mask).reshape(-1).bool()]
    return [int(token) for token in ids]
