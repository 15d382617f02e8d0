"""The settings of FASB."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from finesteer_hf.adapters.config import setting
from finesteer_hf.methods._shared.checks import check_count, check_number, check_one_of
from finesteer_hf.methods._shared.heads_config import HeadsConfig
from finesteer_hf.methods.query_gate.config import GATE_FEATURES, Gate, QueryGateConfig


@dataclass(kw_only=True)
class FASBConfig(HeadsConfig, QueryGateConfig):
    """Settings of FASB (arXiv 2508.17621); further fields as in `HeadsConfig` and, for the gate, `QueryGateConfig`.

    With a `gate` the adapter has two stages. The first, FineSteer's gate, decides once per query, from the unsteered
    state of the prompt's last token at `read_site`. A row whose gate is 0 is neither tracked nor steered: it stays
    bit-identical to the base model. The others are tracked as without a gate, and the strength is multiplied by the
    gate. The gate is fitted with `fit_gate` as in FineSteer, including `gate_epsilon`.

        >>> FASBConfig(gate="conformal", gate_score="state", read_site="resid_post[12]")

    Attributes:
        gate: first stage: `always` (none: every row is tracked, as in the paper), or one of FineSteer's gates.
        read_site: where the gate reads; by default the output of the earliest block, between 20% and 80% of the depth,
            that separates queries from general prompts about as well as the best. Tracked heads before it cost an
            extra pass over the prompt up to it.
        threshold: beta: mean deviation 1 - p(wanted) of the heads above which a row backtracks.
        backtrack: s: number of tokens to drop; a text of at most so many restarts from its prompt.
        adaptive: whether the strength is alpha times the deviation, or alpha itself.
        recheck: whether a steered row is judged again every `backtrack` tokens, and then either steered with its new
            deviation, or released and tracked as before; otherwise a row backtracks once and stays steered.
        compat: `official` shifts only the newest position of a text that is recomputed at each step
            (`use_cache=False`), and scores texts with the published code's indices; by default a shifted position
            stays shifted, as in a cache.
    """

    steering_type: ClassVar[str] = "FASB"
    published_count: ClassVar[int] = 24
    understands: ClassVar[frozenset[str]] = GATE_FEATURES | {"recheck", "compat:official"}

    gate: Gate = field(
        default="always", metadata=setting("First stage: conformal, quantile, logistic, ser, or always for none.")
    )
    num_heads: int | str = field(default="auto", metadata=setting("Number of tracked and steered heads, or auto."))
    threshold: float = field(default=0.4, metadata=setting("Deviation above which tokens are taken back."))
    backtrack: int = field(default=10, metadata=setting("Number of tokens to take back.", most=1 << 20))
    adaptive: bool = field(default=True, metadata=setting("Whether the deviation scales the strength."))
    recheck: bool = field(default=False, metadata=setting("Whether steered rows are judged again."))
    compat: str | None = field(default=None, metadata=setting("official: the published code's positions."))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("threshold", self.threshold, above=0.0, below=1.0)
        check_count("backtrack", self.backtrack, 1)
        check_one_of("compat", self.compat, (None, "official"))
        if self.compat == "official" and self.recheck:
            raise ValueError("compat='official' backtracks once, so it does not allow recheck=True.")
        needed = ["recheck"] * self.recheck + ["compat:official"] * (self.compat == "official")
        if self.gate != "always":
            needed += [f"gate:{self.gate}"] + [f"score:{self.gate_score}"] * (self.gate_score != "auto")
        self.requires = sorted({*self.requires, *needed})

    @classmethod
    def paper(cls, **overrides: Any) -> FASBConfig:
        """The published script's settings for Llama-2-7B-chat: 24 heads, alpha 60, beta 0.4, 10 tokens, class means.

        Args:
            **overrides: fields to change, for example `direction="probe"`.
        """
        settings = {"strength": 60.0, "threshold": 0.4, "backtrack": 10, "direction": "centre"}
        return cls(**{"num_heads": cls.published_count, **settings, **overrides})
