"""The suites: what they ask, and their numbers beside numbers counted by hand and beside the truth about scenes."""

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.judging import TruthJudge, WordsJudge, agreement
from recipes_minigpt4.evaluation.numbers import Answered, suite_numbers
from recipes_minigpt4.evaluation.opening import open_questions
from recipes_minigpt4.evaluation.questions import Picture, Question
from recipes_minigpt4.evaluation.replies import Reply, Said, reply_to
from recipes_minigpt4.evaluation.scenes import ROWS, scene_rows, told_things
from recipes_minigpt4.evaluation.short_answers import chosen, normalized
from recipes_minigpt4.evaluation.suite import Suite, WrongRowError
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.evaluation.suites.abilities import Abilities
from recipes_minigpt4.evaluation.suites.aokvqa import Aokvqa, agreement_with
from recipes_minigpt4.evaluation.suites.captions import Captions, cider, rouge_l
from recipes_minigpt4.evaluation.suites.chair import Chair
from recipes_minigpt4.evaluation.suites.coverage import Coverage
from recipes_minigpt4.evaluation.suites.gqa import Gqa
from recipes_minigpt4.evaluation.suites.pope import Pope
from recipes_minigpt4.evaluation.suites.pope import said as said_in_pope
from recipes_minigpt4.tiny.scenes import describe, evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError


Row = Mapping[str, Any]


def picture(number: int) -> Picture:
    return Picture(f"{number}.png", PIL.Image.new("RGB", (4, 4), (number, 0, 0)))


def ask(suite: Suite, *rows: Row) -> list[Question]:
    """What a suite asks about rows of different pictures."""
    return [
        question for number, row in enumerate(rows) for question in suite.questions({"image": picture(number), **row})
    ]


def replies_to(questions: Sequence[Question], *texts: str | Said) -> list[Reply]:
    """The replies, in order, as they come back from a file."""
    said = [text if isinstance(text, Said) else Said(text) for text in texts]
    return [reply_to(question, "r", one) for question, one in zip(questions, said, strict=True)]


def values(suite: Suite, replies: Sequence[Reply], verdicts: Sequence[Any] | None = None) -> dict[str, float | None]:
    """Measure → its value."""
    answered = Answered(replies, verdicts or [None] * len(replies))
    told = suite_numbers(suite, {"ours": answered}, resamples=10)["models"]["ours"]
    assert list(told) == list(suite.measures)
    return {name: number["value"] for name, number in told.items()}


# ---- abilities, coverage --------------------------------------------------------------------------------------------


def test_abilities() -> None:
    suite = Abilities()
    rows = [{"kind": kind, "caption": f"a {kind}"} for kind in ("meme", "Recipes", "ad", "poem", "poem")]
    questions = ask(suite, *rows)
    assert [question.prompt for question in questions[:4]] == [
        "Explain why this meme is funny.",
        "How should I make something like this?",
        "Help me draft a professional advertisement for this.",
        "Can you craft a beautiful poem about this image?",
    ]
    replies = replies_to(questions, "Because.", "Mix it.", "", "Roses", "Violets")
    case = suite.case(replies[0])
    assert "Picture: a meme" in case.request and "Reply: Because." in case.request
    assert suite.read_verdict(replies[0], "No.") == (False,)
    told = values(suite, replies, [(False,), (True,), (None,), (True,), (False,)])
    assert told == {"meme": 0, "recipe": 1, "ad": None, "poem": 0.5, "total": 0.5}


def test_coverage_counts_captions_of_five() -> None:
    suite = Coverage()
    replies = replies_to(
        ask(suite, {"captions": list("abcdefg")}, {"captions": ["a", "b"]}, {"captions": ["a"]}), *"xyz"
    )
    assert "1: a 2: b 3: c 4: d 5: e" in suite.case(replies[0]).request
    told = values(suite, replies, [(True, False, True, True, False), (False, True), (None,)])
    assert told == {"covered": pytest.approx((3 + 2.5) / 2), "first_covered": 0.5}


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("1: yes 2: no 3: yes", (True, False, True)),
        ("1: (Yes)\n2: (no)\n3: (no)", (True, False, False)),
        ("1. **yes**\n3) no", (True, None, False)),
        ("1: yes 2: no 3: yes 2: yes", (True, None, True)),
        ("1: (yes/no) 2: (yes/no) 3: (yes/no)", (None, None, None)),
        ("Caption 12: yes. 3: not", (None, None, None)),
        ("Yes, all of them.", (None, None, None)),
    ],
)
def test_coverage_reads_a_judge_and_guesses_nothing(answer: str, verdict: tuple[bool | None, ...]) -> None:
    suite = Coverage()
    (reply,) = replies_to(ask(suite, {"captions": ["a", "b", "c"]}), "x")
    assert suite.read_verdict(reply, answer) == verdict


