"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from finesteer_hf.serving.engine import Engine


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The counters of one server, in a registry of its own.

    Args:
        engine: whose queue is shown.
    """

    def __init__(self, engine: Engine) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"finesteer_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str) -> Histogram:
            return Histogram(f"finesteer_{name}", text, labels, registry=self.registry, buckets=SECONDS)

        def gauge(name: str, text: str, value: Any) -> None:
            Gauge(f"finesteer_{name}", text, registry=self.registry).set_function(value)

        self.requests = counter(
            "requests", "Requests by path and HTTP status; 499: the client hung up.", "path", "status"
        )
        self.seconds = histogram("request_seconds", "From a request's first byte to its answer's last.", "path")
        self.first = histogram("first_token_seconds", "From submission to the first token.")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self.completion_tokens = counter("completion_tokens", "Generated tokens.")
        self.decisions = counter("steering_decisions", "Requests for which an adapter decided.", "adapter")
        self.fired = counter("steering_fired", "Those in which it steered.", "adapter")
        gauge("up", "1 while the engine's thread runs.", lambda: float(engine.alive))
        gauge("answers_in_flight", "Answers that are waited for.", lambda: engine.in_flight)
        gauge("requests_waiting", "Requests in the engine's queue.", lambda: engine.queue_length()[0])
        gauge("requests_active", "Requests in the engine's batches.", lambda: engine.queue_length()[1])

    def note(self, path: str, status: int, seconds: float, log: dict[str, Any]) -> None:
        """Count a request that has ended, from what is logged of it."""
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)
        self.prompt_tokens.inc(log.get("prompt_tokens", 0))
        self.completion_tokens.inc(log.get("completion_tokens", 0))
        if log.get("first_token_seconds") is not None:
            self.first.observe(log["first_token_seconds"])
        for reports in log.get("steering", ()):
            for adapter, report in reports.items():
                self.decisions.labels(adapter).inc()
                if report["fired"]:
                    self.fired.labels(adapter).inc()

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self.registry)
