"""The vLLM objects that the plugin touches, small and honest: same names, arguments and order of events.

`GPUModelRunner` with its `InputBatch` and `CachedRequestState`, `InputProcessor` with `EngineCoreRequest` and
`SamplingParams`; and, to drive them, an engine that schedules prompts in pieces under a budget of tokens, shares cached
blocks by a hash of salt and tokens, and puts requests back. Written after reading vLLM's sources; nothing of them is here.
"""

from __future__ import annotations

import copy
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import packed_llama
import pytest
import torch


BLOCK = 4
# Batches are padded to a multiple of this, as they are for CUDA graphs.
PADDED_TO = 8
PADDING_TOKEN = 3


@dataclass
class SamplingParams:
    max_tokens: int = 8
    extra_args: dict[str, Any] | None = None


@dataclass
class EngineCoreRequest:
    request_id: str
    prompt_token_ids: list[int] | None
    sampling_params: SamplingParams
    cache_salt: str | None = None
    lora_request: Any = None
    resumable: bool = False
    prompt_embeds: Any = None


@dataclass
class CachedRequestState:
    req_id: str
    prompt_token_ids: list[int]
    sampling_params: SamplingParams
    num_computed_tokens: int
    output_token_ids: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        return [*self.prompt_token_ids, *self.output_token_ids]


@dataclass
class SchedulerOutput:
    """What a step runs: tokens by request, states of new requests, and what was computed of each before."""

    num_scheduled_tokens: dict[str, int]
    scheduled_new_reqs: list[CachedRequestState]
    num_computed_tokens: dict[str, int]
    finished_req_ids: set[str]


class InputBatch:
    def __init__(self, max_num_reqs: int) -> None:
        self.req_ids: list[str] = []
        self.num_computed_tokens_cpu = np.zeros(max_num_reqs, dtype=np.int32)
        self.num_prompt_tokens = np.zeros(max_num_reqs, dtype=np.int32)

    @property
    def num_reqs(self) -> int:
        return len(self.req_ids)


def vllm_config(adapters: dict[str, str] | None, **changes: Any) -> SimpleNamespace:
    """A configuration that can be steered, or, with `changes` by dotted path, one that differs there."""
    text = SimpleNamespace(hidden_size=32, num_hidden_layers=3, model_type="llama")
    config = SimpleNamespace(
        additional_config={} if adapters is None else {"finesteer": {"adapters": adapters}},
        use_v2_model_runner=False,
        speculative_config=None,
        kv_transfer_config=None,
        parallel_config=SimpleNamespace(
            pipeline_parallel_size=1,
            use_ubatching=False,
            prefill_context_parallel_size=1,
            worker_extension_cls="" if adapters is None else "finesteer_vllm.worker.SteeringWorkerExtension",
        ),
        compilation_config=SimpleNamespace(pass_config=SimpleNamespace(enable_sp=False)),
        model_config=SimpleNamespace(runner_type="generate", hf_text_config=text, model="org/toy"),
    )
    for path, value in changes.items():
        *owners, name = path.split(".")
        owner = config
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)
    return config


