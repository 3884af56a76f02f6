"""Objects that texts name: sentences counted by hand, plurals, names of several words, and files of synonyms."""

from pathlib import Path

import pytest

from recipes_minigpt4.evaluation.objects import COCO_SYNONYMS, Synonyms, open_synonyms, plurals_of
from recipes_minigpt4.utils.errors import RecipeError


COUNTED = {  # sentence → the objects that it names, in order
    "A man eats a hot dog while his dog waits.": ["person", "hot dog", "dog"],
    "Two hot dogs and a hotdog on a paper plate.": ["hot dog", "hot dog"],
    "The bowl is hot. Dogs are not allowed.": ["bowl", "dog"],
    "The soup is hot, dog lovers say.": ["dog"],
    "A teddy bear sits between two bears.": ["teddy bear", "bear"],
    "Toy bears, stuffed bears and a polar bear.": ["teddy bear", "teddy bear", "bear"],
    "A white toilet with its toilet seat up and a toilet bowl.": ["toilet", "toilet", "toilet"],
    "Plates and glasses stand on the dining table.": ["dining table"],
    "There is a baby bed beside the bed.": ["bed", "bed"],
    "A baby elephant walks behind an elephant.": ["elephant", "elephant"],
    "A baby eats cake.": ["person", "cake"],
    "Three wine glasses, two knives and a glass of wine.": ["wine glass", "knife", "wine glass"],
    "People ride buses, bicycles and motor bikes.": ["person", "bus", "bicycle", "motorcycle"],
    "Women and children feed geese and sheep.": ["person", "person", "bird", "sheep"],
    "A policeman's horse and two policemen's bikes.": ["person", "horse", "person", "bicycle"],
    "The skier carries her skis to the ski lift.": ["person", "skis"],
    "A fire hydrant and a parking meter near a stop sign.": ["fire hydrant", "parking meter", "stop sign"],
    "Traffic lights hang over the train tracks; a train car passes.": ["traffic light", "train"],
    "A batter with a baseball bat and a catcher's mitt": ["person", "baseball bat", "baseball glove"],
    "Cell phones, a TV and a remote control on the couch": ["cell phone", "tv", "remote", "couch"],
    "An orange and white cat in an orange shirt.": ["cat"],
    "Oranges and an orange on a plate beside orange juice.": ["orange", "orange"],
    "A computer mouse, a mouse pad and mice.": ["mouse", "mouse"],
    "A bow tie, a tie-dye shirt and neckties.": ["tie", "tie"],
    "An air plane, two planes and a fighter jet": ["airplane", "airplane", "airplane"],
    "Pizza boxes, slices of pizza, a pizza oven": ["pizza", "oven"],
    "A couple of sheep dogs chase a couple on skateboards.": ["dog", "person", "skateboard"],
    "A hair dryer, toothbrushes and scissors beside the sink.": ["hair drier", "toothbrush", "scissors", "sink"],
    "POTTED PLANTS; a house-plant!": ["potted plant", "potted plant"],
    "A crowd of people with ball caps takes a chair lift to the man-made lake.": ["person"],
    "Nothing but sky, grass and catsup.": [],
    "": [],
}


@pytest.mark.parametrize("sentence", COUNTED)
def test_sentences_counted_by_hand(sentence: str) -> None:
    assert open_synonyms().named(sentence) == COUNTED[sentence]


def test_all_eighty_kinds_are_known_by_their_names_and_plurals() -> None:
    synonyms = open_synonyms()
    assert len(synonyms.kinds) == 80
    for kind in synonyms.kinds - {"orange"}:  # a colour, unless the words around it say otherwise
        for name in (
            kind,
            *(f"{kind[: -len(last)]}{plural}" for last in [kind.split()[-1]] for plural in plurals_of(last)),
        ):
            assert synonyms.named(f"Here: {name}.") == [kind]
    assert synonyms.kind("orange") == "orange"


def test_a_line_of_the_table_is_about_one_kind() -> None:
    lines = [line.split("#")[0] for line in COCO_SYNONYMS.read_text(encoding="utf-8").splitlines()]
    words = [word.strip() for line in lines for word in line.split(",")[1:]]
    assert sorted({word for word in words if words.count(word) > 1}) == []


@pytest.mark.parametrize(
    ("word", "plural"),
    [("dog", "dogs"), ("bus", "buses"), ("couch", "couches"), ("puppy", "puppies"), ("toy", "toys"), ("man", "men"),
     ("woman", "women"), ("human", "humans"), ("child", "children"), ("knife", "knives"), ("giraffe", "giraffes")],
)  # fmt: skip
def test_plurals(word: str, plural: str) -> None:
    assert plurals_of(word) == [plural]


def test_synonyms_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "ours.txt").write_text("# hues\nred square, crimson box\nbox\n-, box office\n", encoding="utf-8")
    synonyms = open_synonyms(tmp_path / "ours.txt")
    text = "A box, two crimson boxes and Red Squares at the box office"
    assert synonyms.named(text) == ["box", "red square", "red square"]
    assert synonyms.kind("crimson box") == "red square" and synonyms.kind("crimson") is None


def test_a_file_of_synonyms_that_is_missing_or_empty_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"--synonyms .*none\.txt cannot be read .*name a file"):
        open_synonyms(tmp_path / "none.txt")
    with pytest.raises(RecipeError, match=r"--synonyms .*empty\.txt is empty; write lines"):
        open_synonyms(tmp_path / "empty.txt")


def test_what_is_written_down_counts_more_than_a_rule() -> None:
    assert Synonyms([["glass"], ["glasses", "spectacles"]]).named("glasses, a glass") == ["glasses", "glass"]