def test_coverage_of_one_caption_takes_a_plain_answer() -> None:
    suite = Coverage()
    (reply,) = replies_to(ask(suite, {"caption": "a"}), "x")
    assert suite.read_verdict(reply, "Yes.") == (True,) and suite.read_verdict(reply, "1: no") == (False,)


def test_judges_beside_the_truth_about_scenes() -> None:
    suite, shown = Coverage(), evaluation_scenes(60, 20, seed=3)
    rows = scene_rows("coverage", 60, 3)
    questions = [question for row in rows for question in suite.questions(row)]
    described = [describe(scene, random.Random(place)) for place, (_, scene) in enumerate(shown)]
    cases = [suite.case(reply) for reply in replies_to(questions, *described)]
    assert {said for verdict in TruthJudge().verdicts(suite, cases) for said in verdict} == {True}
    assert {said for verdict in WordsJudge().verdicts(suite, cases) for said in verdict} == {True}

    shifted = [suite.case(reply) for reply in replies_to(questions, *described[1:], described[0])]
    truth, words = TruthJudge().verdicts(suite, shifted), WordsJudge().verdicts(suite, shifted)
    told = agreement(words, truth)
    assert told["answers"] == sum(len(scene.things) for _, scene in shown)
    assert 0.7 < told["same"] < 0.8 and 0 < told["kappa"] < 0.5  # words of two things together look like a third
    assert sum(map(sum, truth)) < sum(map(sum, words))


def test_a_thing_that_is_there_twice_has_to_be_told_twice() -> None:
    things = [["red", "star", "top left"], ["red", "star", "top left"], ["blue", "cross", "centre"]]
    text = "In the top left there is a large red star. A blue cross sits in the top right."
    assert told_things(text, things) == (True, False, False)


def test_rule_judges_know_what_they_have_a_rule_for() -> None:
    assert [name for name in SUITES if WordsJudge().knows(SUITES[name]())] == ["coverage"]
    assert [name for name in SUITES if TruthJudge().knows(SUITES[name]())] == ["coverage", "failures"]
    suite = SUITES["failures"]()
    cases = [suite.case(reply) for reply in replies_to(ask(suite, {}), "A dog.", "")]
    assert TruthJudge().verdicts(suite, cases) == [(False,), (True,)]
    (reply,) = replies_to(ask(Coverage(), {"caption": "a dog"})[:1], "A dog.")
    assert TruthJudge().verdicts(Coverage(), [Coverage().case(reply)]) == [(None,)]  # nobody knows what is true


# ---- captions -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "references", "score"),
    [
        ("a red square on a table", ["a red square"], 0.70930),  # precision 3/6, recall 3/3
        ("a red square on a table", ["a red square", "the red square is on a wooden table"], 0.92424),  # 5/6, 3/3
        ("a b c", ["a b c"], 1.0),
        ("c b a", ["a b c"], 1 / 3),
        ("x", ["a b c"], 0.0),
        ("", ["a b c"], 0.0),
    ],
)
def test_rouge_l(text: str, references: list[str], score: float) -> None:
    assert rouge_l(text.split(), [reference.split() for reference in references]) == pytest.approx(score, abs=1e-5)


def test_captions() -> None:
    suite = Captions()
    replies = replies_to(ask(suite, {"captions": ["a b c"]}, {"sentences": ["x"]}), "A b, c. A b, c!", "w w w w w")
    told = values(suite, replies)
    assert told["self_repetition"] == pytest.approx((0 + 1 / 2) / 2)  # no run of four twice; one of two
    assert told["distinct_2"] == (3 + 1) / (5 + 4)  # ab bc ca, ww
    assert told["mean_words"] == (6 + 5) / 2
    assert told["rouge_l"] == pytest.approx((2.44 * 0.5 / (1 + 1.44 * 0.5) + 0) / 2)


def test_cider() -> None:
    pytest.importorskip("pycocoevalcap", reason="CIDEr needs the package pycocoevalcap")
    references = [[["a", "red", "square", "there"], ["a", "red", "box", "there"]], [["two", "blue", "stars", "here"]]]
    alike, different = cider([references[0][0], ["a", "red", "square", "there"]], references)
    assert alike > 4 and different == 0
    assert "cider" in Captions.measures


