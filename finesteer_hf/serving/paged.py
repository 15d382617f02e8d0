"""The steering of an engine's forwards: which token of a packed batch belongs to which request, and what it adds.

The engine's thread stands in a `PagedSession` for as long as it runs. The hooks that steer `generate` find it there, so
no hooks are added for serving. Before each forward the engine shows the session its batch (`lay_out`); the forward then
passes the sites.

A request is decided once, from the unsteered state of its own query. Where its prompt arrives with nothing steered
before the query in the cache, the query is read in the pass that steers. Otherwise, as for a split prompt under
`positions="all"`, the prompt is run ahead once, up to the deepest read site and outside of the engine's cache.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from finesteer_hf.errors import UnsupportedModelError
from finesteer_hf.runtime.plan import Plan
from finesteer_hf.runtime.query_pass import StopForward
from finesteer_hf.runtime.session import CallSession
from finesteer_hf.serving.requests import Asked, SteeredRequest, ticket_of
from finesteer_hf.serving.sampling import token_logprob
from finesteer_hf.serving.table import SteeringTable, sites_of
from finesteer_hf.sites import Site


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


# Under this name a request's `Asked` rides on the engine's request state.
KEY = "steering"


@dataclass
class Stats:
    """What an engine has done so far.

    Attributes:
        steps: forwards of the engine.
        tokens: tokens that went through them, without padding.
        decisions: requests that were decided.
        probes: prompts that were run ahead to be decided.
        adds: adds to the stream, one a site and step in which a token of a steered request is.
        failed: requests that ended with an error of their own.
        matched: prompt tokens that were taken from another request's cache blocks.
    """

    steps: int = 0
    tokens: int = 0
    decisions: int = 0
    probes: int = 0
    adds: int = 0
    failed: int = 0
    matched: int = 0


@dataclass
class _Reading:
    """An undecided request whose query is in the forward that runs: where the query is, and where its prompt begins."""

    request: SteeredRequest
    start: int
    query: int


class PagedSession(CallSession):
    """The steering of one engine.

    Args:
        runtime: the model's run time.
        plan_of: lays out what a request asks for; used where a request was submitted on another rank.

    Attributes:
        requests: the requests that are not over, by ticket.
        table: what they add.
        stats: counts.
        is_live: whether the engine still holds a sequence of a request.
    """

    def __init__(self, runtime: SteeringRuntime, plan_of: Callable[[Asked], Plan]) -> None:
        super().__init__(runtime, Plan.of(()))
        model = runtime.model
        self.tower = runtime.tower
        self.table = SteeringTable(runtime.tower, model.dtype, model.device)
        self.requests: dict[str, SteeredRequest] = {}
        self.stats = Stats()
        self.is_live: Callable[[SteeredRequest], bool] = lambda request: False
        self._plan_of = plan_of
        self._lock = threading.Lock()
        self._probed: SteeredRequest | None = None
        self._clear()

    def _clear(self) -> None:
        self._readings: list[_Reading] = []
        self._row_of_token: torch.Tensor | None = None
        self._writes: frozenset[Site] = frozenset()
        self._passed: set[Site] = set()
        self.sampled: list[tuple[int, Any, SteeredRequest]] = []

    # -- requests -----------------------------------------------------------------------------------------------------

    def admit(self, request: SteeredRequest) -> None:
        """Take a request in; its adapters stay hooked until it is released, even if the model lets go of them.

        Raises:
            ValueError: if a request of this id is in flight.
        """
        ticket = request.asked.ticket
        with self._lock:
            if ticket in self.requests:
                raise ValueError(f"A request with the id {ticket!r} is in flight. Give another one, or none.")
            self.runtime.hook(request.plan.sites)
            self.requests[ticket] = request

    def release(self, ticket: str) -> None:
        """Forget a request that is over."""
        with self._lock:
            request = self.requests.pop(ticket, None)
            if request is not None:
                self.table.take_back(request)
                self.runtime.unhook(request.plan.sites)

    def left(self, request_id: str) -> None:
        """Take note that a sequence is over; the request is released with its last one."""
        request = self._find(request_id)
        if request is None:
            return
        request.over.add(request_id)
        if not self.is_live(request):
            self.release(request.asked.ticket)

    def annotate(self, output: Any) -> bool:
        """Put what the gates said, and the record of the tokens, on an output.

        Returns:
            Whether it may be delivered: the only word of a request that failed is that it failed.
        """
        request = self._find(output.request_id)
        output.steering = {} if request is None else request.report()
        output.token_logprobs = [] if request is None else request.logprobs.get(output.request_id, [])
        return request is None or request.error is None or output.error is not None

    def _find(self, request_id: str) -> SteeredRequest | None:
        return self.requests.get(request_id) or self.requests.get(ticket_of(request_id))

    def of(self, state: Any) -> SteeredRequest | None:
        """The request that an engine's state belongs to; None for one that brings nothing of ours."""
        asked = state.logit_processor_kwargs.get(KEY)
        if asked is None:
            return None
        if asked.ticket not in self.requests:
            self.admit(SteeredRequest(asked, self._plan_of(asked)))
        request = self.requests[asked.ticket]
        if not request.prompt:
            # A request that was queued again brings its own answer along: the query stays where the prompt ended.
            request.prompt = tuple(state.initial_tokens[: state._true_initial_tokens or len(state.initial_tokens)])
            if request.plan and not request.reads:
                self._decide([request])
        return request

    def _decide(self, requests: Sequence[SteeredRequest]) -> None:
        for request in requests:
            if not request.rows and request.positions:
                self.table.give_rows(request)
        self.table.decide(requests)
        self.stats.decisions += len(requests)

    # -- a batch is laid out --------------------------------------------------------------------------------------------

    def lay_out(self, futures: Sequence[Any]) -> None:
        """Take note of a batch, in the order in which it is packed; before its forward.

        Args:
            futures: the engine's `FutureRequestState`s. Their `position_offset` is past this batch's tokens already.
        """
        self._clear()
        self.stats.steps += 1
        rows: list[int] = []
        steered: list[SteeredRequest] = []
        logits_row = 0
        for future in futures:
            request, length, state = self.of(future.state), future.query_length, future.state
            start = len(rows)
            if request is not None and request.plan:
                first, end = state.position_offset - length, state.position_offset
                self._see_to(request, first, end, start)
                if request.adds:
                    for region, tokens in request.regions(first, end).items():
                        rows += [request.rows[region] if request.rows else 0] * tokens
                    if any(rows[start:]):
                        steered.append(request)
            rows += [0] * (start + length - len(rows))
            if future.has_new_token:
                if request is not None and request.chooses and request.error is None:
                    self.sampled.append((logits_row, state, request))
                logits_row += 1
        self.stats.tokens += len(rows)
        if steered:
            self._row_of_token = torch.tensor(rows, device=self.table.device)
            self._writes = sites_of(steered)

    def _see_to(self, request: SteeredRequest, first: int, end: int, start: int) -> None:
        """Decide a request before its first steered token goes through the model, or arrange that it is on the way."""
        query = request.query
        if request.decided or request.error is not None or end <= min(request.clean, query):
            return
        if any(reading.request is request for reading in self._readings):
            # Another of its sequences is read in this pass.
            return
        if not request.rows and request.positions:
            self.table.give_rows(request)
        averages = bool(request.plan.averaged)
        in_this_pass = (
            first <= query < end
            and first <= request.clean
            and not request.plan.writes_before_a_read
            and (first == 0 or not averages)
        )
        if in_this_pass:
            self._readings.append(_Reading(request, start - first, start + query - first))
        else:
            self._probe(request)

    @torch.no_grad()
    def _probe(self, request: SteeredRequest) -> None:
        """Run a prompt ahead, unsteered, up to the deepest read site."""
        self.stats.probes += 1
        self._probed = request
        try:
            ids = torch.tensor([request.prompt], device=self.runtime.model.device)
            self.tower.decoder(input_ids=ids, use_cache=False)
        except StopForward:
            pass
        except Exception as error:
            request.error = error
        finally:
            self._probed = None
        if request.error is None:
            self._decide([request])

    # -- a forward passes the sites -------------------------------------------------------------------------------------

    @property
    def runs_ahead(self) -> bool:
        return self._probed is not None

    def begin_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._passed = set()

    def end_forward(self, output: Any, training: bool) -> None:
        """Look back at a forward.

        Raises:
            UnsupportedModelError: if a site that this batch steers was not passed: its requests would be unsteered.
        """
        missed = sorted(self._writes - self._passed)
        if output is not None and self._probed is None and missed:
            raise UnsupportedModelError(
                f"The engine's forward did not pass {[str(site) for site in missed]}, so its requests were not steered. "
                "Was `unload_steering` called, or a block skipped?"
            )

    def visit(self, site: Site, hidden: torch.Tensor) -> torch.Tensor | None:
        """What a site's hook puts back into the packed stream `[1, tokens, width]`; None to leave it as it is."""
        if self._probed is not None:
            self._read(self._probed, site, hidden, 0, self._probed.query)
            if site == self._probed.reads[-1]:
                raise StopForward
            return None
        self._passed.add(site)
        if self._readings:
            complete = []
            for reading in self._readings:
                self._read(reading.request, site, hidden, reading.start, reading.query)
                if site == reading.request.reads[-1]:
                    complete.append(reading)
            if complete:
                self._decide([reading.request for reading in complete])
                self._readings = [reading for reading in self._readings if reading not in complete]
        if site not in self._writes:
            return None
        self.stats.adds += 1
        assert self._row_of_token is not None
        return self.table.add(site, hidden, self._row_of_token)

    @staticmethod
    def _read(request: SteeredRequest, site: Site, hidden: torch.Tensor, start: int, query: int) -> None:
        if site not in request.plan.readers:
            return
        request.states[site] = hidden[0, query].detach().float()
        if site in request.plan.averaged:
            request.means[site] = hidden[0, start : query + 1].detach().float().mean(dim=0)

    # -- the logits -----------------------------------------------------------------------------------------------------

    def choose(self, raw: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Let requests with processors of their own choose from their rows of the logits.

        Args:
            raw: the model's logits `[tokens, vocabulary]`.
            scores: what the engine's processors made of them.
        """
        scores = scores.clone()
        for row, state, request in self.sampled:
            try:
                self._choose(row, state, request, raw, scores)
            except Exception as error:
                request.error = error
        return scores

    @staticmethod
    def _choose(row: int, state: Any, request: SteeredRequest, raw: torch.Tensor, scores: torch.Tensor) -> None:
        sampling = request.asked.sampling
        ids: Any = torch.tensor([[*state.initial_tokens, *state.generated_tokens]], device=raw.device)
        # Without sampling of its own a request takes what the engine's processors left, as it does in `generate`.
        own = raw[row : row + 1] if sampling is not None else scores[row : row + 1]
        chosen = request.processors(state.request_id)(ids, own.float())
        scores[row] = chosen[0]
        if sampling is not None and sampling.logprobs is not None:
            record = request.logprobs.setdefault(state.request_id, [])
            record.append(token_logprob(raw[row], int(chosen[0].argmax()), sampling.logprobs))
