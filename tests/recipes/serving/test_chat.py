"""`minigpt4 chat`: replies that stream and stop, commands, pictures, several models, one question, a real terminal."""

import fcntl
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

from recipes_minigpt4 import cli
from recipes_minigpt4.serving import chat, chat_terminal
from recipes_minigpt4.serving import talk as talk_module
from recipes_minigpt4.serving.chat_session import Session
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.serving.options import REPLY_FIELDS
from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.talk import Talk


GREEDY = ReplySettings(temperature=0, max_new_tokens=6)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, scenes: list[Image.Image], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Pictures in the current folder, which is the user's home too."""
    for name, scene in zip(("a.png", "b c.png", "it's.png"), scenes[:3], strict=True):
        scene.save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def session(talkers: dict[str, Talker]) -> Session:
    """A chat with our model."""
    return Session({"ours": Talk(talkers["ours"])}, GREEDY)


@pytest.fixture
def type_lines(capsys: pytest.CaptureFixture[str]) -> Callable[..., list[str]]:
    """`type_lines(session, *lines)`: what is printed behind each line; an exception among them is raised instead."""

    def build(session: Session, *lines: str | type[BaseException]) -> list[str]:
        left, told = iter(lines), []

        def read(prompt: str) -> str:
            assert prompt == "> "
            told.append(capsys.readouterr().out)
            line = next(left, EOFError)
            if isinstance(line, str):
                return line
            raise line

        chat.converse(session, read)
        assert next(left, None) is None, "it has ended too early"
        return [text.rstrip("\n") for text in told[1:]]

    return build


def said(session: Session, label: str = "ours") -> list[str]:
    messages = session.talks[label].conversation.messages
    return [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]


def pictures_in(session: Session, label: str = "ours") -> list[int]:
    """How many pictures came with each question."""
    messages = session.talks[label].conversation.messages
    return [sum(part["type"] == "image" for part in one["content"]) for one in messages if one["role"] == "user"]


# ---- a chat ---------------------------------------------------------------------------------------------------------


def test_a_chat_with_pictures_of_later_turns(session, type_lines, talkers, scenes) -> None:
    told = type_lines(session, "/image a.png", "What is this?", "/image 'b c.png' it\\'s.png", "And these?", "Where?")
    assert told[0] == "With your next question: a.png (96 × 96)"
    assert told[2] == "With your next question: b c.png (96 × 96), it's.png (96 × 96)"
    assert pictures_in(session) == [1, 2, 0]
    assert [told[1], told[3], told[4]] == said(session)[1::2]
    alone = Talk(talkers["ours"])
    expected = "".join(alone.ask("What is this?", scenes[:1], GREEDY))
    assert expected == told[1] and "".join(alone.ask("And these?", scenes[1:3], GREEDY)) == told[3]


@pytest.mark.parametrize(
    "line, names",
    [
        ("/image b c.png", ["b c.png"]),
        ("/image b\\ c.png", ["b c.png"]),
        ("/image ~/a.png", ["~/a.png"]),
        ('/image "it\'s.png" a.png', ["it's.png", "a.png"]),
        ("/image it's.png", ["it's.png"]),
        ("HERE/a.png", ["HERE/a.png"]),  # dragged into the terminal
        ("'HERE/b c.png' HERE/a.png", ["HERE/b c.png", "HERE/a.png"]),
        ("HERE/b\\ c.png", ["HERE/b c.png"]),
        ("file://HERE/a.png", ["HERE/a.png"]),
    ],
)
def test_pictures_are_named_as_terminals_write_them(line, names, session, type_lines, folder: Path) -> None:
    type_lines(session, line.replace("HERE", str(folder)))
    assert list(session.waiting) == [name.replace("HERE", str(folder)) for name in names]


def test_a_reply_comes_piece_by_piece(session, monkeypatch) -> None:
    written: list[str] = []

    class Terminal(io.StringIO):
        def flush(self) -> None:
            written.append(self.getvalue())

    monkeypatch.setattr(sys, "stdout", Terminal())
    session.ask("Go on.")
    reply = said(session)[-1]
    assert written[-1] == f"{reply}\n" and len(set(written)) > 4
    assert all(reply.startswith(text) for text in written[:-1])


