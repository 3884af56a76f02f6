"""`minigpt4 evaluate`: replies are kept and never asked for twice, and numbers come from replies alone."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from recipes_minigpt4.cli import main as run_command
from recipes_minigpt4.configs import shipped_configs
from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.evaluate_options import parse
from recipes_minigpt4.evaluation.judging import ModelJudge
from recipes_minigpt4.evaluation.opening import place_of
from recipes_minigpt4.evaluation.questions import Picture
from recipes_minigpt4.evaluation.replies import Said, reply_to
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.evaluation.words import words_of
from recipes_minigpt4.llm.stub import stub_client
from recipes_minigpt4.utils.errors import RecipeError
from recipes_minigpt4.utils.journal import Journal


class Parrot:
    """Says the prompt back; counts what it is asked."""

    revision = "1"

    def __init__(self) -> None:
        self.asked: list[str] = []

    def answer(self, questions, pictures) -> list[Said]:
        self.asked += [question.key for question in questions]
        return [
            Said(f"{question.prompt} It is {picture.size[0]} wide.", True)
            for question, picture in zip(questions, pictures, strict=True)
        ]


@pytest.fixture
def parrots(monkeypatch: pytest.MonkeyPatch) -> dict[str, Parrot]:
    """Name of a model → the parrot that stands for it."""
    found: dict[str, Parrot] = {}
    monkeypatch.setattr(evaluate, "open_speaker", lambda name, options: found.setdefault(name, Parrot()))
    return found


@pytest.fixture
def run(tmp_path: Path, pictures_folder: Path) -> Callable[..., dict]:
    """`run(*more, models=..., suites=...)`: results of a run about six pictures."""

    def evaluate_(*more: object, models: str = "one=1", suites: str = "failures", data: object = None) -> dict:
        arguments = ["--models", *models.split(), "--suites", *suites.split(), "--output_dir", tmp_path / "out"]
        return evaluate.main([str(text) for text in [*arguments, "--data", data or pictures_folder, *more]])

    return evaluate_


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# ---- what comes out -------------------------------------------------------------------------------------------------


def test_models_of_all_kinds_are_asked_and_compared(
    ours: str, llava: str, blip2: str, tmp_path: Path, pictures_folder: Path, capsys: pytest.CaptureFixture
) -> None:
    models = [f"ours={ours}", f"llava={llava}", f"blip2={blip2}"]
    arguments = [
        "--models",
        *models,
        "--suites",
        "captions",
        "--data",
        "tiny",
        "--num_samples",
        "3",
        "--device",
        "cpu",
    ]
    assert run_command(["evaluate", *arguments, "--output_dir", str(tmp_path / "out")]) == 0
    told = json.loads((tmp_path / "out" / "results.json").read_text())["suites"]["captions"]
    assert list(told["models"]) == ["ours", "llava", "blip2"] and told["pictures"] == 3
    for label, of_model in told["models"].items():
        replies = lines(tmp_path / "out" / label / "captions" / "replies.jsonl")
        mean = sum(len(words_of(reply["text"])) for reply in replies) / 3
        assert len(replies) == 3 and of_model["mean_words"]["value"] == pytest.approx(mean)
    assert list(told["differences"]) == ["llava - ours", "blip2 - ours", "blip2 - llava"]
    assert "captions beside several references, 3 pictures" in capsys.readouterr().out


def test_numbers_are_made_from_replies_alone(run: Callable, parrots: dict, tmp_path: Path) -> None:
    first = run(models="one=1 other=2")
    asked = {name: len(parrot.asked) for name, parrot in parrots.items()}
    again = evaluate.main(["--from_replies", "--output_dir", str(tmp_path / "out")])
    assert again == first and {name: len(parrot.asked) for name, parrot in parrots.items()} == asked


def test_fields_of_a_file_are_options_and_the_command_line_wins(
    parrots: dict, tmp_path: Path, pictures_folder: Path
) -> None:
    fields = {
        "models": {"one": "1", "other": "2"}, "suites": ["failures"], "data": {"failures": str(pictures_folder)},
        "num_samples": 2, "output_dir": str(tmp_path / "out"), "trust_remote_code": False,
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(fields))
    told = evaluate.main(["--config", str(tmp_path / "run.yaml"), "--num_samples", "3"])
    assert told["suites"]["failures"]["pictures"] == 3 and list(parrots) == ["1", "2"]


@pytest.mark.parametrize("name", [name for name in shipped_configs() if "evaluate" in name])
def test_shipped_configurations_are_understood(name: str) -> None:
    args = parse(["--config", name])
    assert args.models and args.suites
    for suite in args.suites:
        assert place_of(SUITES[suite](), args.data)


# ---- going on -------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.replies import Said

class Dying:
    revision, batches = "1", 0
    def answer(self, questions, pictures):
        self.batches += 1
        if self.batches == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        with open(sys.argv[2], "a") as file:
            file.writelines(question.key + "\\n" for question in questions)
        return [Said("It is a picture.", True) for _ in questions]

evaluate.open_speaker = lambda name, options: Dying()
evaluate.main(sys.argv[3:])
"""


