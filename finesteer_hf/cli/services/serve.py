"""`finesteer serve`: the OpenAI API over a steered model."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import time
from typing import Annotated, Any

import typer

from finesteer_hf.cli.common import load, say
from finesteer_hf.cli.options import LOAD, assignments, takes


# transformers sizes the cache for a GPU that does nothing else: on a CPU it would take most of the memory, and fill pages
# of 256 tokens for a moment.
ON_A_CPU = {"page_size": 32, "max_batch_tokens": 512, "max_memory_percent": 0.1}

# Of a model's own generation config, what `generate` applies and a request cannot ask for.
NOT_APPLIED = (
    "bad_words_ids",
    "begin_suppress_tokens",
    "forced_bos_token_id",
    "min_length",
    "min_new_tokens",
    "no_repeat_ngram_size",
    "repetition_penalty",
    "sequence_bias",
    "suppress_tokens",
)


@takes(loading=dataclasses.replace(LOAD, without=("steering", "steering_revision")))
def serve(
    model: Annotated[str, typer.Argument(help="Base model: Hub id, folder, or `playground`.")],
    steering: Annotated[
        list[str] | None,
        typer.Option(
            "--steering", "-s", help="name=adapter or name@version=adapter: a folder or Hub id; may be repeated."
        ),
    ] = None,
    default: Annotated[
        list[str] | None,
        typer.Option(help="name or name=scale: steers requests that say nothing of steering; may be repeated."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="The base model's name in requests; by default MODEL as given.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Most tokens of prompt and answer; by default what model and cache hold.")
    ] = None,
    max_body: Annotated[int, typer.Option(min=1024, help="Most bytes of a request's body.")] = 1 << 20,
    max_requests: Annotated[int, typer.Option(min=1, help="Most answers in flight, waiting ones included.")] = 256,
    max_per_client: Annotated[
        int | None, typer.Option(min=1, help="Most answers in flight of one address; by default no limit.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0, help="How long running requests may take after SIGTERM.")
    ] = 30.0,
    batching: Annotated[
        list[str] | None,
        typer.Option(
            "--batching", help="A field of transformers' ContinuousBatchingConfig, name=value; may be repeated."
        ),
    ] = None,
    tp: Annotated[bool, typer.Option("--tp", help="Tensor parallel, under torchrun: rank 0 answers.")] = False,
    *,
    loading: dict[str, Any],
) -> None:
    """Answer many at once behind the OpenAI API.

    Requests choose their steering by model name (base, base:adapter, base:adapter@version) or by the fields steering and
    steering_scale. Keys come from the environment: FINESTEER_API_KEY for requests, FINESTEER_ADMIN_TOKEN for loading
    adapters at run time, which is off without it.
    """
    from finesteer_hf.serving.http import require_packages

    require_packages()
    from finesteer_hf.serving.http.app import ServerSettings, create_app
    from finesteer_hf.serving.http.guard import Keys
    from finesteer_hf.serving.http.logs import log_to_stderr
    from finesteer_hf.serving.http.server import DrainingServer, bound

    keys = Keys.from_environment()
    adapters = [adapter_of(text) for text in steering or []]
    scales = default_scales(default or [], [found[0] for found in adapters])
    if tp and "RANK" not in os.environ:
        raise ValueError("--tp needs processes: torchrun --nproc-per-node N -m finesteer_hf serve MODEL --tp ...")
    # Before the model is loaded, which may take minutes.
    listening = bound(host, port) if not tp or os.environ["RANK"] == "0" else None
    engine = make_engine(*load(model, tp, **loading), batching or [], max_length)
    for setting in not_applied(engine.model.generation_config):
        say(f"warning: the model's generation config sets {setting}, which requests to this server go without.")
    for own, version, source in adapters:
        engine.catalogue.add(own, source, version)
    log_to_stderr()
    if listening is None:
        follow(engine)
        return
    settings = ServerSettings(name or model, scales, max_body, max_requests, max_per_client)
    app = create_app(engine, settings, keys, changeable=not tp)
    server = DrainingServer(app, engine, listening, drain_seconds)
    if host not in ("127.0.0.1", "localhost", "::1") and keys.api is None:
        say("warning: without FINESTEER_API_KEY anyone who reaches this address is answered.")
    asyncio.run(server.run_engine_and_serve(lambda at: say(f"{settings.name} at {at}/v1; process {os.getpid()}")))


def follow(engine: Any) -> None:
    """Be a rank that computes its share until rank 0, which is sent the signals too, says that it is over."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    engine.manager.start()
    engine.manager.join(time.perf_counter())


def make_engine(model: Any, tokenizer: Any, batching: list[str], max_length: int | None) -> Any:
    """The engine of a model, with settings of how requests are packed.

    Raises:
        ValueError: for a setting that transformers does not have, or a model that cannot be packed.
    """
    from transformers import ContinuousBatchingConfig

    from finesteer_hf.serving.engine import Engine

    known = [field.name for field in dataclasses.fields(ContinuousBatchingConfig)]
    given = assignments("--batching", batching, known)
    usual = ON_A_CPU if model.device.type == "cpu" else {}
    config = ContinuousBatchingConfig(**{**usual, **given})
    return Engine(model, tokenizer, batching=config, max_length=max_length)


def not_applied(config: Any) -> list[str]:
    """What a model's generation config sets and no request can ask for."""
    given = config.to_diff_dict()
    return [f"{name}={given[name]}" for name in NOT_APPLIED if given.get(name) is not None]


def adapter_of(text: str) -> tuple[str, str | None, str]:
    """Name, version and source of `name=source` or `name@version=source`.

    Raises:
        ValueError: for a text of another form.
    """
    label, equals, source = text.partition("=")
    name, at, version = label.partition("@")
    if not (equals and name and source and bool(at) == bool(version)):
        raise ValueError(f"--steering {text!r}: write name=adapter or name@version=adapter.")
    return name, version or None, source


def default_scales(texts: list[str], names: list[str]) -> dict[str, float]:
    """Adapters with their scales of `name` or `name=scale` texts.

    Raises:
        ValueError: for a name that is not given with `--steering`, or a scale that is no number.
    """
    scales: dict[str, float] = {}
    for text in texts:
        name, equals, scale = text.partition("=")
        if name.partition("@")[0] not in names:
            raise ValueError(f"--default {text!r}: name one of --steering: {', '.join(names) or 'none is given'}.")
        try:
            scales[name] = float(scale) if equals else 1.0
        except ValueError as error:
            raise ValueError(f"--default {text!r}: {scale!r} is no number.") from error
    return scales