def test_turns_are_made_again_and_taken_back(session, type_lines) -> None:
    lines = ("/image a.png", "One?", "Two?", "/retry", "/undo", "/undo 2", "/retry", "/reset", "/undo")
    told = type_lines(session, *lines)
    assert told[2] == told[3] != ""
    assert told[5] == "2 turns cannot be taken back; the chat has 1."
    assert told[6] == told[1]
    assert told[8] == "There is no turn to take back."
    assert said(session) == [] and session.exchanges == []
    assert type_lines(session, "/retry") == ["There is no question to ask once more; ask one first."]


def test_settings_are_shown_and_set(session, type_lines) -> None:
    told = type_lines(session, "/set", "/set temperature=0.7 beams=2 seed=3", "Hm?", "/retry", "/set seed=none")
    assert told[0].startswith("temperature=0 top_p=0.9 num_beams=1 ") and told[0].endswith("seed=None")
    assert session.settings == ReplySettings(temperature=0.7, num_beams=2, max_new_tokens=6)
    assert told[2] == told[3] == said(session)[-1]
    assert type_lines(session, "/set max_new_tokens=1", "/stats", "Hm?")[2].count(" 1 answered") == 1


def test_the_options_are_those_of_the_original_demo() -> None:
    """The command line knows the fields of `ReplySettings` and their defaults without importing torch."""
    assert {name: field[2] for name, field in REPLY_FIELDS.items()} == vars(ReplySettings())
    args = chat.parse(["x", "--temperature", "0.5", "--num_beams", "4"])
    assert ReplySettings.of(args) == ReplySettings(temperature=0.5, num_beams=4)


@pytest.mark.parametrize(
    "line, told",
    [
        ("/fly", "There is no command /fly; /help lists all."),
        ("/image", "Name a picture: /image photo.jpg; quote a name with spaces."),
        ("/image no.png", "no.png: there is no such file."),
        ("/image a.png no.png", "no.png: there is no such file."),
        ("/image .", ".: it is no file."),
        ("/image notes.txt", "No image could be read from 'notes.txt' (it is in no format that Pillow knows)."),
        ("/image 'a.png", "'a.png: there is no such file."),
        ("/set temperature=hot", "temperature=hot: it has to be a number from 0 on."),
        ("/set temperature=-1", "temperature=-1: it has to be a number from 0 on."),
        ("/set seed=nan", "seed=nan: it has to be a whole number from 0 to 4294967295, or none."),
        ("/set beams=2 top_p=2", "top_p=2: it has to be a number from 0 to 1."),
        ("/set speed=2", "speed=2 sets nothing; write NAME=VALUE"),
        ("/set temperature", "temperature sets nothing; write NAME=VALUE"),
        ("/undo all", "/undo takes a number of turns, and 'all' is none."),
        ("/undo", "There is no turn to take back."),
        ("/save", "Name one file: /save chat.json; quote a name with spaces."),
        ("/save notes.txt", "notes.txt is there already, and no chat; name another file."),
        ("/save no/where.json", "no/where.json cannot be written (No such file or directory); name another file."),
        ("/load notes.txt", "notes.txt holds no chat; name a file that /save wrote."),
        ("/load no.json", "no.json cannot be read (No such file or directory); name a file that /save wrote."),
        ("x " * 600, "The chat has "),
    ],
)
def test_a_mistake_costs_a_sentence_and_the_chat_goes_on(line, told, session, type_lines, folder: Path) -> None:
    printed, after = type_lines(session, line, "Still there?")
    assert printed.startswith(told) and "\n" not in printed and printed.endswith(".")
    assert after == said(session)[-1] and pictures_in(session) == [0]
    assert session.settings == GREEDY and (folder / "notes.txt").read_text() == "no picture"


def test_help_tells_every_command(session, type_lines) -> None:
    (told,) = type_lines(session, "/help")
    assert set(re.findall(r"^/\w+", told, re.MULTILINE)) == {*chat.Commands(session).names, "/exit"}
    assert max(map(len, told.splitlines())) < 80
    assert type_lines(session, "", "   ") == ["", ""] and type_lines(session, "/exit") == []


