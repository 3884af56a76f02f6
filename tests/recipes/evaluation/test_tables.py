"""Evaluation data as it is published: COCO's, A-OKVQA's, GQA's and POPE's files, tables, folders; and what is not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import PIL.Image
import pytest

from recipes_minigpt4.evaluation import evaluate
from recipes_minigpt4.evaluation.opening import open_questions
from recipes_minigpt4.evaluation.questions import Question
from recipes_minigpt4.evaluation.suites import SUITES
from recipes_minigpt4.evaluation.tables import Places, open_rows
from recipes_minigpt4.utils.errors import RecipeError


NAMES = ("000000000007.jpg", "000000000042.jpg", "n15.jpg")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures under the names that COCO and GQA give them."""
    (tmp_path / "pictures").mkdir()
    for number, name in enumerate(NAMES):
        PIL.Image.new("RGB", (4, 4), (90 * number, 0, 0)).save(tmp_path / "pictures" / name)
    return tmp_path


@pytest.fixture
def write(folder: Path) -> Callable[[str, Any], str]:
    def write_file(name: str, content: Any) -> str:
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
        return str(folder / name)

    return write_file


def ask(suite: str, folder: Path, data: str, *options: str) -> list[Question]:
    """What a suite asks about data, as `minigpt4 evaluate` opens them."""
    args = evaluate.parse(["--data", f"{suite}={data}", "--images", str(folder / "pictures"), *options])
    return open_questions(SUITES[suite](), args)


COCO_IMAGES = [{"id": 7, "file_name": NAMES[0]}, {"id": 42, "file_name": NAMES[1]}]
CAPTIONS = {
    "images": COCO_IMAGES,
    "annotations": [
        {"image_id": 42, "caption": "A cat."},
        {"image_id": 7, "caption": "A man with a dog."},
        {"image_id": 7, "caption": "A hot dog."},
    ],
}
INSTANCES = {
    "images": COCO_IMAGES,
    "categories": [{"id": 18, "name": "dog"}, {"id": 17, "name": "cat"}, {"id": 55, "name": "orange"}],
    "annotations": [
        {"image_id": 7, "category_id": 18},
        {"image_id": 7, "category_id": 55},
        {"image_id": 7, "category_id": 18},
    ],
}
AOKVQA = [
    {"split": "val", "image_id": 42, "question": "What?", "choices": ["a", "b", "c", "d"], "correct_choice_idx": 2,
     "direct_answers": ["c"] * 10, "rationales": ["because"]},
]  # fmt: skip
GQA = {
    "201": {"imageId": "n15", "question": "Is it red?", "answer": "yes", "isBalanced": True},
    "202": {"imageId": "n15", "question": "What is it?", "answer": "cup", "isBalanced": True},
}
POPE = [
    {"question_id": 1, "image": NAMES[0], "text": "Is there a dog in the image?", "label": "yes"},
    {"question_id": 2, "image": NAMES[0], "text": "Is there a car in the image?", "label": "no"},
]


def test_coco_captions(folder: Path, write: Callable) -> None:
    questions = ask("coverage", folder, write("captions.json", CAPTIONS))
    assert [question.picture.name for question in questions] == [NAMES[0], NAMES[1]]
    assert [question.facts["captions"] for question in questions] == [["A man with a dog.", "A hot dog."], ["A cat."]]
    assert questions[1].picture.open().size == (4, 4)


def test_coco_instances_and_captions(folder: Path, write: Callable) -> None:
    instances, captions = write("instances.json", INSTANCES), write("captions.json", CAPTIONS)
    told = [question.facts["objects"] for question in ask("chair", folder, f"{instances},{captions}")]
    assert told == [["dog", "hot dog", "orange", "person"]] * 2 + [["cat"]] * 2
    alone = [question.facts["objects"] for question in ask("chair", folder, instances)]
    assert alone == [["dog", "orange"]] * 2 + [[]] * 2


def test_aokvqa(folder: Path, write: Callable) -> None:
    opened, listed = ask("aokvqa", folder, write("aokvqa_v1p0_val.json", AOKVQA))
    assert opened.picture.name == NAMES[1] and opened.choices == ("a", "b", "c", "d") and opened.facts["right"] == 2
    assert listed.prompt == "What? Choose one of these answers: a, b, c, d."


def test_gqa(folder: Path, write: Callable) -> None:
    questions = ask("gqa", folder, write("testdev_balanced_questions.json", GQA))
    assert [(question.picture.name, question.facts["answer"]) for question in questions] == [
        ("n15.jpg", "yes"),
        ("n15.jpg", "cup"),
    ]


@pytest.mark.parametrize("name", ["coco_pope_random.json", "pope.jsonl"])
def test_pope_has_a_row_per_line_whatever_its_name(name: str, folder: Path, write: Callable) -> None:
    yes, no = ask("pope", folder, write(name, "\n".join(map(json.dumps, POPE)) + "\n"))
    assert (yes.prompt, yes.facts["there"], no.facts["there"]) == ("Is there a dog in the image?", True, False)


def test_settings_of_pope_in_one_table_keep_their_weight(folder: Path, write: Callable) -> None:
    rows = [{"image": NAMES[0], "question": "Is there a dog?", "answer": "yes", "category": name} for name in "abc"]
    (question,) = ask("pope", folder, write("rows.jsonl", "\n".join(map(json.dumps, rows))))
    assert question.facts["times"] == 3


