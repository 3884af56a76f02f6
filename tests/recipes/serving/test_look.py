"""What a model gets to read and to see: the prompt with the places of its pictures, and maps, on the page too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from recipes_minigpt4.serving.attention import Maps
from recipes_minigpt4.serving.look import Piece, Prompt, draw_map, draw_maps, look, prompt_html
from recipes_minigpt4.serving.models import Talker
from recipes_minigpt4.utils.errors import RecipeError


ASKED = "What is <b>this</b>?"


# ---- the prompt -----------------------------------------------------------------------------------------------------


def test_the_prompt_is_what_the_chat_gives_the_model(talkers: dict[str, Talker], scenes: list[Any]) -> None:
    prompt, looks = look(talkers["ours"], ASKED, scenes[:2])
    places = [piece for piece in prompt.pieces if piece.picture]
    queries = talkers["ours"].speaker.model.config.num_query_tokens
    assert [(piece.picture, piece.tokens) for piece in places] == [(1, queries), (2, queries)]
    processor = talkers["ours"].speaker.processor
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": ASKED}]
    chat = [{"role": "user", "content": content}]
    expected = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    told = "".join("<image>" if piece.picture else piece.text for piece in prompt.pieces)
    assert told.removeprefix("<s>") == expected.removeprefix("<s>") and ASKED in told
    ids = processor(text=[expected], images=[scenes[:2]], add_special_tokens=not expected.startswith("<s>"))
    assert prompt.tokens == len(ids["input_ids"][0])
    assert len(looks) == 2
    assert not torch.equal(looks[0].maps().patches, looks[1].maps().patches)


def test_a_typed_placeholder_is_text(talkers: dict[str, Talker], scenes: list[Any]) -> None:
    prompt, _ = look(talkers["ours"], "Is <image> a word?", scenes[:1])
    assert [piece.picture for piece in prompt.pieces] == [0, 1, 0]
    assert "Is <image> a word?" in prompt.pieces[-1].text


@pytest.mark.parametrize(("kind", "has_maps"), [("blip2", True), ("llava", False), ("instructblip", False)])
def test_models_of_other_kinds_show_their_prompts(
    kind: str, has_maps: bool, talkers: dict[str, Talker], scenes: list[Any]
) -> None:
    prompt, looks = look(talkers[kind], "What is this?", scenes[:1])
    assert [piece.picture for piece in prompt.pieces if piece.picture] == [1]
    assert sum(piece.tokens for piece in prompt.pieces if piece.picture) > 1
    assert "What is this?" in "".join(piece.text for piece in prompt.pieces)
    assert len(looks) == has_maps


def test_what_cannot_be_shown_gets_a_sentence(talkers: dict[str, Talker], scenes: list[Any]) -> None:
    with pytest.raises(RecipeError, match="There is no picture to look at; add one"):
        look(talkers["ours"], ASKED, [])
    with pytest.raises(RecipeError, match="blip2 takes one picture, and these are 2; leave some out"):
        look(talkers["blip2"], ASKED, scenes[:2])


def test_places_are_marked_and_words_are_only_words() -> None:
    prompt = Prompt([Piece("<s>A ", tokens=2), Piece(picture=1, tokens=32), Piece(" <script>", tokens=3)], 40)
    html = prompt_html(prompt)
    assert "<mark>picture 1 · 32 tokens</mark>" in html and "&lt;script&gt;" in html and "<script>" not in html
    assert (
        "37 tokens: 32 of 1 picture, 5 of text. The model&#x27;s window has 40, so 3 are left for the reply." in html
    )
    assert Prompt(prompt.pieces, 37).told.endswith("so nothing is left for a reply.")
    assert Prompt(prompt.pieces, None).told == "37 tokens: 32 of 1 picture, 5 of text."


# ---- maps -----------------------------------------------------------------------------------------------------------

MAPS = Maps(
    torch.tensor([[[0.1, 0.2, 0.0], [0.0, 0.0, 0.6]], [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]]), torch.tensor([0.1, 0])
)


def test_a_map_says_where_it_is_brightest() -> None:
    picture = Image.new("RGB", (90, 60), "grey")
    drawn, told = draw_map(picture, MAPS, 1)
    assert drawn.size == (90, 60)
    assert told == (
        "2 × 3 patches. The brightest, in row 2 and column 3, has 60.0%. 10.0% is on tokens of the encoder that are "
        "no patches, such as CLS."
    )
    light = np.asarray(drawn.convert("L"))
    assert np.unravel_index(light.argmax(), light.shape) == (30, 60)
    _, told = draw_map(picture, MAPS, 2)
    assert told == "2 × 3 patches. The brightest, in row 1 and column 1, has 100.0%."
    _, told = draw_map(picture, MAPS, 0)
    assert "row 1 and column 1, has 55.0%. 5.0% is on tokens" in told
    with pytest.raises(RecipeError, match="There are 2 image tokens, and no number 3"):
        draw_map(picture, MAPS, 3)
    small = list(draw_maps(Image.new("RGB", (900, 600), "grey"), MAPS))
    assert [(one.size, name) for one, name in small] == [((192, 128), "1"), ((192, 128), "2")]


# ---- on the page ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(talkers: dict[str, Talker]) -> Iterator[Any]:
    app_server = pytest.importorskip("app_server")
    with app_server.serve({kind: talkers[kind] for kind in ("ours", "llava")}) as page:
        yield page


def test_the_page_shows_prompt_and_maps(
    served: Any, talkers: dict[str, Talker], scenes: list[Image.Image], tmp_path: Path
) -> None:
    import app_server
    from gradio_client.exceptions import AppError

    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for scene, path in zip(scenes, paths, strict=False):
        scene.resize((900, 600)).save(path)
    with app_server.person(served, tmp_path / "told") as client:
        shown = client.predict(app_server.message(ASKED, *paths), "ours", api_name="/look")
        html, number, layer, token, large, told, gallery = shown
        assert "picture 2 ·" in html and "&lt;b&gt;this" in html
        queries = talkers["ours"].speaker.model.config.num_query_tokens
        assert (number["maximum"], token["maximum"], len(gallery)) == (2, queries, queries)
        assert [value for _, value in layer["choices"]][:: len(layer["choices"]) - 1] == ["last", "rollout"]
        assert Image.open(large).size == (768, 512) and "6 × 6 patches" in told
        seen = [client.predict(*chosen, api_name="/look_at_token") for chosen in ((1, "last", 2), (2, "rollout", 2))]
        _, looks = look(talkers["ours"], ASKED, [Image.open(path) for path in paths])
        expected = [looks[0].maps(), looks[1].maps("rollout")]
        assert [told for _, told in seen] == [draw_map(scenes[0], maps, 2)[1] for maps in expected]
        html, *_ = client.predict(app_server.message(ASKED, paths[0]), "llava", api_name="/look")
        assert "picture 1 ·" in html
        with pytest.raises(AppError, match="There is no picture to look at; add one"):
            client.predict(app_server.message(ASKED), "ours", api_name="/look")
