"""Who can be asked, what options there are, and scripted answers."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from recipes_minigpt4.llm.client import (
    Answer,
    ClientOptions,
    Failure,
    Request,
    add_client_options,
    client_options,
    open_client,
)
from recipes_minigpt4.llm.options import OPTIONS
from recipes_minigpt4.utils.command_line import CommandParser
from recipes_minigpt4.utils.errors import RecipeError


def ask(text: str, **sampling: object) -> Request:
    return Request(({"role": "user", "content": text},), **sampling)  # type: ignore[arg-type]


def script(folder: Path, *lines: object) -> str:
    (folder / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return f"stub:{folder / 'answers.jsonl'}"


# ---- scripted answers ----------------------------------------------------------------------------------------------


def test_the_first_line_that_fits_answers(tmp_path: Path) -> None:
    spec = script(
        tmp_path,
        {"match": "never", "failure": "I will not"},
        {"match": r"mend: (.*) and (\w+)", "answer": r"\2, \1."},
        {"match": "any.thing", "answer": "yes"},
    )
    client = open_client(spec)
    requests = [ask("mend: a\nsquare and b"), ask("never"), ask("any\nthing"), ask("else")]
    requests.append(ask("mend: a b c and d", max_tokens=2))
    got = dict(client.ask(requests))
    assert got[0] == Answer("b, a\nsquare.", 5, 3, finish_reason="stop")
    assert got[1] == Failure("I will not", 1)
    assert got[2].text == "yes" and got[3] == Failure("no line of answers.jsonl fits", 1)
    assert (got[4].text, got[4].finish_reason) == ("d, a", "length")


def test_another_script_is_another_client(tmp_path: Path) -> None:
    options = ClientOptions(cache=tmp_path / "kept")
    first = open_client(script(tmp_path, {"answer": "one"}), options)
    assert [answer.text for _, answer in first.ask([ask("a")])] == ["one"]
    second = open_client(script(tmp_path, {"answer": "two"}), options)
    assert [answer.text for _, answer in second.ask([ask("a")])] == ["two"]
    assert first.name != second.name and first.name.startswith("stub:answers.jsonl@")


@pytest.mark.parametrize(
    "line", ["yes", "[1]", "{}", '{"answer": 5}', '{"answer": "a", "failure": "b"}', '{"answer": "a", "if": "b"}',
             '{"match": "(", "answer": "a"}', '{"match": 3, "answer": "a"}']
)  # fmt: skip
def test_a_line_that_is_none_is_told(tmp_path: Path, line: str) -> None:
    (file := tmp_path / "answers.jsonl").write_text(f'{{"answer": "a"}}\n\n{line}\n')
    with pytest.raises(RecipeError, match=r"^Line 3 of \S+ is no scripted answer; write \{\"answer\""):
        open_client(f"stub:{file}")


def test_a_script_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"^stub:\S+none cannot be read \(No such file or directory\); name a JSONL"):
        open_client(f"stub:{tmp_path / 'none'}")
    with pytest.raises(
        RecipeError, match=r"^An answer of answers\.jsonl names a group that is not there \(invalid group"
    ):
        list(open_client(script(tmp_path, {"answer": r"\3"})).ask([ask("a")]))


@pytest.mark.parametrize("spec", ["", "gpt-4", "openai", "openai:", "human:me", "https://host/v1"])
def test_nobody_is_told(spec: str) -> None:
    with pytest.raises(RecipeError, match=rf"^'{spec}' names nobody who could answer; write local:FOLDER_OR_REPO,"):
        open_client(spec)


# ---- options --------------------------------------------------------------------------------------------------------


def read(*arguments: str, prefix: str = "judge_") -> ClientOptions:
    parser = CommandParser()
    add_client_options(parser, prefix)
    return client_options(parser.parse_args(arguments), prefix)


def test_options_have_the_defaults_of_the_client() -> None:
    assert read() == ClientOptions(prefix="judge_") and read(prefix="") == ClientOptions()


def test_options_are_read() -> None:
    got = read("--judge_max_cost=2.5", "--judge-concurrency", "3", "--judge_cache", "kept", "--judge_timeout", "1.5")
    assert got == ClientOptions(max_cost=2.5, concurrency=3, cache=Path("kept"), timeout=1.5, prefix="judge_")


@pytest.mark.parametrize(
    "argument, told",
    [
        ("--judge_concurrency=0", "'0' is not a whole number from 1 on"),
        ("--judge_attempts=1.5", "'1.5' is not a whole number from 1 on"),
        ("--judge_max_cost=nan", "'nan' is not a number above 0"),
        ("--judge_price_per_million_prompt_tokens=-1", "'-1' is not a number from 0 on"),
    ],
)
def test_numbers_out_of_range_are_told(argument: str, told: str) -> None:
    with pytest.raises(RecipeError, match=f"{argument.partition('=')[0]}: {told}"):
        read(argument)


def test_the_page_tells_every_option() -> None:
    page = (Path(__file__).parents[3] / "recipes" / "llm" / "README.md").read_text(encoding="utf-8")
    assert [option.name for option in OPTIONS if f"`{option.name}`" not in page] == []


def test_help_needs_no_library() -> None:
    """Reading the options and the help of a command imports neither torch nor openai."""
    parser = argparse.ArgumentParser(prog="x")
    add_client_options(parser, "judge_")
    shown = parser.format_help()
    assert "--judge_api_key_env" in shown and "default: OPENAI_API_KEY for OpenAI itself" in " ".join(shown.split())
    code = "import sys, recipes_minigpt4.llm.client; print({'torch', 'openai', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