def test_a_killed_run_goes_on_and_asks_nothing_twice(tmp_path: Path, pictures_folder: Path) -> None:
    """Twelve questions, two at a time; the third batch of every start is never answered."""
    log, out = tmp_path / "asked", tmp_path / "out"
    arguments = ["--models", "one=1", "--suites", "failures", "--data", pictures_folder, "--batch_size", "2"]
    command = [sys.executable, "-c", KILLED, "3", log, *arguments, "--output_dir", out]
    codes = []
    for _ in range(3):
        codes.append(subprocess.run([str(text) for text in command], capture_output=True).returncode)
        replies = out / "one" / "failures" / "replies.jsonl"
        with replies.open("a", encoding="utf-8") as file:
            file.write('{"key": "half a li')
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    asked = log.read_text().split()
    assert len(asked) == len(set(asked)) == 12
    with Journal(replies) as journal:
        assert len(journal.lines) == 12


def test_ctrl_c_ends_politely_and_keeps_what_was_said(
    run: Callable,
    parrots: dict,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    pictures_folder: Path,
) -> None:
    answer = Parrot.answer

    def interrupted(parrot, questions, pictures):
        if len(parrot.asked) == 8:
            raise KeyboardInterrupt
        return answer(parrot, questions, pictures)

    monkeypatch.setattr(Parrot, "answer", interrupted)
    command = [
        "evaluate",
        "--models",
        "one=1",
        "--suites",
        "failures",
        "--data",
        str(pictures_folder),
        "--batch_size",
        "4",
    ]
    assert run_command([*command, "--output_dir", str(tmp_path / "out")]) == 130
    assert "the same command goes on where it was" in capsys.readouterr().err
    assert len(lines(tmp_path / "out" / "one" / "failures" / "replies.jsonl")) == 8


