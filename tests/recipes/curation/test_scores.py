"""Scores: the match of every sentence with its picture, a judge's marks, and that nothing is computed twice."""

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from closeness import assert_close
from transformers import AutoImageProcessor, AutoTokenizer, Blip2ForImageTextRetrieval, CLIPModel, SiglipModel

from recipes_minigpt4.curation import scores
from recipes_minigpt4.curation.curate import read_prompt
from recipes_minigpt4.curation.matching import open_matcher
from recipes_minigpt4.curation.options import build_parser
from recipes_minigpt4.curation.score_judge import read_marks
from recipes_minigpt4.curation.scores import scored, sentences_to_match
from recipes_minigpt4.evaluation.speakers import SpeakerOptions
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE
from recipes_minigpt4.tiny.scenes import evaluation_scenes
from recipes_minigpt4.utils.errors import RecipeError


CPU = SpeakerOptions("cpu", "float32")
TEXTS = (
    "In the top left there is a red square. In the middle there is a blue circle.",
    "A large green star is in the bottom right.",
    "There is a yellow heart. There is a small red ring. There is a blue cross in the top right.",
)
KINDS = ("clip", "siglip", "itm")


def options(*more: str) -> argparse.Namespace:
    return build_parser("curate").parse_args(["--device", "cpu", "--dtype", "float32", "--batch_size", "2", *more])


def told(folder: Path, rows: list, *more: str) -> list:
    return scored(folder, rows, options(*more), read_prompt)[0]