def test_captions_of_a_picture_may_stand_in_several_rows(tmp_path: Path) -> None:
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    rows = [{"image": "a.png", "caption": text} for text in ("A dog.", "A cat.", "A dog.")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    args = evaluate.parse(["--data", str(tmp_path / "rows.jsonl")])
    for suite in (Captions(), Coverage()):
        (question,) = open_questions(suite, args)
        assert question.facts["captions"] == ["A dog.", "A cat."]


# ---- chair ----------------------------------------------------------------------------------------------------------


def test_chair() -> None:
    suite = Chair()
    questions = ask(
        suite,
        {"objects": ["dog", "frisbee", "dog"], "captions": ["A man throws a frisbee to his dog."]},
        {"objects": ["cat", "couch"]},
    )
    assert [question.prompt for question in questions[:2]] == [
        "Please describe this image as detailed as possible.",
        "Please describe the image shortly and precisely, in less than 20 words.",
    ]
    assert questions[0].facts["objects"] == ["dog", "frisbee", "person"]
    replies = replies_to(
        questions,
        "A dog and two dogs play with a ball. A man watches.",  # dog, dog, ball, man: 1 of 4 wrong, 2 of 3 found
        "A dog.",  # 0 of 1, 1 of 3
        "A cat lies on a sofa near a television.",  # cat, sofa, television: 1 of 3, 2 of 2
        "A dog on a sofa",  # 1 of 2, 1 of 2
    )
    assert values(suite, replies) == {
        "chair_i_long": 2 / 7, "chair_s_long": 1.0, "recall_long": 4 / 5, "words_long": (12 + 9) / 2,
        "chair_i_short": 1 / 3, "chair_s_short": 1 / 2, "recall_short": 2 / 5, "words_short": (2 + 5) / 2,
    }  # fmt: skip


def test_chair_without_any_object_said() -> None:
    suite = Chair()
    told = values(suite, replies_to(ask(suite, {"objects": []}), "A lawn.", "Grass"))
    assert told["chair_i_long"] is None and told["recall_long"] is None and told["chair_s_long"] == 0


def test_chair_with_synonyms_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ours.txt").write_text("gear, cog\nbolt, screw\n", encoding="utf-8")
    suite = Chair.from_options(evaluate.parse(["--synonyms", str(tmp_path / "ours.txt")]))
    replies = replies_to(ask(suite, {"objects": ["cog"]}), "Two gears and three screws beside a dog", "A cog")
    told = values(suite, replies)
    assert told["chair_i_long"] == 1 / 2 and told["chair_i_short"] == 0 and told["recall_long"] == 1
    with pytest.raises(WrongRowError, match="an object 'dog' and no word for it in the file of --synonyms"):
        ask(suite, {"objects": ["dog"]})
    with pytest.raises(
        RecipeError, match="are about 'gear', for which the file of --synonyms has no line; name the file"
    ):
        values(Chair(), replies)


# ---- questions with short answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "plain"),
    [("The red shirt.", "red shirt"), ("two", "2"), ("None", "0"), ("10,000", "10000"), ("3.5 m", "3.5 m"),
     ("T-shirt", "t shirt"), ("x-ray, blue", "x ray blue"), ("dont know", "don't know"), ("An  apple!", "apple"),
     ("yes\n", "yes"), ("A/C", "c"), ("", ""), ("p.m.", "pm")],
)  # fmt: skip
def test_answers_are_compared_as_in_vqa(answer: str, plain: str) -> None:
    assert normalized(answer) == plain


@pytest.mark.parametrize(
    ("text", "place"),
    [("dog", 0), ("A hot dog.", 1), ("It is a hot dog on a plate.", 1), ("The dog eats a hot dog.", None),
     ("It is a cat or a dog.", None), ("It is not a cat.", None), ("A bird", None), ("", None),
     ("Cat. It could be a dog.", 2), ("The answer is: cat", 2)],
)  # fmt: skip
def test_a_choice_is_read_and_not_guessed(text: str, place: int | None) -> None:
    assert chosen(text, ["dog", "hot dog", "cat"]) == place


