"""`finesteer chat`: turns, slash commands, streaming, ctrl-C."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
import typer
from evaluation_toys import half_plane_adapter
from rich.console import Console
from typer.testing import CliRunner

from finesteer_hf import SteeredModelForCausalLM
from finesteer_hf.cli.asking import slash, terminal
from finesteer_hf.cli.asking.chat import named_source, named_sources
from finesteer_hf.cli.asking.session import ChatSession, Turns
from finesteer_hf.cli.asking.streaming import Wrapping, stream_answer
from finesteer_hf.cli.commands import app
from finesteer_hf.evaluation.measures.generation import greedy_answers
from finesteer_hf.evaluation.measures.prompts import as_chat, encode_prompt


GREEDY = {"do_sample": False}


@pytest.fixture
def steered(model: Any, half_plane: None) -> Any:
    """A model with an adapter that opens its gate, `on`, and one that does not, `shut`."""
    made = SteeredModelForCausalLM.from_model(model)
    for name, sign in (("on", 1.0), ("shut", -1.0)):
        states = made(torch.tensor([[5, 9]]), output_hidden_states=True).hidden_states[2][0, -1].detach()
        made.load_steering(half_plane_adapter(sign * states, hidden_size=32, num_hidden_layers=3), name)
    made.set_steering(None)
    return made


@pytest.fixture
def session(steered: Any, tokenizer: Any) -> ChatSession:
    return ChatSession(Turns(steered, tokenizer, None, 6, GREEDY), active="on")


@pytest.fixture
def folders(model: Any, tokenizer: Any, half_plane: None, tmp_path: Path) -> tuple[str, str]:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    tokenizer.save_pretrained(base)
    half_plane_adapter(torch.ones(32), hidden_size=32, num_hidden_layers=3).save_pretrained(adapter)
    return str(base), str(adapter)


def asked(session: ChatSession, text: str) -> list[Any]:
    return list(session.ask(text, lambda steering: lambda piece: None))


@pytest.mark.parametrize("steering", [None, "on"])
def test_a_streamed_answer_is_the_one_of_generate(steered: Any, tokenizer: Any, steering: str | None) -> None:
    chat = as_chat("tell me about cats")
    pieces: list[str] = []
    answer = stream_answer(
        steered,
        tokenizer,
        encode_prompt(tokenizer, chat),
        steering=steering,
        scale=1.5,
        show=pieces.append,
        max_new_tokens=6,
        **GREEDY,
    )
    expected = greedy_answers(steered, tokenizer, [chat], max_new_tokens=6, steering=steering, steering_scale=1.5)
    assert answer.text == expected.texts[0] == "".join(pieces).strip()
    assert answer.tokens == len(expected.ids[0]) and not answer.stopped
    gate = expected.steering.get("on", {}).get("gate")
    assert answer.gate == (None if gate is None else float(gate[0]))


def test_an_error_of_generate_reaches_the_caller(steered: Any, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="not loaded"):
        stream_answer(steered, tokenizer, [5, 9], steering="missing", max_new_tokens=2)


def test_a_stopped_answer_ends_at_its_next_token(steered: Any, tokenizer: Any) -> None:
    stop = Event()
    answer = stream_answer(
        steered, tokenizer, [5, 9], show=lambda piece: stop.set(), stop=stop, max_new_tokens=200, **GREEDY
    )
    assert answer.stopped and answer.tokens < 150


def test_the_conversation_goes_through_the_template_and_on_from_the_last_answer(
    session: ChatSession, tokenizer: Any
) -> None:
    session.compare = True
    unsteered, steered = asked(session, "tell me about cats")
    assert (unsteered.steering, steered.steering) == (None, "on") and unsteered.gate is None
    messages = [
        {"role": "user", "content": "tell me about cats"},
        {"role": "assistant", "content": steered.text},
    ]
    assert session.turns.messages == messages
    asked(session, "sing a song")
    assert (
        session.turns.ids()[: len(tokenizer.apply_chat_template(messages)["input_ids"])]
        == (tokenizer.apply_chat_template(messages)["input_ids"])
    )


def test_a_full_context_is_an_error_and_the_message_is_taken_back(session: ChatSession) -> None:
    with pytest.raises(ValueError, match="/reset"):
        asked(session, "cats " * 300)
    assert session.turns.messages == []
    # What is left of the context bounds the answer.
    session.turns.max_new_tokens = 10_000
    assert asked(session, "cats " * 240)[0].tokens < 20


def test_slash_commands_change_what_steers(session: ChatSession, folders: tuple[str, str]) -> None:
    for line, state in (
        ("/off", (None, 1.0, False)),
        ("/steer", ("on", 1.0, False)),
        ("/steer shut", ("shut", 1.0, False)),
        ("/scale -0.5", ("shut", -0.5, False)),
        ("/comp", ("shut", -0.5, True)),
        ("/compare", ("shut", -0.5, False)),
        (f"/steer third={folders[1]}", ("third", -0.5, False)),
    ):
        slash.run(session, line)
        assert (session.active, session.scale, session.compare) == state, line
    assert set(session.adapters) == {"on", "shut", "third"}
    asked(session, "sing a song")
    slash.run(session, "/reset")
    assert session.turns.messages == []
    with pytest.raises(slash.Quit):
        slash.run(session, "/exit")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/dance", "There are /steer, /scale"),
        ("/s", "There is no /s"),
        ("/steer nobody", "Loaded: on, shut"),
        ("/scale much", "it is 1 now"),
        ("/scale nan", "takes a number"),
        ("/off now", "takes nothing after it"),
    ],
)
def test_wrong_commands_say_what_there_is(session: ChatSession, line: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        slash.run(session, line)


def test_names_of_adapters() -> None:
    assert named_source("a=org/repo@v1") == ("a", "org/repo@v1")
    assert named_source("org/repo@v1") == ("repo", "org/repo@v1")
    for wrong in (["a=x", "a=y"], ["=x"], ["a="]):
        with pytest.raises(ValueError, match="--steering"):
            named_sources(wrong)


def test_a_pipe_is_answered_line_by_line(folders: tuple[str, str]) -> None:
    base, adapter = folders
    lines = "tell me about cats\n\n/compare\nsing a song\n/quit\nnever read\n"
    arguments = ["chat", base, "-s", f"a={adapter}", "--max-new-tokens", "4"]
    result = CliRunner().invoke(app, arguments, input=lines)
    assert result.exit_code == 0, result.output
    assert [line for line in result.stdout.splitlines() if line.endswith(":")] == ["unsteered:", "a:"]
    assert result.stderr.count("; gate ") == 2 and "a x 1" in result.stderr
    result = CliRunner().invoke(app, [*arguments, "--json"], input="tell me about cats\n/compare\nsing a song\n")
    first, second = map(json.loads, result.stdout.splitlines())
    assert first["prompt"] == "tell me about cats" and {"text", "gate", "tokens"} <= set(first["answers"][0])
    assert [answer["steering"] for answer in second["answers"]] == [None, "a"]
    # In a script, a wrong command ends it.
    result = CliRunner().invoke(app, arguments, input="/dance\nsing a song\n")
    assert result.exit_code == 1 and result.stdout == "" and "There is no /dance" in result.stderr


def test_a_model_without_a_template_is_refused(folders: tuple[str, str]) -> None:
    (Path(folders[0]) / "chat_template.jinja").unlink()
    result = CliRunner().invoke(app, ["chat", folders[0]], input="sing\n")
    assert result.exit_code == 1 and "generate" in result.stderr
    assert CliRunner().invoke(app, ["chat", folders[0], "--compare"], input="").exit_code == 1


def test_ctrl_c_stops_an_answer_and_twice_ends(session: ChatSession, monkeypatch: pytest.MonkeyPatch) -> None:
    session.turns.max_new_tokens = 200
    lines = iter(["tell me about cats\n", "\n"])
    shown: list[str] = []

    def read(loop: terminal.ChatLoop) -> str:
        line = next(lines, None)
        if line is None:
            os.kill(os.getpid(), signal.SIGINT)
            raise AssertionError("ctrl-C at the prompt raises KeyboardInterrupt")
        return line

    def show(wrapping: Wrapping, piece: str) -> None:
        if not shown:
            os.kill(os.getpid(), signal.SIGINT)
        shown.append(piece)

    monkeypatch.setattr(terminal.ChatLoop, "_read", read)
    monkeypatch.setattr(Wrapping, "__call__", show)
    usual = signal.getsignal(signal.SIGINT)
    with pytest.raises(typer.Exit) as ended:
        terminal.ChatLoop(session, as_json=False).run()
    assert ended.value.exit_code == 130
    assert 0 < len(shown) < 150 and session.turns.messages[1]["role"] == "assistant"
    assert signal.getsignal(signal.SIGINT) is usual


def test_lines_break_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    show = Wrapping(Console(width=12, force_terminal=True), indent=2)
    for piece in ("\n one", " two ", "three four\n", "five-and-six-and ", "  seven"):
        show(piece)
    show.end()
    text = capsys.readouterr().out
    assert text == "one two\n  three four\n  five-and-six-and\n  seven\n"
    show = Wrapping(Console(width=12, force_terminal=False))
    show("one two three four five")
    assert capsys.readouterr().out == "one two three four five"