# ---- the match ------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def by_the_model_itself(kind: str, folder: Path, picture, sentence: str) -> float:
    """One picture and one sentence, by transformers' own forward."""
    pixels = AutoImageProcessor.from_pretrained(folder)(picture, return_tensors="pt")["pixel_values"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if kind == "itm":
        model = Blip2ForImageTextRetrieval.from_pretrained(folder)
        out = model(**_words(tokenizer(sentence, return_tensors="pt")), pixel_values=pixels,
                    use_image_text_matching_head=True)  # fmt: skip
        return float(out.logits_per_image.softmax(-1)[0, 1])
    if kind == "siglip":
        ids = tokenizer(sentence.lower(), padding="max_length", max_length=16, return_tensors="pt")["input_ids"]
        out = SiglipModel.from_pretrained(folder)(input_ids=ids, pixel_values=pixels)
    else:
        out = CLIPModel.from_pretrained(folder)(
            **_words(tokenizer(sentence, return_tensors="pt")), pixel_values=pixels
        )
    return float(torch.nn.functional.cosine_similarity(out.text_embeds, out.image_embeds))


def _words(written) -> dict:
    return {name: written[name] for name in ("input_ids", "attention_mask")}


@pytest.mark.parametrize("kind", KINDS)
def test_sentences_are_matched_one_by_one_as_the_model_itself_does(kind: str, matcher_folder: Callable) -> None:
    matcher = open_matcher(str(matcher_folder(kind)), CPU)
    pictures = [image for image, _ in evaluation_scenes(3, 1)]
    sentences = [sentences_to_match(text, matcher) for text in TEXTS]
    assert [len(of_picture) for of_picture in sentences] == [2, 1, 3]
    found = matcher.match(pictures, sentences)
    for picture, of_picture, numbers in zip(pictures, sentences, found, strict=True):
        wanted = [by_the_model_itself(kind, matcher_folder(kind), picture, sentence) for sentence in of_picture]
        assert_close(torch.tensor(numbers), torch.tensor(wanted))
    flat = [number for numbers in found for number in numbers]
    assert max(flat) - min(flat) > 0.01


def test_no_sentence_is_longer_than_the_model_sees(matcher_folder: Callable) -> None:
    matcher = open_matcher(str(matcher_folder("clip")), CPU)
    long = "In the top left there is a red square, in the middle a blue circle, and in the bottom right a green star."
    pieces = sentences_to_match(f"{long} There is a heart.", matcher)
    assert all(matcher.tokens(piece) <= 16 for piece in pieces)
    assert " ".join(pieces) == f"{long} There is a heart." and pieces[-1] == "There is a heart."
    assert matcher.tokens(long) > 16


def test_mean_and_minimum_are_kept_and_computed_once(
    curated: Callable, matcher_folder: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = curated(*TEXTS, None)
    match = ("--match", str(matcher_folder("clip")))
    found = told(folder, rows, *match)
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    assert [len(line["sentences"]) for line in lines] == [2, 1, 3]
    for row, line in zip(found, lines, strict=False):
        assert row.scores["match_mean"] == pytest.approx(sum(line["sentences"]) / len(line["sentences"]))
        assert row.scores["match_min"] == min(line["sentences"])
        assert row.scores["length"] == len(row.text.split())
    assert found[3].scores == {}
    assert [row.verdicts for row in found] == [row.verdicts for row in rows]  # scores drop nothing

    seen = []
    open_real = scores.open_matcher

    def counting(*args):
        matcher = open_real(*args)
        match = matcher.match
        matcher.match = lambda pictures, texts: seen.extend(texts) or match(pictures, texts)
        return matcher

    monkeypatch.setattr(scores, "open_matcher", counting)
    assert told(folder, rows, *match) == found and seen == []
    _, changed = curated(TEXTS[0], "A large red star is in the bottom right.", TEXTS[2], None)
    again = told(folder, changed, *match)
    assert seen == [["A large red star is in the bottom right."]]
    assert again[0].scores == found[0].scores and again[1].scores != found[1].scores


def test_what_does_not_match_pictures_is_refused(matcher_folder: Callable, tmp_path: Path, blip2_captions) -> None:
    for place, what in ((LANGUAGE_BACKBONE, "cannot be loaded|is a llama"), (blip2_captions, "lacks ")):
        with pytest.raises(RecipeError, match=rf"--match .* ({what})"):
            open_matcher(str(place), CPU)
    with pytest.raises(RecipeError, match="cannot be loaded"):
        open_matcher(str(tmp_path), CPU)


@pytest.fixture(scope="module")
def blip2_captions(tmp_path_factory: pytest.TempPathFactory, matcher_folder: Callable) -> Path:
    """A BLIP-2 without a matching head, whose weights would be random."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("captions")
    for file in matcher_folder("itm").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if not name.startswith("itm_head")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_picture_that_is_gone_is_named(curated: Callable, matcher_folder: Callable) -> None:
    folder, rows = curated(*TEXTS)
    (folder / rows[2].file).unlink()
    with pytest.raises(RecipeError, match=r"The picture .*\.png cannot be read .*; put it back"):
        told(folder, rows, "--match", str(matcher_folder("clip")))
    assert len((folder / "scores.jsonl").read_text().splitlines()) == 2  # the batch before is kept


# ---- the judge ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "marks"),
    [
        ("relevance: 4\ncorrectness: 3\nform: 5", (4, 3, 5)),
        ("**Relevance:** 4/5, **Correctness**: 1 / 5, **Form** – 2.", (4, 1, 2)),
        ('{"relevance": 5, "correctness": 5, "form": "5"}', (5, 5, 5)),
        ("relevance 4 correctness 3 form 5", (4, 3, 5)),
        ("relevance: 4\ncorrectness: 3", None),
        ("relevance: 4\ncorrectness: 6\nform: 5", None),
        ("relevance: 4\ncorrectness: 3.5\nform: 5", None),
        ("relevance: 4\ncorrectness: 35\nform: 5", None),
        ("relevance: 4 / 10\ncorrectness: 3\nform: 5", None),
        ("relevance: 4/10\ncorrectness: 3\nform: 5", None),
        ("relevance: 4\nrelevance: 2\ncorrectness: 3\nform: 5", None),
        ("All is well: 5 of 5.", None),
        ("", None),
    ],
)
def test_marks_are_read_and_never_guessed(answer: str, marks: tuple | None) -> None:
    found = read_marks(answer)
    assert found == (marks and dict(zip(("relevance", "correctness", "form"), marks, strict=True)))


@pytest.fixture
def judge(tmp_path: Path) -> tuple[str, str]:
    lines = [
        {"match": "Draft: Draft 0.*red square", "answer": "relevance: 5\ncorrectness: 4\nform: 3"},
        {"match": "green star", "answer": "Very nice!"},
        {"match": "yellow heart", "failure": "the server is asleep"},
    ]
    (tmp_path / "judge.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return "--score_judge", f"stub:{tmp_path / 'judge.jsonl'}"


def test_a_judge_gives_marks_and_what_cannot_be_read_is_counted(curated: Callable, judge, capsys) -> None:
    folder, rows = curated(*TEXTS)
    found = told(folder, rows, *judge)
    length = {"length": found[0].scores["length"]}
    assert found[0].scores == {**length, "relevance": 5, "correctness": 4, "form": 3, "judge": 4}
    assert "judge" not in found[1].scores and "judge" not in found[2].scores
    assert (
        "1 answers of the judge could not be read and 1 did not come (the server is asleep)" in capsys.readouterr().out
    )
    before = (folder / "scores.jsonl").read_text()
    assert told(folder, rows, *judge) == found
    assert (folder / "scores.jsonl").read_text() == before


def test_a_judge_that_sees_gets_the_picture_and_no_draft(curated: Callable) -> None:
    from recipes_minigpt4.curation.score_judge import ScoreJudge
    from recipes_minigpt4.llm.stub import stub_client

    folder, rows = curated(*TEXTS)
    request = ScoreJudge(stub_client(lambda _: ""), "Rate it.", sees=True).request(folder, rows[0])
    system, user = request.messages
    assert system["content"] == "Rate it."
    assert user["content"][0]["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
    assert user["content"][1]["text"] == f"Description: {TEXTS[0]}"


def test_both_scores_stand_in_one_row(curated: Callable, judge, matcher_folder: Callable) -> None:
    folder, rows = curated(*TEXTS)
    found = told(folder, rows, *judge, "--match", str(matcher_folder("siglip")))
    assert {"length", "match_mean", "match_min", "relevance", "judge"} <= set(found[0].scores)
