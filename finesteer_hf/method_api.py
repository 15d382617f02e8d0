"""What a steering method is: a processor that can be fitted, saved and loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Literal, Protocol, get_args, get_origin

import numpy as np
import torch

from finesteer_hf.adapters.config import ConfigT, SteeringConfig
from finesteer_hf.adapters.tensor_files import Shape
from finesteer_hf.errors import AdapterFileError
from finesteer_hf.processors import DecisionFormula, SteeringProcessor
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.methods._shared.objective import Limits


Pool = Literal["query", "query_mean", "answer_mean", "answer_last", "gradient"]
#: Pools over prompts; the others are over answers.
PROMPT_POOLS: tuple[Pool, ...] = ("query", "query_mean")
Part = Literal["fit", "calibration", "validation"]
Side = Literal["query", "chosen", "rejected", "general"]
Text = Literal["prompt", "chosen", "rejected", "general"]


@dataclass(frozen=True)
class ModelInfo:
    """What a method knows about the base model before any state is captured.

    `shows_attention`: whether its attention returns weights, for `attention` sites.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    head_size: int
    vocab_size: int
    shows_attention: bool = False


@dataclass(frozen=True)
class CaptureRequest:
    """The states that a method's fit needs.

    Attributes:
        sites: sites to capture, all in one pass.
        pools: `query` (the prompt's last token), `query_mean` (mean over the prompt's tokens), `answer_mean` (mean
            over the answer's tokens), `answer_last` (the answer's last content token, before any end of turn),
            `gradient` (of the answer's mean log-probability per token with respect to a vector added from the query
            on).
    """

    sites: tuple[Site, ...]
    pools: tuple[Pool, ...] = ("query", "answer_mean")


@dataclass(frozen=True)
class DosePoint:
    """One strength of a dose-response curve, on held-out rows. Standard errors count rows of one prompt as one.

    Attributes:
        strength: lambda.
        bottleneck: mean over rows of the lowest probability of any token of the chosen answer, teacher forced, in [0,
            1]. The model gives an answer only if it gives each of its tokens.
        bottleneck_se: its standard error.
        kl: 95th percentile over general prompts' tokens of KL(unsteered || steered), in nats.
        bottleneck_rise: its difference from the unsteered model's on the same rows.
        bottleneck_rise_se: standard error of that.
        changed: share of general prompts whose greedy answer changes; None if not measured. Methods that backtrack
            leave most texts alone and change the others a lot, which a percentile over tokens does not show.
        preference: mean over prompts of the probability that the chosen answer beats the rejected one, sigmoid(log
            p(chosen) - log p(rejected)), with log-probabilities per token, so that the answers' lengths do not count.
        preference_se: its standard error.
        preference_rise_se: standard error of its difference from the unsteered model's.
        preference_summed: the same with summed log-probabilities, as multiple choice scores them.
        likelihood: mean log-probability of the chosen answers, in nats per token.
        own_words: log-probability under the base of the steered model's greedy answers to held-out prompts, in nats
            per token. It is low if the steered text degenerates. None if the answers are the wanted ones.
        own_length: mean number of tokens of those answers.
        repeated: share of their 4-grams that occurred earlier in the same answer.
        wanted: mean probability that those answers are of the chosen answers' kind; None if a classifier of the
            unsteered model's states cannot tell held-out chosen answers from rejected ones (see `AnswerJudge`).
        wanted_se: its standard error.
        wanted_rise_se: standard error of its difference from the unsteered model's.
    """

    strength: float
    bottleneck: float
    bottleneck_se: float
    kl: float
    bottleneck_rise: float = 0.0
    bottleneck_rise_se: float = 0.0
    changed: float | None = None
    preference: float = 0.5
    preference_se: float = 0.0
    preference_rise_se: float = 0.0
    preference_summed: float = 0.5
    likelihood: float = 0.0
    own_words: float | None = None
    own_length: float | None = None
    repeated: float | None = None
    wanted: float | None = None
    wanted_se: float = 0.0
    wanted_rise_se: float = 0.0

    @classmethod
    def from_report(cls, row: Mapping[str, Any]) -> DosePoint:
        """A point of an adapter's report; figures unknown to this version are left out."""
        names = {entry.name for entry in fields(cls)}
        return cls(**{name: value for name, value in row.items() if name in names})