def test_stats_tell_tokens_and_time(session, type_lines) -> None:
    session.stats = True
    told = type_lines(session, "/image a.png", "What?", "And?", "/stats", "Now?")
    reply, stats = told[1].splitlines()
    (turn, second, _) = session.talks["ours"].conversation.turns
    assert reply == said(session)[1] and re.search(r"encoded; [\d.]+ s, [\d.]+ tokens/s\]$", stats)
    assert stats.startswith(
        f"[{turn.prompt_tokens} tokens asked, {turn.new_tokens} answered, {turn.computed_tokens} computed; 1 picture "
    )
    assert "; 0 pictures encoded;" in told[2] and second.computed_tokens < second.prompt_tokens
    assert told[3:] == ["Tokens and time are told no longer.", said(session)[-1]]


# ---- Ctrl-C ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c_after(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`ctrl_c_after(*tokens)`: press Ctrl-C behind these tokens of every reply, which has as many as it likes."""

    def build(*tokens: int) -> None:
        stops = talk_module.Stopped.__call__

        def press(criterion, input_ids, scores, **kwargs):
            criterion.calls = getattr(criterion, "calls", 0) + 1
            if criterion.calls in tokens:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.05)  # until Python has noticed
            return stops(criterion, input_ids, scores, **kwargs)

        monkeypatch.setattr(talk_module.Stopped, "__call__", press)

    return build


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("beams", [1, 2])
def test_ctrl_c_stops_a_reply_and_what_was_said_stays(beams, session, type_lines, ctrl_c_after) -> None:
    ctrl_c_after(4)
    told = type_lines(session, "/image a.png", f"/set max_new_tokens=200 beams={beams}", "Describe it.", "/undo")
    assert told[2] and said(session) == []
    told = type_lines(session, "Describe it.", "Go on.")
    assert [told[0], told[1]] == said(session)[1::2]
    turns = session.talks["ours"].conversation.turns
    assert [turn.new_tokens for turn in turns] == [4, 4] if beams == 1 else max(t.new_tokens for t in turns) < 9


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_at_the_prompt_ends_if_it_comes_twice(session, type_lines) -> None:
    told = type_lines(session, KeyboardInterrupt, "/stats", KeyboardInterrupt, KeyboardInterrupt)
    assert told[0] == "\nCtrl-C once more ends; so do Ctrl-D and /exit." == told[2]


# ---- several models -------------------------------------------------------------------------------------------------


def test_models_are_compared(talkers, type_lines, scenes) -> None:
    session = Session({"ours": Talk(talkers["ours"]), "b": Talk(talkers["blip2"])}, GREEDY, stats=True)
    told = type_lines(session, "Hm?", "/image a.png", "What is it?", "/retry", "/undo", "/undo")
    (first, _, second), lines = told[0].splitlines(), told[2].splitlines()
    assert first.startswith("ours: ") and second == "b: This model answers questions about pictures only; give it one."
    alone = "".join(Talk(talkers["blip2"]).ask("What is it?", scenes[:1], GREEDY))
    assert lines[0].startswith("ours: ") and lines[2] == f"b: {alone}" and lines[3].startswith("[")
    assert told[3].splitlines()[0] == lines[0] and told[3].splitlines()[2] == lines[2]
    assert told[4:] == ["Taken back, and a.png with it.", ""] and session.exchanges == []
    assert said(session) == said(session, "b") == []


# ---- files ----------------------------------------------------------------------------------------------------------