def _classes() -> SimpleNamespace:
    """Fresh classes, as a plugin changes them."""

    class InputProcessor:
        def __init__(self, vllm_config: Any, renderer: Any = None) -> None:
            self.vllm_config = vllm_config

        def process_inputs(
            self,
            request_id: str,
            prompt: Any,
            params: SamplingParams,
            *,
            lora_request: Any = None,
            resumable: bool = False,
        ) -> EngineCoreRequest:
            prompt = prompt if isinstance(prompt, dict) else {"prompt_token_ids": list(prompt)}
            return EngineCoreRequest(
                request_id,
                prompt.get("prompt_token_ids"),
                params,
                prompt.get("cache_salt"),
                lora_request,
                resumable,
                prompt.get("prompt_embeds"),
            )

    class GPUModelRunner:
        def __init__(self, vllm_config: Any, device: torch.device, max_num_reqs: int = 4, max_num_tokens: int = 16):
            self.vllm_config, self.device, self.dtype = vllm_config, device, torch.float32
            self.max_num_reqs, self.max_num_tokens = max_num_reqs, max_num_tokens
            self.requests: dict[str, CachedRequestState] = {}
            self.input_batch = InputBatch(max_num_reqs)
            self.query_start_loc = SimpleNamespace(np=np.zeros(max_num_reqs + 1, dtype=np.int32))
            # By request and block; in vLLM these lie in pages.
            self.caches: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

        def load_model(self, hf_model: Any) -> None:
            self.model = packed_llama.LlamaForCausalLM(hf_model)

        def get_model(self) -> torch.nn.Module:
            return self.model

        @torch.inference_mode()
        def execute_model(self, scheduler_output: SchedulerOutput) -> dict[str, int]:
            """Run a batch; gives the next token of each request whose known tokens are all computed."""
            self._update_states(scheduler_output)
            scheduled = np.array([scheduler_output.num_scheduled_tokens[name] for name in self.input_batch.req_ids])
            self._prepare_inputs(scheduler_output, scheduled)
            ids, positions, segments = [], [], []
            for index, name in enumerate(self.input_batch.req_ids):
                state, count = self.requests[name], int(scheduled[index])
                computed = state.num_computed_tokens
                segments.append(packed_llama.Segment(len(ids), count, computed, self.caches[name]))
                ids += state.tokens[computed : computed + count]
                positions += range(computed, computed + count)
            real, padding = len(ids), -len(ids) % PADDED_TO
            assert real + padding <= self.max_num_tokens
            hidden = self._forward(ids + padding * [PADDING_TOKEN], positions + padding * [0], segments)
            chosen = {}
            for name, part in zip(self.input_batch.req_ids, segments, strict=True):
                if part.computed + part.tokens == len(self.requests[name].tokens):
                    chosen[name] = int(self.model.compute_logits(hidden[part.start + part.tokens - 1]).argmax())
                    self.requests[name].output_token_ids.append(chosen[name])
            return chosen

        @torch.inference_mode()
        def _dummy_run(self, num_tokens: int) -> torch.Tensor:
            return self._forward([PADDING_TOKEN] * num_tokens, [0] * num_tokens, [])

        def _forward(self, ids: list[int], positions: list[int], segments: list[packed_llama.Segment]) -> torch.Tensor:
            packed_llama.CONTEXT.segments = segments
            return self.model(torch.tensor(ids), torch.tensor(positions))

        def _update_states(self, scheduler_output: SchedulerOutput) -> None:
            for name in scheduler_output.finished_req_ids:
                self.requests.pop(name, None)
            for state in scheduler_output.scheduled_new_reqs:
                self.requests[state.req_id] = state
            for name, computed in scheduler_output.num_computed_tokens.items():
                self.requests[name].num_computed_tokens = computed
            self.input_batch.req_ids = list(scheduler_output.num_scheduled_tokens)
            for index, name in enumerate(self.input_batch.req_ids):
                self.input_batch.num_computed_tokens_cpu[index] = self.requests[name].num_computed_tokens
                self.input_batch.num_prompt_tokens[index] = len(self.requests[name].prompt_token_ids)

        def _prepare_inputs(self, scheduler_output: SchedulerOutput, num_scheduled_tokens: np.ndarray) -> None:
            ends = np.cumsum(num_scheduled_tokens)
            self.query_start_loc.np[1 : len(ends) + 1] = ends

    class SecondModelRunner:
        def __init__(self, vllm_config: Any) -> None:
            self.vllm_config = vllm_config

        def load_model(self) -> None:
            pass

    return SimpleNamespace(
        InputProcessor=InputProcessor, GPUModelRunner=GPUModelRunner, SecondModelRunner=SecondModelRunner
    )


