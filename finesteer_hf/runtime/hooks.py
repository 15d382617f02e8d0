"""The hooks: one at each site, one on the decoder.

They use the calling thread's session (inside a compiled graph: `CompiledSteering`) and do nothing without one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finesteer_hf.runtime.current import current_session
from finesteer_hf.runtime.gradient_checkpointing import steer_checkpoints
from finesteer_hf.sites import BACK, Site, attention_of, stream_of, with_stream


if TYPE_CHECKING:
    from finesteer_hf.runtime.call import SteeringRuntime


class DecoderHook:
    """Starts a forward on the call's session; a plain forward without a session gets one.

    It sits on the decoder, not on the model: PEFT calls a model's `forward` directly and accelerate replaces it, but
    both call the decoder as a module.
    """

    def __init__(self, runtime: SteeringRuntime) -> None:
        self.runtime = runtime

    def before(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if torch.compiler.is_compiling():
            self.runtime.compiled.begin_forward(args, kwargs)
            return None
        session = current_session(self.runtime)
        if session is not None and session.of_forward and not session.runs_ahead:
            # Left over from an interrupted forward: the hook after a forward runs for errors, not for interrupts.
            session.__exit__()
            session = None
        if session is None:
            session = self.runtime.plain_forwards.session(args, kwargs)
            if session is None:
                return None
            session.__enter__()
            session.of_forward = True
        if module.training and torch.is_grad_enabled():
            steer_checkpoints((module, *self.runtime.tower.layers))
        session.begin_forward(args, kwargs)
        return None

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling():
            self.runtime.compiled.end_forward()
            return
        session = current_session(self.runtime)
        if session is None or session.runs_ahead:
            return
        if session.of_forward:
            session.__exit__()
        session.end_forward(output, module.training)
        if session.of_forward:
            self.runtime.plain_forwards.keep(session, output)

    def register(self, decoder: nn.Module) -> list[Any]:
        """Put the hook on a decoder and return its handles."""
        return [
            decoder.register_forward_pre_hook(self.before, prepend=True, with_kwargs=True),
            # Also called after an exception: a failed forward leaves no session behind.
            decoder.register_forward_hook(self.after, always_call=True),
        ]


class SiteHook:
    """Passes the stream at one site to the session and replaces it by what the session returns."""

    def __init__(self, runtime: SteeringRuntime, site: Site, module: nn.Module) -> None:
        self.runtime = runtime
        self.site = site
        self.module = module
        self.width = runtime.tower.width(site)
        self.references = 0

    def entering(self, module: nn.Module, args: tuple[Any, ...]) -> Any:
        """For sites at a module's input."""
        steered = self._visit(args)
        return None if steered is None else with_stream(args, steered)

    def leaving(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """For sites at a module's output."""
        steered = self._visit(output)
        return None if steered is None else with_stream(output, steered)

    def looking(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """For attention weights, which are only read."""
        session = None if torch.compiler.is_compiling() else current_session(self.runtime)
        if session is None or session.forward is None:
            return
        shown = attention_of(output, self.site, self.width // BACK, session.forward.past)
        if session.visit(self.site, shown) is not None:
            raise ValueError(f"{self.site} can be read but not written: steer another site.")

    def _visit(self, value: Any) -> torch.Tensor | None:
        if torch.compiler.is_compiling():
            return self.runtime.compiled.visit(self.site, stream_of(value, self.site, self.width))
        session = current_session(self.runtime)
        if session is None:
            return None
        return session.visit(self.site, stream_of(value, self.site, self.width))

    def register(self, module: nn.Module) -> Any:
        """Put the hook on the site's module and return its handle."""
        if self.site.kind == "attention":
            return module.register_forward_hook(self.looking)
        if self.site.kind == "resid_post":
            # First of the module's hooks: transformers records `hidden_states` in later hooks, which then see the
            # steered stream.
            return module.register_forward_hook(self.leaving, prepend=True)
        return module.register_forward_pre_hook(self.entering)
