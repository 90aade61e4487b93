"""`wkv generate` and `wkv chat` on a saved tiny model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import wkv
from tests.inference.helpers import tiny_model
from wkv.cli import app
from wkv.cli.chat import talk
from wkv.errors import WkvError
from wkv.inference import Chat, Sampler, generate
from wkv.inference.engine import Engine
from wkv.state import State


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    wkv.save_model(tiny_model(), path)
    return str(path)


def run(*arguments: object, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)


def made(*arguments: object, stdin: str | bytes | None = None) -> Result:
    result = run(*arguments, stdin=stdin)
    assert result.exit_code == 0, result.output
    return result


def failed(*arguments: object, stdin: str | None = None) -> str:
    result = run(*arguments, stdin=stdin)
    assert isinstance(result.exception, WkvError), result.output
    return str(result.exception)


def test_text_is_streamed_and_speed_reported(model_file: str) -> None:
    expected = generate(tiny_model(), "Hello", 9, Sampler(temperature=0)).text
    result = made("generate", model_file, "Hello", "--max-tokens", 9, "--temperature", 0)
    assert result.stdout == expected + "\n"
    assert "9 tokens in" in result.stderr
    assert "tokens/s (after 5 prompt tokens)" in result.stderr
    waited = made("generate", model_file, "Hello", "--max-tokens", 9, "--temperature", 0, "--no-stream")
    assert waited.stdout == result.stdout


def test_every_sampling_option_arrives(model_file: str) -> None:
    sampler = Sampler(0.9, 30, 0.95, 0.01, 0.97, 0.3, 0.4, seed=11)
    expected = generate(tiny_model(), "Hello", 20, sampler, stop=["e", "zz"])
    options: list[object] = ["--max-tokens", 20, "--temperature", 0.9, "--top-k", 30, "--top-p", 0.95, "--min-p", 0.01]
    options += ["--typical-p", 0.97, "--presence-penalty", 0.3, "--frequency-penalty", 0.4, "--seed", 11]
    options += ["--stop", "e", "--stop", "zz", "--tokenizer", "bytes", "--dtype", "float32", "--device", "cpu"]
    found = json.loads(made("generate", model_file, "Hello", *options, "--json").stdout)
    assert found["tokens"] == expected.tokens
    assert found["text"] == expected.text
    assert found["finish_reason"] == expected.finish_reason


def test_several_continuations_and_logprobs(model_file: str) -> None:
    result = made("generate", model_file, "Hi", "--max-tokens", 4, "-n", 3, "--seed", 1, "--logprobs", 2)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert len({tuple(line["tokens"]) for line in lines}) == 3
    assert [len(line["top_logprobs"]) for line in lines] == [4, 4, 4]
    assert len(lines[0]["top_logprobs"][0]) == 2
    plain = made("generate", model_file, "Hi", "--max-tokens", 4, "--num", 2, "--seed", 1).stdout
    assert plain.startswith("--- 1 of 2 ---\n" + lines[0]["text"])
    assert "--- 2 of 2 ---\n" + lines[1]["text"] in plain


def test_the_prompt_may_come_from_a_pipe(model_file: str) -> None:
    options = ("--max-tokens", 5, "--temperature", 0)
    piped = made("generate", model_file, "-", *options, stdin="été\n".encode())
    assert piped.stdout == made("generate", model_file, "été\n", *options).stdout
    assert "after 6 prompt tokens" in piped.stderr


def test_states_are_saved_and_carried(model_file: str, tmp_path: Path) -> None:
    options = ("--temperature", 0, "--json")
    made("generate", model_file, "The beginning", "--max-tokens", 0, "--save-state", tmp_path / "s")
    rest = made("generate", model_file, " and so on", "--max-tokens", 6, "--state", tmp_path / "s", *options)
    whole = made("generate", model_file, "The beginning and so on", "--max-tokens", 6, *options)
    assert json.loads(rest.stdout)["tokens"] == json.loads(whole.stdout)["tokens"]
    made(
        "generate",
        model_file,
        "x",
        "-n",
        2,
        "--max-tokens",
        1,
        "--state",
        tmp_path / "s",
        "--save-state",
        tmp_path / "t",
    )
    assert State.load(tmp_path / "t").batch_size == 2


def test_errors_are_one_clear_line(model_file: str, tmp_path: Path) -> None:
    assert "temperature must be" in failed("generate", model_file, "x", "--temperature", -1)
    assert "there is no folder" in failed("generate", model_file, "x", "--save-state", tmp_path / "no" / "s")
    assert "no such state file" in failed("generate", model_file, "x", "--state", tmp_path / "none")
    assert "the prompt is empty" in failed("generate", model_file)
    assert "no tokenizer 'latin'" in failed("generate", model_file, "x", "--tokenizer", "latin")
    assert "dtype 'int3'" in failed("generate", model_file, "x", "--dtype", "int3")
    assert "nowhere" in failed("generate", tmp_path / "nowhere.pth", "x")
    assert "think must be one of" in failed("chat", model_file, "--think", "much")
    assert "template must be one of" in failed("chat", model_file, "--template", "raven")
    assert run("generate").exit_code == 2


def test_an_interrupt_ends_neatly(model_file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def interrupted(engine: Engine) -> Any:
        if len(engine.rows[0].choices) == 3:
            raise KeyboardInterrupt
        return step(engine)

    monkeypatch.setattr(Engine, "step", interrupted)
    result = run("generate", model_file, "Hello")
    assert result.exit_code == 130
    assert result.stderr == "\ninterrupted\n"
    conversation = Chat(wkv.load_model(model_file))
    monkeypatch.setattr("wkv.cli.chat.messages", lambda interactive: iter(["Hi", "/exit"]))
    talk(conversation, interactive=True)
    assert conversation.state is None


def test_a_conversation_from_a_pipe(model_file: str, tmp_path: Path) -> None:
    state = tmp_path / "with blank"
    lines = [
        "Hello",
        "",
        f"/save {state}",
        "Again",
        f"/load {state}",
        "Again",
        "/reset",
        "Hello",
        "/help",
        "/exit",
        "no",
    ]
    result = made("chat", model_file, "--max-tokens", 8, "--seed", 2, stdin="\n".join(lines))
    _, first, again, same, reset = result.stdout.split("Assistant: ")
    assert again == same
    assert reset.startswith(first)
    assert "/reset" in reset
    chat = Chat(
        tiny_model(), sampler=Sampler(top_p=0.85, presence_penalty=0.2, frequency_penalty=0.2, seed=2), max_tokens=8
    )
    assert first.strip() == chat.send("Hello").text
    assert State.load(state).batch_size == 1
    asked = made("chat", model_file, "--max-tokens", 8, "--seed", 2, "--template", "instruction", stdin="Hello")
    chat = Chat(tiny_model(), sampler=replace(chat.sampler, seed=2), max_tokens=8, template="instruction")
    assert asked.stdout.removeprefix("Assistant: ").strip() == chat.send("Hello").text != first.strip()


def test_conversation_errors(model_file: str, tmp_path: Path) -> None:
    chat = ("chat", model_file, "--max-tokens", 2)
    assert "there is no command /save-all" in failed(*chat, stdin="/save-all\n")
    assert "/load needs the name of a file" in failed(*chat, stdin="/load\n")
    assert "no conversation to save" in failed(*chat, stdin=f"/save {tmp_path / 's'}\n")
    assert "cannot be written" in failed(*chat, stdin=f"Hi\n/save {tmp_path / 'no' / 's'}\n")
    assert made(*chat, stdin="").stdout == ""


def test_a_terminal_shows_errors_and_goes_on(
    model_file: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = iter(["/nonsense", " ", "Hi"])

    def typed(self: object, prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("rich.console.Console.input", typed)
    conversation = Chat(wkv.load_model(model_file), max_tokens=2)
    talk(conversation, interactive=True)
    shown = capsys.readouterr()
    assert "error: there is no command /nonsense" in shown.err
    assert "Type a message, or /help." in shown.out
    assert conversation.state is not None