def install(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Put fresh fakes under vLLM's names, and import the plugin's worker anew, as a worker process does."""
    classes = _classes()
    contents = {
        "vllm": {},
        "vllm.sampling_params": {"SamplingParams": SamplingParams},
        "vllm.v1": {},
        "vllm.v1.engine": {"EngineCoreRequest": EngineCoreRequest},
        "vllm.v1.engine.input_processor": {"InputProcessor": classes.InputProcessor},
        "vllm.v1.worker": {},
        "vllm.v1.worker.gpu": {},
        "vllm.v1.worker.gpu.model_runner": {"GPUModelRunner": classes.SecondModelRunner},
        "vllm.v1.worker.gpu_input_batch": {"CachedRequestState": CachedRequestState},
        "vllm.v1.worker.gpu_model_runner": {"GPUModelRunner": classes.GPUModelRunner},
    }
    for name, content in contents.items():
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delitem(sys.modules, "finesteer_vllm.worker", raising=False)
    return classes


@dataclass
class _Live:
    request: EngineCoreRequest
    computed: int = 0
    outputs: list[int] = field(default_factory=list)
    known: bool = False

    @property
    def tokens(self) -> list[int]:
        assert self.request.prompt_token_ids is not None
        return [*self.request.prompt_token_ids, *self.outputs]


class Engine:
    """Schedules requests: prompts in pieces, cached blocks shared by salt and tokens, requests put back on demand.

    Args:
        vllm: what `install` gave, with the plugin registered and its worker imported.
        config: of `vllm_config`.
        hf_model: the model.
        share: whether blocks are shared.
        rows, budget: most requests and tokens a batch.
    """

    def __init__(
        self, vllm: SimpleNamespace, config: Any, hf_model: Any, share: bool = True, rows: int = 4, budget: int = 16
    ) -> None:
        self.processor = vllm.InputProcessor(config)
        self.runner = vllm.GPUModelRunner(config, torch.device("cpu"), rows, budget)
        self.runner.load_model(hf_model)
        self.runner._dummy_run(budget)
        self.share, self.budget, self.rows = share, budget, rows
        self.waiting: list[_Live] = []
        self.running: list[_Live] = []
        self.finished: set[str] = set()
        self.answers: dict[str, list[int]] = {}
        self.hits = 0
        self._blocks: dict[tuple[Any, ...], dict[int, tuple[torch.Tensor, torch.Tensor]]] = {}

    def add(self, request_id: str, prompt: Any, max_tokens: int = 8, **extra_args: Any) -> None:
        """Submit a request, as an entry point does."""
        params = SamplingParams(max_tokens, extra_args or None)
        self.waiting.append(_Live(self.processor.process_inputs(request_id, prompt, params)))

    def run(self) -> dict[str, list[int]]:
        """Run until all are answered; gives the answers by id."""
        while self.waiting or self.running:
            self.step()
        return self.answers

    def put_back(self, request_id: str) -> None:
        """Take a running request's cache away, as happens when the cache is full."""
        live = next(live for live in self.running if live.request.request_id == request_id)
        self.running.remove(live)
        self.waiting.append(live)
        live.computed = 0
        del self.runner.caches[request_id]

    def step(self) -> None:
        """Schedule and run one batch."""
        left, scheduled, new = self.budget, {}, []
        while self.waiting and len(self.running) < self.rows:
            live = self.waiting.pop(0)
            live.computed, self.runner.caches[live.request.request_id] = self._found(live)
            self.running.append(live)
        for live in self.running:
            tokens = min(left, len(live.tokens) - live.computed)
            if not tokens:
                continue
            left -= tokens
            name = live.request.request_id
            scheduled[name] = tokens
            if not live.known:
                # The worker is another process: it has objects of its own.
                request = copy.deepcopy(live.request)
                new.append(CachedRequestState(name, request.prompt_token_ids, request.sampling_params, live.computed))
                live.known = True
        computed = {
            live.request.request_id: live.computed for live in self.running if live.request.request_id in scheduled
        }
        chosen = self.runner.execute_model(SchedulerOutput(scheduled, new, computed, self.finished))
        self.finished = set()
        for live in list(self.running):
            name = live.request.request_id
            live.computed += scheduled.get(name, 0)
            if name in chosen:
                live.outputs.append(chosen[name])
            self._keep(live)
            if len(live.outputs) == live.request.sampling_params.max_tokens:
                self.answers[name] = live.outputs
                self.running.remove(live)
                self.finished.add(name)
                del self.runner.caches[name]

    def _keys(self, live: _Live, tokens: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
        for end in range(BLOCK, tokens + 1, BLOCK):
            yield end, (live.request.cache_salt, *live.tokens[:end])

    def _found(self, live: _Live) -> tuple[int, dict[int, tuple[torch.Tensor, torch.Tensor]]]:
        """The longest cached beginning, never all of the tokens: the last one is always computed."""
        found: tuple[int, dict[int, tuple[torch.Tensor, torch.Tensor]]] = (0, {})
        if self.share:
            for end, key in self._keys(live, len(live.tokens) - 1):
                if key not in self._blocks:
                    break
                found = end, dict(self._blocks[key])
        self.hits += found[0]
        return found

    def _keep(self, live: _Live) -> None:
        cache = self.runner.caches[live.request.request_id]
        for end, key in self._keys(live, live.computed):
            self._blocks.setdefault(
                key, {block: (keys[:, :end], values[:, :end]) for block, (keys, values) in cache.items()}
            )