def test_a_table_with_pictures_inside(folder: Path) -> None:
    columns = {"image": datasets.Image(), "question": datasets.Value("string"), "answer": datasets.Value("string")}
    stored = [{"bytes": (folder / "pictures" / name).read_bytes(), "path": None} for name in NAMES]
    rows = [{"image": one, "question": "What?", "answer": "it"} for one in stored]
    datasets.Dataset.from_list(rows, features=datasets.Features(columns)).to_parquet(folder / "rows.parquet")
    questions = ask("gqa", folder, str(folder / "rows.parquet"))
    assert len(questions) == 3 and all(isinstance(question.picture.source, bytes) for question in questions)
    assert questions[0].picture.digest == open_rows(Places([str(folder / "pictures")]))[0]["image"].digest


def test_a_folder_with_metadata_and_names_without_the_machines_folders(folder: Path, write: Callable) -> None:
    rows = [{"file_name": name, "question": "What?", "answer": name} for name in NAMES]
    write("pictures/metadata.jsonl", "\n".join(map(json.dumps, rows)))
    questions = ask("gqa", folder, str(folder / "pictures"), "--split", "train")
    assert [question.picture.name for question in questions] == list(NAMES)
    assert [question.facts["answer"] for question in questions] == list(NAMES)
    with pytest.raises(RecipeError, match=r"with the split validation cannot be opened .*'train'"):
        ask("gqa", folder, str(folder / "pictures"))


def test_a_folder_of_kinds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, kind in enumerate(("meme", "poem")):
        (folder / "ours" / kind).mkdir(parents=True)
        PIL.Image.new("RGB", (4, 4), (0, 0, 90 * number)).save(folder / "ours" / kind / "1.png")
    monkeypatch.chdir(folder)
    args = evaluate.parse(["--data", "ours"])
    questions = open_questions(SUITES["abilities"](), args)
    assert [(question.picture.name, question.facts["kind"]) for question in questions] == [
        ("meme/1.png", "meme"),
        ("poem/1.png", "poem"),
    ]
    with pytest.raises(
        RecipeError, match="Row 0 of pictures has no `kind` of meme, recipe, ad, poem, which the suite"
    ):
        open_questions(SUITES["abilities"](), evaluate.parse(["--data", "pictures"]))


def test_a_sample_is_the_same_every_time(folder: Path, write: Callable) -> None:
    rows = [{"image": NAMES[0], "question": f"What, {number}?", "answer": "it"} for number in range(20)]
    data = write("rows.jsonl", "\n".join(map(json.dumps, rows)))
    one, same, other = (
        [question.prompt for question in ask("gqa", folder, data, "--num_samples", "5", "--seed", seed)]
        for seed in "001"
    )
    assert len(one) == 5 and one == same and one != other


@pytest.mark.parametrize(
    ("suite", "content", "told"),
    [
        ("captions", "{", r"cannot be read as JSON \(.*\); fetch it again"),
        ("captions", {"images": [{"id": 1}], "annotations": []}, "is not as COCO's files are .*'file_name'"),
        ("captions", {"images": COCO_IMAGES, "annotations": [{"image_id": 3}]}, "is not as COCO's files are"),
        ("captions", {"images": COCO_IMAGES}, "is not as COCO's files are .*'annotations'"),
        ("captions", {"info": 1}, "is neither COCO's, .* nor a list of objects"),
        ("captions", [], "holds no rows"),
        ("captions", [{"caption": "a"}], "Row 0 of .* names no picture; it has caption, and needs `image`"),
        ("captions", [{"image": NAMES[0]}], "Row 0 of .* has no `captions`, which the suite captions needs; it takes"),
        ("captions", [{"image": "gone.jpg", "caption": "a"}], "1 of 1 pictures of .* are not in .*, gone.jpg among"),
        ("chair", CAPTIONS, "Row 0 of .* has no list of `objects`, which the suite chair needs; it takes"),
        ("aokvqa", [{**AOKVQA[0], "correct_choice_idx": None}], "Row 0 of .* has no `correct_choice_idx`"),
        ("aokvqa", [{**AOKVQA[0], "image_id": 9}], "1 of 1 pictures of .* are not in .*, 000000000009.jpg among them"),
        ("gqa", GQA | {"203": {"imageId": "n15", "question": "Who?"}}, "Row 2 of .* has no `answer`"),
        ("pope", [{"image": NAMES[0], "text": "Is it?"}], "Row 0 of .* has no `label` of yes or no"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told_in_a_sentence(
    suite: str, content: Any, told: str, folder: Path, write: Callable
) -> None:
    with pytest.raises(RecipeError, match=told) as error:
        ask(suite, folder, write("data.json", content))
    assert "\n" not in str(error.value)


def test_files_of_several_kinds_are_refused(folder: Path, write: Callable) -> None:
    both = f"{write('captions.json', CAPTIONS)},{write('gqa.json', GQA)}"
    with pytest.raises(RecipeError, match="are not all COCO's files"):
        ask("captions", folder, both)


def test_a_place_that_is_not_there(folder: Path) -> None:
    with pytest.raises(RecipeError, match="with --data") as error:
        ask("captions", folder, str(folder / "none"))
    assert "--dataset_name" not in str(error.value)


def test_a_suite_without_data_names_what_it_takes(folder: Path) -> None:
    args = evaluate.parse(["--data", "gqa=rows.json"])
    with pytest.raises(RecipeError, match=r"The suite pope has no data; name POPE's files .* with --data pope=PLACE"):
        open_questions(SUITES["pope"](), args)