@dataclass(frozen=True)
class AnswerRun:
    """An answer under teacher forcing: one entry for each of its tokens, the position that predicts it.

    Attributes:
        ids: the answer's tokens, int64 `[answer]`, on the CPU.
        logits: `[answer, vocabulary]` float32; the first are those of the prompt's last token.
        states: by site, the states at the positions of the logits, `[answer, width]` in the stream's dtype.
    """

    ids: torch.Tensor
    logits: torch.Tensor
    states: Mapping[Site, torch.Tensor]

    @property
    def nll(self) -> torch.Tensor:
        """Mean negative log-likelihood of the answer, in nats per token, float32."""
        return torch.nn.functional.cross_entropy(self.logits, self.ids.to(self.logits.device))


class FitData(Protocol):
    """States of a preference data set and of general prompts, split for fitting.

    Preference rows (`prompt`, `chosen`, `rejected`) have `num_rows` rows; general prompts `num_general` rows. `part`
    selects a split; splits are disjoint by prompt (and by group, if groups are given). `limits` bounds what steering
    may cost.
    """

    info: ModelInfo
    seed: int
    limits: Limits

    def query(self, site: Site, part: Part, pool: Pool = "query") -> np.ndarray:
        """States of the prompts' last tokens, or means over the prompts, `[rows, width]` float32."""

    def chosen(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the chosen answers, `[rows, width]` float32."""

    def rejected(self, site: Site, part: Part, pool: Pool = "answer_mean") -> np.ndarray:
        """Pooled states of the rejected answers, `[rows, width]` float32."""

    def prompts(self, part: Part) -> np.ndarray:
        """Label of each row's prompt; rows that share a prompt are one query."""

    def groups(self, part: Part) -> np.ndarray:
        """Label of what is held out together: the row's prompt, or its category if categories are split."""

    def kinds(self, part: Part) -> np.ndarray | None:
        """Category of each row, `[rows]` of str, whatever the split; None if the data set has none."""

    def texts(self, text: Literal["prompt", "general"], part: Part) -> list[str]:
        """Texts of the rows' prompts, or of the general prompts, without the chat template."""

    def general(self, site: Site, part: Part, pool: Pool = "query") -> np.ndarray:
        """States of the general prompts, `[rows, width]` float32; zero rows if there are none."""

    def chunks(
        self, side: Side, site: Site, parts: Sequence[Part], pool: Pool = "answer_mean"
    ) -> Iterator[np.ndarray]:
        """The same states in chunks of at most a few thousand rows, part by part.

        Args:
            side: whose states.
            site: where they are taken.
            parts: splits to go through.
            pool: pool of the answers; queries have one state.

        Yields:
            `[rows, width]` float32, of at least one row.
        """

    def tokens(self, text: Text, part: Part) -> list[np.ndarray]:
        """Token ids, int64, of the rows' prompts, of their answers alone, or of the general prompts."""

    def answers(
        self,
        text: Literal["chosen", "rejected"],
        part: Part,
        rows: Sequence[int],
        *,
        steering: SteeringProcessor | None = None,
        sites: Sequence[Site] = (),
    ) -> Iterator[AnswerRun]:
        """Run the model over the answers of some rows, in that order.

        Gradients reach the tensors that `steering` uses in `transform`, not the model's.

        Args:
            text: which answers.
            part: the split.
            rows: indices of rows of the part.
            steering: processor that steers; None for the unsteered model.
            sites: sites whose states are returned, after steering.
        """

    def dose_response(
        self, build: Callable[[float], SteeringProcessor], strengths: Sequence[float], share: float = 1.0
    ) -> list[DosePoint]:
        """Run the model steered at each strength on the validation part.

        Args:
            build: makes the processor of a strength.
            strengths: lambdas to try, ascending.
            share: share of the held-out prompts to use; a first look at many candidates needs only some.
        """

    def note(self, message: str) -> None:
        """Print a line of progress."""


@dataclass
class FitResult:
    """What a fit returns.

    Attributes:
        config: a copy of the given config with every `auto` replaced by what was chosen.
        tensors: the parameters, fp32 (int64 for indices), adapter name outside the keys.
        report: JSON-ready held-out figures, curves and choices; stored under `config.fit["report"]`.
    """

    config: SteeringConfig
    tensors: dict[str, torch.Tensor]
    report: dict[str, Any] = field(default_factory=dict)


class SteeringMethod(SteeringProcessor, Generic[ConfigT]):
    """Base of all methods: a `SteeringProcessor` built from a config and tensors.

    A subclass names its config in brackets, `class CAA(SteeringMethod[CAAConfig])`, which types `self.config` and sets
    `config_cls`. It reads its parameters in `__init__` and implements `tensor_shapes`, `needs` and `fit`. No other
    code in the package names it.

    Args:
        config: the method's config, fitted.
        tensors: its parameters.

    Raises:
        AdapterFileError: if a parameter is missing, unexpected, of a wrong shape or not finite.
    """

    #: Class of the config: the one in brackets, unless a subclass sets another.
    config_cls: ClassVar[type[SteeringConfig]]
    #: Features of `finesteer_hf.testing` that the method refuses with an error, each with the reason.
    refuses: ClassVar[Mapping[str, str]] = {}
    #: Features that the method defines differently from the suite, each with the reason; not checked.
    differs: ClassVar[Mapping[str, str]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for base in cls.__dict__.get("__orig_bases__", ()):
            named = get_args(base)[:1]
            if "config_cls" not in cls.__dict__ and _is_method(get_origin(base)) and isinstance(named[0], type):
                cls.config_cls = named[0]

    def __init__(self, config: ConfigT, tensors: Mapping[str, torch.Tensor]) -> None:
        if not isinstance(config.strength, (int, float)):
            raise AdapterFileError(
                f"The {config.steering_type} config has strength={config.strength!r}; only a fitted adapter, whose "
                "strength is a number, can steer. Run `fit_steering` first."
            )
        self.config = config
        self.positions = config.positions
        self.strength = float(config.strength)
        self.tensors = dict(tensors)
        self._on_device: dict[torch.device, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            if not torch.isfinite(tensor).all():
                raise AdapterFileError(f"Tensor {name!r} of the {config.steering_type} adapter holds NaN or infinity.")

    @classmethod
    def tensor_shapes(cls, config: ConfigT) -> Mapping[str, Shape]:
        """Names and shapes of the parameters that a config declares.

        An axis is a size, or `Free` if the config does not fix it. A plain tuple is float32, `Indices` is int64.
        """
        raise NotImplementedError

    @classmethod
    def refused_by(cls, config: ConfigT) -> Mapping[str, str]:
        """Features of `finesteer_hf.testing` that an adapter of this config refuses; `refuses` by default."""
        return cls.refuses

    @classmethod
    def needs(cls, config: ConfigT, info: ModelInfo) -> CaptureRequest:
        """Sites and pools that `fit` will read.

        Raises:
            ValueError: if the config does not fit the model (a layer out of range).
        """
        raise NotImplementedError

    @classmethod
    def fit(cls, data: FitData, config: ConfigT) -> FitResult:
        """Fit the method on captured states.

        Raises:
            DatasetError: if there are too few rows for the config.
        """
        raise NotImplementedError

    def formula(self) -> DecisionFormula | None:
        """What `decide` computes, for other engines; None where it is not a vector and a gate of one state of the query."""
        return None

    @property
    def devices(self) -> list[torch.device]:
        """Devices that have a copy of the parameters."""
        return list(self._on_device)

    def parameters_on(self, device: torch.device) -> dict[str, torch.Tensor]:
        """The parameters on a device, copied there once."""
        if device not in self._on_device:
            self._on_device[device] = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        return self._on_device[device]


def _is_method(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, SteeringMethod)