def test_another_revision_is_asked_again_and_the_old_one_is_kept(
    run: Callable, parrots: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run()
    monkeypatch.setattr(Parrot, "revision", "2")
    run()
    assert len(parrots["1"].asked) == 24
    replies = lines(tmp_path / "out" / "one" / "failures" / "replies.jsonl")
    assert [reply["revision"] for reply in replies] == ["1"] * 12 + ["2"] * 12


def test_more_pictures_ask_what_is_new(run: Callable, parrots: dict) -> None:
    run("--num_samples", 2)
    told = run()
    assert len(parrots["1"].asked) == len(set(parrots["1"].asked)) == 12
    assert told["suites"]["failures"]["pictures"] == 6


# ---- judges ---------------------------------------------------------------------------------------------------------


def test_a_judge_is_asked_once_and_what_it_does_not_answer_is_counted(
    run: Callable, parrots: dict, tmp_path: Path
) -> None:
    answers = [
        {"match": "1: a (small|large) (red|blue)", "answer": "1: (yes) 2: no 3: YES"},
        {"match": "star", "answer": "I cannot tell."},
        {"match": "", "answer": "1: no 2: no 3: no"},
    ]
    (stub := tmp_path / "stub.jsonl").write_text("\n".join(map(json.dumps, answers)))
    told = run("--num_samples", 24, "--judge", f"stub:{stub}", suites="coverage", data="tiny")["suites"]["coverage"]
    (unread,) = told["judges"]["unread"].values()
    replies = lines(tmp_path / "out" / "one" / "coverage" / "replies.jsonl")
    captions = [reply["facts"]["captions"] for reply in replies]
    said = ["red" in texts[0] or "blue" in texts[0] for texts in captions]
    silent = [not yes and any("star" in text for text in texts) for yes, texts in zip(said, captions, strict=True)]
    assert unread == sum(len(texts) for texts, no in zip(captions, silent, strict=True) if no) > 0
    first = told["models"]["one"]["first_covered"]["value"]
    assert first == pytest.approx(sum(said) / (24 - sum(silent))) and 0 < first < 1
    again = run("--num_samples", 24, "--judge", f"stub:{stub}", suites="coverage", data="tiny")
    assert again["suites"]["coverage"] == told


def test_repeats_give_the_answer_of_the_majority(run: Callable, parrots: dict) -> None:
    """Asked three times, the judge says yes twice; of two answers that differ neither counts."""
    said = ["1: yes 2: yes 3: no", "1: no 2: yes 3: no", "1: yes 2: yes 3: no"]
    for repeats, expected in ((3, (True, True, False)), (2, (None, True, False))):
        client = stub_client(lambda request: said[request.seed or 0], name=f"stub {repeats}")
        judge, suite = ModelJudge(client, repeats), SUITES["coverage"]()
        question = suite.questions({"image": Picture("a", Image.new("RGB", (8, 8))), "captions": ["a", "b", "c"]})[0]
        (verdict,) = judge.verdicts(suite, [suite.case(reply_to(question, "1", Said("A reply.")))])
        assert verdict == expected
        assert judge.agreement == pytest.approx(7 / 9 if repeats == 3 else 2 / 3)


def test_a_suite_that_needs_a_judge_says_so(run: Callable, parrots: dict, capsys: pytest.CaptureFixture) -> None:
    told = run("--num_samples", 3, suites="coverage failures", data="tiny")
    assert list(told["suites"]) == ["failures"] and "name one with --judge" in told["skipped"]["coverage"]


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"models": "1"}, "--models 1 has no label; write ours=1 or the like"),
        ({"models": "a/b=1"}, "--models a/b=1 has no label"),
        ({"models": "one=1 one=2"}, "--models names one twice"),
        ({"data": "chair=x"}, "The suite failures has no data; name any pictures: .* with --data failures=PLACE"),
        ({"data": "nowhere.json"}, "There is no file nowhere.json; write its path anew"),
        ({"more": ("--judge", "words", "words")}, "--judge names words twice; --judge_repeats 2 asks a judge twice"),
    ],
)
def test_mistakes_are_told_in_a_sentence(run: Callable, parrots: dict, changes: dict, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        run(*changes.pop("more", ()), **changes)


def test_a_picture_that_cannot_be_read_stops_the_run_unless_few_are_allowed(
    run: Callable, parrots: dict, pictures_folder: Path
) -> None:
    (pictures_folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(RecipeError, match=r"2 of 12 pictures cannot be read, .*3.png among them .* All other replies"):
        run(models="one=1 other=2")
    told = run("--max_bad_share", "0.2", models="one=1 other=2")["suites"]["failures"]
    assert (told["pictures"], told["left_out"]) == (5, 1) and len(parrots["1"].asked) == 10


def test_replies_of_other_data_are_not_compared(run: Callable, parrots: dict, tmp_path: Path) -> None:
    run("--num_samples", 2)
    run("--num_samples", 3, models="other=2")
    with pytest.raises(RecipeError, match=r"one and other were asked about different pictures"):
        evaluate.main(["--from_replies", "--output_dir", str(tmp_path / "out")])
    with pytest.raises(RecipeError, match=r"holds no replies of these models and suites; leave --from_replies out"):
        evaluate.main(["--from_replies", "--output_dir", str(tmp_path / "empty")])


def test_two_runs_in_one_folder_do_not_mix(run: Callable, parrots: dict, tmp_path: Path) -> None:
    with (
        Journal(tmp_path / "out" / "one" / "failures" / "replies.jsonl"),
        pytest.raises(RecipeError, match=r"Another process writes into .*replies.jsonl; wait until it has ended"),
    ):
        run()


def test_a_field_that_is_no_option_is_told(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("suite: [failures]")
    with pytest.raises(RecipeError, match=r"has the field 'suite', which is no option of `minigpt4 evaluate`"):
        evaluate.main(["--config", str(tmp_path / "run.yaml")])
