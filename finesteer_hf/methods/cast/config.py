"""The settings of conditional activation steering."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from finesteer_hf.adapters.config import SteeringConfig, setting, written_by_fit
from finesteer_hf.methods._shared.checks import check_count, check_layers, check_number, check_one_of, check_strength
from finesteer_hf.methods.cast.rules import Rule
from finesteer_hf.processors import Positions


POOLS = ("answer_mean", "answer_last")
VECTORS = ("pca", "mean")
LENGTHS = ("unit", "mean", "variance")
JOINS = ("or", "and")
COMPARATORS = ("above", "below")
# All rows of the data set, whatever their category.
ALL_ROWS = "*"
# Features for readers that know only one condition and one behaviour, read at the last token.
SEVERAL, PROMPT_MEAN = "conditions_and_behaviors", "prompt_mean"


@dataclass(kw_only=True)
class CASTConfig(SteeringConfig):
    """Settings of conditional activation steering.

    By default there is one condition, that the query is more like the rows' prompts than the general ones, and one
    behaviour, the contrast of all chosen and rejected answers. With several, each is named by a category of the rows:

        CASTConfig(conditions=["fraud", "health"], behaviors=["fraud", "health"], rules=["if C1 then B1",
            "if C2 and not C1 then B2"])

    Attributes:
        positions: steered tokens. The published code steers all, including the prompt's.
        strength: factor of a behaviour of unit length, so it is in units of the states; `auto` tries shares of the
            states' norm.
        layers: decoder blocks whose outputs are steered; `auto` compares single blocks between 20% and 80% of the depth,
            the best of them together, and all of them, on held-out rows.
        conditions: C1, C2, ...: for each, a category, whose prompts are contrasted with all other prompts (of other
            categories and general ones), or `*`: the prompts of all rows, contrasted with the general ones.
        behaviors: B1, B2, ...: for each, a category, whose chosen and rejected answers are contrasted, or `*`: all
            rows. Several behaviours of a row are summed.
        behavior_strengths: factor of each behaviour, times `strength`; a negative one steers away from it. Empty: 1
            each.
        rules: which conditions trigger which behaviour, such as `if C1 or C3 then B1`; a behaviour is added once,
            however many rules trigger it.
        vector: direction of a behaviour: `pca` (first principal direction of the pairs' centred states, as published) or
            `mean` (of the mean difference).
        length: length of a behaviour: `unit`, as published; `mean`: that of the mean difference along it, so that
            strength 1 is the natural one; `variance`: the share of the pairs' variance that it explains, the published
            code's `use_explained_variance`. A condition's length does not affect its similarity.
        pool: answer states that behaviours are fitted to.
        condition_pool: h of a condition: state of the prompt's `last` token, or the `mean` over its tokens, which is the
            published code's default.
        condition_layers: blocks whose outputs are tested, or one list per condition; `auto` tries those between 20%
            and 80% of the depth and keeps `num_conditions` per condition.
        num_conditions: number of layers that `auto` keeps per condition, those with the best F1.
        rule: whether a condition tested at several layers must be met at one (`or`, as published) or at all (`and`).
        thresholds: threshold of each tested layer, condition by condition; fitted. The published code has one for all
            layers of a condition.
        comparators: `above` or `below` for each tested layer; fitted.
    """

    steering_type: ClassVar[str] = "CAST"
    understands: ClassVar[frozenset[str]] = frozenset({SEVERAL, PROMPT_MEAN})

    positions: Positions = field(default="all", metadata=setting("Steered tokens: all, prompt or generated."))
    strength: float | str = field(
        default="auto", metadata=setting("Lambda: a number, auto, kl:<nats> or norm:<share>.")
    )
    layers: list[int] | str = field(default="auto", metadata=setting("Steered decoder blocks, or auto."))
    conditions: list[str] = field(
        default_factory=lambda: [ALL_ROWS], metadata=setting("Category of each condition, or * for all rows.")
    )
    behaviors: list[str] = field(
        default_factory=lambda: [ALL_ROWS], metadata=setting("Category of each behaviour, or * for all rows.")
    )
    behavior_strengths: list[float] = field(
        default_factory=list, metadata=setting("Factor of each behaviour, times strength; none: 1 each.")
    )
    rules: list[str] = field(
        default_factory=lambda: ["if C1 then B1"], metadata=setting("Such as: if C1 and not C2 then B1.")
    )
    vector: Literal["pca", "mean"] = field(default="pca", metadata=setting("Direction of a behaviour: pca or mean."))
    length: Literal["unit", "mean", "variance"] = field(
        default="unit", metadata=setting("Length of a behaviour: unit, mean or variance.")
    )
    pool: Literal["answer_mean", "answer_last"] = field(
        default="answer_mean", metadata=setting("Pooled answer states: answer_mean or answer_last.")
    )
    condition_pool: Literal["last", "mean"] = field(
        default="last", metadata=setting("Tested state of a prompt: last token, or mean.")
    )
    condition_layers: list[int] | list[list[int]] | str = field(
        default="auto", metadata=setting("Tested decoder blocks, or auto.")
    )
    num_conditions: int = field(default=1, metadata=setting("Number of tested blocks that auto keeps per condition."))
    rule: Literal["or", "and"] = field(default="or", metadata=setting("Joins a condition's tested blocks: or, and."))
    thresholds: list[float] = field(default_factory=list, metadata=written_by_fit("Threshold at each tested block."))
    comparators: list[str] = field(
        default_factory=list, metadata=written_by_fit("above or below, at each tested block.")
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_layers(self.layers, self.num_hidden_layers)
        for name in ("conditions", "behaviors"):
            if not getattr(self, name):
                raise ValueError(f"{name} must name at least one category, or '*' for all rows; got none.")
        if len(set(self.conditions)) < len(self.conditions):
            raise ValueError(f"conditions must be different, got {self.conditions[:20]}.")
        for layers in self._layers_of_conditions():
            check_layers(layers, self.num_hidden_layers, name="condition_layers")
        check_strength(self.strength)
        for name, allowed in (("vector", VECTORS), ("length", LENGTHS), ("pool", POOLS), ("rule", JOINS)):
            check_one_of(name, getattr(self, name), allowed)
        check_one_of("condition_pool", self.condition_pool, ("last", "mean"))
        check_count("num_conditions", self.num_conditions, 1)
        for name in ("thresholds", "behavior_strengths"):
            for number in getattr(self, name):
                check_number(name, number)
        if self.behavior_strengths and len(self.behavior_strengths) != len(self.behaviors):
            raise ValueError(
                f"behavior_strengths has {len(self.behavior_strengths)} numbers for {len(self.behaviors)} behaviors; give "
                "one for each, or none."
            )
        for comparator in self.comparators:
            check_one_of("comparators", comparator, COMPARATORS)
        self._check_rules()

    @classmethod
    def paper(cls, **overrides: Any) -> CASTConfig:
        """The settings that paper and code fix for all models: unit directions of pairwise centred PCA, added to all
        tokens; a condition tested at one layer, on the mean over the prompt.

        They choose strength and layers by hand for each model (behaviours at about the second third of the blocks, with
        1.5 for an 8B model; conditions within the first third): here they stay `auto`.

        Args:
            **overrides: fields to change, for example `layers=[15, 16, 17], strength=1.5`.
        """
        settings: dict[str, Any] = {
            "positions": "all",
            "vector": "pca",
            "length": "unit",
            "pool": "answer_mean",
            "condition_pool": "mean",
            "num_conditions": 1,
            "rule": "or",
        }
        return cls(**{**settings, **overrides})

    def parsed_rules(self) -> list[Rule]:
        """The parsed rules."""
        return [Rule.parse(text) for text in self.rules]

    def tested_layers(self) -> list[list[int]]:
        """The tested blocks of each condition of a fitted config."""
        return [list(layers) for layers in self._layers_of_conditions() if not isinstance(layers, str)]

    def features(self) -> list[str]:
        """The features that a reader of a file with these settings must understand."""
        plain = CASTConfig()
        names = ("conditions", "behaviors", "behavior_strengths", "rules")
        several = any(getattr(self, name) != getattr(plain, name) for name in names)
        return [SEVERAL] * several + [PROMPT_MEAN] * (self.condition_pool == "mean")

    def _layers_of_conditions(self) -> list[Any]:
        given = self.condition_layers
        if not (isinstance(given, list) and given and all(isinstance(layers, list) for layers in given)):
            return [given] * len(self.conditions)
        if len(given) != len(self.conditions):
            raise ValueError(
                f"condition_layers has lists for {len(given)} conditions, but there are {len(self.conditions)}. Give one "
                "for each condition, or one for all."
            )
        return list(given)

    def _check_rules(self) -> None:
        rules = self.parsed_rules()
        called = {
            "C": (self.conditions, {at for rule in rules for at in rule.conditions}),
            "B": (self.behaviors, {rule.behavior for rule in rules}),
        }
        for letter, (named, used) in called.items():
            known = set(range(len(named)))
            odd = [f"{letter}{at + 1}" for at in sorted(used ^ known)[:20]]
            if used - known:
                raise ValueError(
                    f"The rules name {odd}, but there are only {letter}1 to {letter}{len(named)}: {named}."
                )
            if odd:
                raise ValueError(
                    f"No rule names {odd} of {named}. Give `rules` that do, such as 'if C1 or C2 then B1'."
                )