def test_a_chat_is_saved_and_goes_on(session, type_lines, talkers, folder: Path) -> None:
    told = type_lines(session, "/image a.png", "One?", "/image 'b c.png'", "Two?", "/save 'my chat.json'", "Three?")
    assert told[4] == "Saved in my chat.json."
    content = json.loads((folder / "my chat.json").read_text(encoding="utf-8"))
    (model,) = content["models"]
    assert model["messages"][0] == {
        "role": "user",
        "content": [{"type": "image", "path": str(folder / "a.png")}, {"type": "text", "text": "One?"}],
    }
    assert model["revision"] == talkers["ours"].speaker.revision and content["settings"]["max_new_tokens"] == 6
    asked = [*model["messages"], {"role": "user", "content": [{"type": "text", "text": "Three?"}]}]
    speaker = talkers["ours"].speaker  # transformers' own way takes the messages as they are
    inputs = speaker.processor.apply_chat_template(
        asked, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    ids = speaker.model.generate(**inputs, **GREEDY.options())[:, inputs["input_ids"].shape[1] :]
    (expected,) = speaker.processor.post_process_image_text_to_text(ids)
    other = Session({"again": Talk(talkers["ours"])}, GREEDY)
    again = type_lines(other, "Hm?", "/load my chat.json", "Three?", "/save 'my chat.json'", "/undo 3", "/undo")
    assert again[1] == "2 turns so far." and again[2] == expected
    assert again[4:] == ["Taken back, and a.png, b c.png with it.", "There is no turn to take back."]
    two = Session({"a": Talk(talkers["ours"]), "b": Talk(talkers["ours"])}, GREEDY)
    assert type_lines(two, "/load my chat.json")[0].startswith("The chat was with 1 model, and here are 2;")
    os.remove("b c.png")
    (told,) = type_lines(session, "/load my chat.json")
    assert told.startswith("A picture of the chat is gone: ") and "b c.png: there is no such file" in told
    assert len(session.exchanges) == 3
    (folder / "my chat.json").write_text('{"format": "minigpt4 chat", "models": [{}], "turns": []}')
    assert type_lines(session, "/load my chat.json")[0].startswith("The file of the chat is damaged")


# ---- the command ----------------------------------------------------------------------------------------------------


@pytest.fixture
def loaded(talkers: dict[str, Talker], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`loaded(*arguments)`: the command, with models that are loaded already; its exit status."""
    monkeypatch.setattr(chat, "open_talker", lambda name, options: talkers[name])
    return lambda *arguments: cli.main(["chat", *arguments, "--max_new_tokens", "6", "--temperature", "0"])


def test_one_question_is_answered_and_that_is_all(loaded, capsys, monkeypatch, talkers, scenes) -> None:
    expected = "".join(Talk(talkers["ours"]).ask("What is\nthis?", scenes[:1], GREEDY))
    assert loaded("ours", "--image", "a.png", "--prompt", "What is\nthis?", "--stats") == 0
    printed = capsys.readouterr()
    assert printed.out == f"{expected}\n"
    assert printed.err.splitlines()[0] == "Loading ours …" and talkers["ours"].about in printed.err
    assert printed.err.splitlines()[-1].startswith("[")
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\nthis?\n"))
    assert loaded("ours", "--image", "a.png") == 0
    assert capsys.readouterr().out == f"{expected}\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is\nthis?\n"))
    assert loaded("ours", "--compare", "llava", "blip2", "--image", "a.png") == 0
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == ["ours", "llava", "blip2"]


def test_a_model_that_cannot_answer_does_not_keep_the_others_from_it(loaded, capsys) -> None:
    assert loaded("blip2", "--compare", "ours", "--prompt", "What?") == 2
    printed = capsys.readouterr()
    assert printed.out.startswith("blip2: \nours: ") and len(printed.out.splitlines()[1]) > 10
    assert printed.err.splitlines()[-2:] == [
        "blip2: This model answers questions about pictures only; give it one.",
        "minigpt4 chat: blip2 could not answer; why is told above.",
    ]


def test_whatever_a_model_raises_ends_no_chat(session, type_lines, monkeypatch) -> None:
    def fail(*args, **kwargs):
        raise KeyError("roles have to alternate")

    monkeypatch.setattr(session.talks["ours"].conversation, "ask", fail)
    assert type_lines(session, "One?", "Two?") == ["KeyError: 'roles have to alternate'."] * 2
    assert session.exchanges == []


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["ours", "--prompt", " "], "--prompt is empty"),
        (["ours"], "Standard input is empty"),
        (["ours", "--image", "no.png"], "--image no.png: there is no such file."),
        (["ours", "--compare", "other/ours", "--prompt", "x"], "Two models are called ours"),
        (["blip2", "--prompt", "x"], "This model answers questions about pictures only; give it one."),
        (["ours", "--load", "notes.txt", "--prompt", "x"], "notes.txt holds no chat"),
        (["ours", "--top_p", "2"], "'2' is not a number from 0 to 1"),
        ([], "required: MODEL"),
    ],
    ids=str,
)
def test_mistakes_end_the_command_in_one_sentence(arguments, told, loaded, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert loaded(*arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("minigpt4 chat: ") and told in last


# ---- the terminal ---------------------------------------------------------------------------------------------------


def test_words_and_files_are_completed(folder: Path) -> None:
    words = ["/image", "/set", "/save"]
    assert chat_terminal.completions("/s", "/s", words) == ["/set", "/save"]
    assert chat_terminal.completions("a", "/image a", words) == ["a.png"]
    assert chat_terminal.completions("~/n", "/image ~/n", words) == ["~/notes.txt"]
    assert chat_terminal.completions("a", "What a", words) == []
    (folder / "more").mkdir()
    assert chat_terminal.completions("m", "/image m", words) == ["more/"]


STARTED = """
import sys, time
from recipes_minigpt4 import cli
from recipes_minigpt4.utils.quiet import silence_libraries
silence_libraries([])
from recipes_minigpt4.serving import talk

stops = talk.Stopped.__call__
talk.Stopped.__call__ = lambda *args, **kwargs: time.sleep(0.05) or stops(*args, **kwargs)
status = cli.main(["chat", *sys.argv[1:]])
print("imported:", sorted({"trl", "datasets", "pandas", "gradio", "fastapi", "openai"} & set(sys.modules)))
sys.exit(status)
"""


class PseudoTerminal:
    """A command in a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        main, other = pty.openpty()
        self.file, self.text, self.read_to = main, "", 0
        self.process = subprocess.Popen(
            command, stdin=other, stdout=other, stderr=other, start_new_session=True, preexec_fn=take_terminal
        )  # fmt: skip
        os.close(other)

    def type(self, text: str) -> None:
        os.write(self.file, text.encode())

    def wait_for(self, text: str, seconds: float = 120) -> str:
        """What is printed, from where the last wait ended, until it holds a text."""
        end = time.monotonic() + seconds
        while text not in self.text[self.read_to :]:
            if time.monotonic() > end or not select.select([self.file], [], [], end - time.monotonic())[0]:
                pytest.fail(f"{text!r} does not come; there is {self.text[self.read_to :]!r}")
            try:
                self.text += os.read(self.file, 4096).decode(errors="replace")
            except OSError:  # Linux tells the end of a terminal so
                pytest.fail(f"{text!r} does not come before the end; there is {self.text[self.read_to :]!r}")
        start, self.read_to = self.read_to, self.text.index(text, self.read_to) + len(text)
        return self.text[start : self.read_to]


def take_terminal() -> None:
    """Let Ctrl-C of standard input's terminal reach the process."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def terminal(ours: str, folder: Path) -> Iterator[PseudoTerminal]:
    """The command, started in a terminal."""
    options = ["--image", "a.png", "--device", "cpu", "--temperature", "0", "--repetition_penalty", "1.5", "--stats"]
    opened = PseudoTerminal([sys.executable, "-c", STARTED, ours, *options])
    yield opened
    opened.process.kill()
    opened.process.wait()
    os.close(opened.file)


def test_a_chat_in_a_terminal(terminal: PseudoTerminal, ours: str, talkers, scenes) -> None:
    """Ctrl-C stops a reply and not the command; the arrow key brings a line back; it imports no training library."""
    whole = Talk(talkers["ours"])
    assert "".join(whole.ask("Describe it.", scenes[:1], ReplySettings(0, repetition_penalty=1.5)))
    assert (tokens := whole.conversation.turns[0].new_tokens) > 20
    shown = terminal.wait_for("\r\n> ")
    assert f"ours: {ours} on " in shown and "With your next question: a.png" in shown and "Traceback" not in shown
    terminal.type("Describe it.\r")
    terminal.wait_for("it.\r\n")
    terminal.wait_for(" ")
    terminal.type("\x03")
    stats = terminal.wait_for("tokens/s]\r\n> ")
    assert int(re.search(r"(\d+) answered", stats)[1]) < tokens
    terminal.type("\x1b[A")  # up
    terminal.wait_for("Describe it.")
    terminal.type("\x15/stats\r")  # the line is cleared
    terminal.wait_for("Tokens and time are told no longer.\r\n> ")
    terminal.type("\x04")
    assert terminal.wait_for("]").rsplit(":")[-1].strip() == "[]"
    assert terminal.process.wait(30) == 0