def test_aokvqa() -> None:
    suite = Aokvqa()
    row = {"question": "What is it?", "choices": ["dog", "cat", "cow"], "correct_choice_idx": 1}
    people = ["cat"] * 2 + ["kitten"] * 5 + ["tiger"] * 3
    questions = ask(
        suite,
        {**row, "direct_answers": people},
        {**row, "direct_answers": str(people)},
        {**row, "correct_choice_idx": 2},
    )
    assert questions[0].prompt == "What is it? Answer in one word or a short phrase."
    assert questions[0].choices == ("dog", "cat", "cow") and questions[1].choices == ()
    assert questions[1].prompt == "What is it? Choose one of these answers: dog, cat, cow."
    replies = replies_to(
        questions,
        Said("A cat.", scores=(-2.0, -1.5, -3.0)), "Cat",  # right by likelihood, right; 2 of 3 people
        Said("Kitten", scores=(-1.0, -1.5, -3.0)), "dog or cat",  # wrong, unread; enough people
        "cow", "The cow.",  # no likelihood, right; nobody was asked
    )  # fmt: skip
    told = values(suite, [Reply(**json.loads(json.dumps(vars(reply)))) for reply in replies])
    assert told == {"likelihood": 1 / 2, "generated": 2 / 3, "unread": 1 / 3, "direct": pytest.approx((2 / 3 + 1) / 2)}
    assert agreement_with("a tiger", people) == 1 and agreement_with("lion", people) == 0


def test_gqa() -> None:
    suite = Gqa()
    questions = ask(
        suite, *[{"question": f"What is it, {n}?", "answer": answer} for n, answer in enumerate(("dog", "no", "two"))]
    )
    replies = replies_to(questions, "A dog.", "There is no dog.", "three")
    assert values(suite, replies) == {"accuracy": 1 / 3, "named": 2 / 3, "words": (2 + 4 + 1) / 3}


@pytest.mark.parametrize(
    ("text", "answer"),
    [("Yes", True), ("no", False), ("Yes, there is a dog and no cat.", True), ("No. Yes, a cat.", False),
     ("There is a dog in the image.", True), ("There is a small brown dog.", True), ("There are two dogs.", True),
     ("There is no dog in the image.", False), ("There isn't a dog.", False), ("There are not any dogs.", False),
     ("There is no cat but a dog.", None), ("There is a cat.", None), ("There is a picture of a dog.", None),
     ("I do not know.", None), ("A dog runs.", None), ("", None)],
)  # fmt: skip
def test_pope_reads_what_is_said_and_no_more(text: str, answer: bool | None) -> None:
    (reply,) = replies_to(ask(Pope(), {"text": "Is there a dog in the image?", "label": "yes"}), text)
    assert said_in_pope(reply) is answer


def test_pope() -> None:
    suite = Pope()
    rows = [
        {"text": f"Is there a {n} in the image?", "label": label} for n, label in enumerate(["yes"] * 3 + ["no"] * 4)
    ]
    replies = replies_to(ask(suite, *rows), "Yes", "No", "A street.", "Yes", "No", "No", "A street.")
    assert values(suite, replies) == {
        "accuracy": 3 / 7, "precision": 1 / 2, "recall": 1 / 3, "f1": 2 / 5, "yes": 2 / 7, "unread": 2 / 7,
    }  # fmt: skip


def test_a_question_that_all_settings_of_pope_ask_counts_each_time() -> None:
    suite = Pope()
    yes, no = ask(
        suite, {"question": "Is there a dog?", "answer": "yes"}, {"question": "Is there a cat?", "answer": "No"}
    )
    thrice = suite.joined(suite.joined(yes, yes), yes)
    assert values(suite, replies_to([thrice, no], "yes", "yes")) == {
        "accuracy": 3 / 4, "precision": 3 / 4, "recall": 1, "f1": 6 / 7, "yes": 1, "unread": 0,
    }  # fmt: skip


# ---- rows that a suite cannot use -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "row", "missing"),
    [
        ("abilities", {}, "no `kind` of meme, recipe, ad, poem"),
        ("coverage", {"captions": []}, "no `captions`"),
        ("captions", {"captions": [1]}, "no `captions`"),
        ("chair", {"captions": ["a"]}, "no list of `objects`"),
        ("chair", {"objects": ["dog", "gnu"]}, "an object 'gnu' and no word for it"),
        ("aokvqa", {"question": "Who?", "choices": ["a", "b"]}, "no `correct_choice_idx`"),
        ("aokvqa", {"question": "Who?", "correct_choice_idx": 0}, "no `choices`"),
        ("aokvqa", {"choices": ["a", "b"], "correct_choice_idx": 0}, "no `question`"),
        ("gqa", {"question": "Who?"}, "no `answer`"),
        ("gqa", {"answer": "me"}, "no `question`"),
        ("pope", {"label": "yes"}, "no `text` and no `question`"),
        ("pope", {"text": "Is there?", "label": "perhaps"}, "no `label` of yes or no"),
        ("votes", {}, "no votes, for models asked anew have none; compare them on the page"),
    ],
)
def test_a_row_without_what_is_needed(name: str, row: Row, missing: str) -> None:
    with pytest.raises(WrongRowError, match=missing):
        SUITES[name]().questions({"image": picture(0), **row})


