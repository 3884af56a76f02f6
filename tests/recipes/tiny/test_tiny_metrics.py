"""What replies are measured with, on texts written by hand."""

import random
from collections import Counter

import pytest

from recipes_minigpt4.tiny import metrics
from recipes_minigpt4.tiny.scenes import Scene, Thing, describe, sample_scenes


CIRCLE = Thing("small", "red", "circle", "top", "left")
STAR = Thing("large", "blue", "star", "middle", "centre")
ONE, TWO, TWINS = Scene((CIRCLE,), "grey"), Scene((CIRCLE, STAR), "grey"), Scene((CIRCLE, CIRCLE), "grey")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", {}),
        ("A red circle.", {("red", "circle"): 1}),
        ("Two RED circles and a blue star", {("red", "circle"): 1, ("blue", "star"): 1}),
        ("a red circle, a red circle", {("red", "circle"): 2}),
        ("The circle is red.", {}),
        ("a red big circle", {}),
        ("scarred circle, red circlet", {}),
    ],
)
def test_named_objects(text, named):
    assert metrics.named_objects(text) == Counter(named)


@pytest.mark.parametrize(
    ("text", "placed"),
    [
        ("There is a red circle in the top left.", {("red", "circle", "top left"): 1}),
        ("In the centre sits a blue star.", {("blue", "star", "centre"): 1}),
        ("A red circle. It is in the top left.", {}),
        (
            "In the top left there is a red circle, in the centre a blue star.",
            {("red", "circle", "top left"): 1, ("blue", "star", "centre"): 1},
        ),
        (
            "A red circle and a blue star in the centre.",
            {("red", "circle", "centre"): 1, ("blue", "star", "centre"): 1},
        ),
    ],
)
def test_placed_objects(text, placed):
    assert metrics.placed_objects(text) == Counter(placed)


@pytest.mark.parametrize(
    ("text", "scene", "f1"),
    [
        ("A red circle.", ONE, 1.0),
        ("A red circle.", TWO, 2 / 3),
        ("A red circle and a blue star.", TWO, 1.0),
        ("A red circle and a red circle.", ONE, 2 / 3),
        ("A red circle.", TWINS, 2 / 3),
        ("A blue circle.", ONE, 0.0),
        ("Nothing.", ONE, 0.0),
    ],
)
def test_object_f1(text, scene, f1):
    assert metrics.object_f1([text], [scene]) == pytest.approx(f1)


def test_object_f1_counts_over_all_scenes():
    texts = ["A red circle.", "A red circle and a green heart."]
    assert metrics.object_f1(texts, [ONE, TWO]) == pytest.approx(2 * 2 / (3 + 3))


@pytest.mark.parametrize(
    ("text", "accuracy"),
    [
        ("A red circle in the top left. In the centre there is a blue star.", 1.0),
        ("A red circle in the top left.", 0.5),
        ("A red circle in the top right and a blue star in the centre.", 0.5),
        ("A red circle and a blue star.", 0.0),
    ],
)
def test_position_accuracy(text, accuracy):
    assert metrics.position_accuracy([text], [TWO]) == accuracy


@pytest.mark.parametrize(
    ("text", "fails", "repeats"),
    [
        ("There is a red circle. The rest is empty.", False, False),
        ("There is a red circle!\nIs there more?", False, False),
        ("", True, True),
        ("   \n", True, True),
        ("There is a red circle. The rest is", True, False),
        ("a red circle\nThe rest is empty.", True, False),
        ("There is a red circle. there is a red circle!", True, True),
        ("There is a red circle. there is a red circle", True, True),
        ("A red circle and and a star.", False, False),
        ("A red red red circle.", True, True),
        ("A red circle, a red circle, a red circle.", True, True),
        ("A red circle, a blue circle, a green circle.", False, False),
    ],
)
def test_failures(text, fails, repeats):
    assert metrics.is_failure(text) is fails
    assert metrics.is_repetitive(text) is repeats


def test_score_holds_the_four_numbers_of_the_table():
    texts = ["There is a red circle in the top left.", "a blue star"]
    assert metrics.score(texts, [ONE, TWO]) == {
        "object_f1": pytest.approx(2 * 2 / 5),
        "position_accuracy": pytest.approx(1 / 3),
        "failure_rate": 0.5,
        "mean_words": 6.0,
    }


def test_texts_and_scenes_must_be_as_many():
    with pytest.raises(ValueError, match="zip"):
        metrics.score(["one"], [ONE, TWO])


# ---- marks ----------------------------------------------------------------------------------------------------------


def marked(text: str, scene: Scene) -> list[str]:
    """`+words` for every mark that is right, `-words` for every wrong one."""
    return ["-+"[right] + text[start:end] for start, end, right in metrics.mark(text, scene)]


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("A Red circle in the Top left. In the centre a blue star.", "+Red circle +Top left +centre +blue star"),
        ("A red circle in the top right.", "+red circle -top right"),
        ("A green circle in the top left.", "-green circle"),  # its place is neither right nor wrong
        ("A red circle. A red circle.", "+red circle -red circle"),
        ("A red circle and a blue star in the centre.", "+red circle +blue star -centre"),
        ("İİ a red circle", "+red circle"),  # which is longer in lower case
        ("Nothing at all.", ""),
    ],
)
def test_marks(text, marks):
    assert " ".join(marked(text, TWO)) == marks


def test_marks_count_what_the_scores_count():
    rng = random.Random(3)
    chosen = sample_scenes(rng, 200, lambda scene: True)
    texts = [describe(scene, rng) for scene in chosen]
    shuffled = texts[1:] + texts[:1]
    for said in (texts, shuffled):
        objects = placed = 0
        for text, scene in zip(said, chosen, strict=True):
            right = [text[start:end] for start, end, right in metrics.mark(text, scene) if right]
            objects += sum(metrics.named_objects(part).total() for part in right)
            placed += sum(not metrics.named_objects(part) for part in right)
        things = sum(len(scene.things) for scene in chosen)
        named = sum(metrics.named_objects(text).total() for text in said)
        assert 2 * objects / (named + things) == pytest.approx(metrics.object_f1(said, chosen))
        assert placed / things == pytest.approx(metrics.position_accuracy(said, chosen), abs=0.02)


def test_what_a_reply_leaves_out():
    assert metrics.unnamed_objects("A red circle.", TWO) == ["blue star"]
    assert metrics.unnamed_objects("A red circle.", TWINS) == ["red circle"]
    assert metrics.unnamed_objects("A blue star and a red circle.", TWO) == []