# ---- the embedded world ---------------------------------------------------------------------------------------------


class Knowing:
    """A model that reads the answers where the measures do."""

    revision = "knowing"

    def answer(self, questions: Sequence[Question], pictures: Sequence[PIL.Image.Image]) -> list[Said]:
        return [self.say(question.facts, question.choices) for question in questions]

    def say(self, facts: Mapping[str, Any], choices: Sequence[str]) -> Said:
        if "things" in facts:
            return Said(
                " ".join(f"There is a {colour} {shape} in the {place}." for colour, shape, place in facts["things"])
            )
        if "objects" in facts:
            return Said(f"It shows {', '.join(f'a {name}' for name in facts['objects'])}.")
        if "right" in facts:
            scores = tuple(float(place == facts["right"]) for place in range(len(choices)))
            return Said(facts["answers"][0], scores=scores)
        if "there" in facts:
            return Said("Yes." if facts["there"] else "No.")
        return Said(facts.get("answer", "A picture."), finished=True)


class Guessing(Knowing):
    """One that says yes, red and star whatever it is asked."""

    revision = "guessing"

    def say(self, facts: Mapping[str, Any], choices: Sequence[str]) -> Said:
        return Said("Yes, a red star.", scores=tuple(-float(place) for place in range(len(choices))))


def test_every_suite_is_exact_on_the_embedded_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "open_speaker", lambda name, options: {"k": Knowing, "g": Guessing}[name]())
    names = [name for name in SUITES if name in ROWS]
    assert {*SUITES} - {*names} == {"abilities", "votes"}
    options = ["--models", "knows=k", "guesses=g", "--judge", "truth", "words", "--resamples", "50"]
    options += ["--output_dir", str(tmp_path)]
    results = evaluate.main([*options, "--suites", *names, "--data", "tiny", "--num_samples", "12"])
    assert evaluate.main([*options, "--from_replies"])["suites"] == results["suites"]
    told = {
        label: {
            suite: {name: number["value"] for name, number in numbers["models"][label].items()}
            for suite, numbers in results["suites"].items()
        }
        for label in ("knows", "guesses")
    }
    knows, guesses = told["knows"], told["guesses"]
    assert knows["coverage"] == {"covered": 5, "first_covered": 1} and guesses["coverage"]["covered"] == 0
    assert knows["failures"] == dict.fromkeys(knows["failures"], 0)
    for kind in ("long", "short"):
        assert [knows["chair"][f"{name}_{kind}"] for name in ("chair_i", "chair_s", "recall")] == [0, 0, 1]
        assert guesses["chair"][f"chair_i_{kind}"] > 0.5
    assert knows["aokvqa"] == {"likelihood": 1, "generated": 1, "unread": 0, "direct": 1}
    assert guesses["aokvqa"]["likelihood"] < 1 and guesses["aokvqa"]["direct"] == 0
    assert knows["gqa"]["accuracy"] == 1 and guesses["gqa"]["accuracy"] == 0
    assert knows["pope"] == {"accuracy": 1, "precision": 1, "recall": 1, "f1": 1, "yes": 0.5, "unread": 0}
    assert guesses["pope"] == {
        "accuracy": 0.5, "precision": 0.5, "recall": 1, "f1": pytest.approx(2 / 3), "yes": 1, "unread": 0,
    }  # fmt: skip
    (agreed,) = results["suites"]["coverage"]["judges"]["agreement"]
    assert (agreed["one"], agreed["other"]) == ("truth", "words") and agreed["same"] > 0.8


def test_scenes_say_what_is_not_there() -> None:
    for (_, scene), rows in zip(
        evaluation_scenes(9, 3, seed=0),
        [ROWS["pope"](scene) for _, scene in evaluation_scenes(9, 3, seed=0)],
        strict=True,
    ):
        there = {" ".join(thing.pair) for thing in scene.things}
        for row in rows:
            named = (
                row["text"].removeprefix("Is there an ").removeprefix("Is there a ").removesuffix(" in the picture?")
            )
            assert (named in there) is (row["label"] == "yes")
        assert sum(row["label"] == "yes" for row in rows) == len(rows) / 2 == len(there)


def test_a_suite_without_scenes_says_so() -> None:
    with pytest.raises(RecipeError, match="The embedded world has nothing for the suite abilities; name other data"):
        scene_rows("abilities", 3, 0)
