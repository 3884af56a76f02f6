"""The generated world: the same for everybody, true to its words, and split into what trains and what measures."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from PIL import Image

from recipes_minigpt4.tiny import corpus, metrics, pretrain, scenes
from recipes_minigpt4.tiny.scenes import HELD_OUT_PAIRS, Scene, Thing


def content(scene: Scene) -> Scene:
    return replace(scene, jitter=0)


def sample(count: int, seed: int = 7) -> list[Scene]:
    return scenes.sample_scenes(random.Random(seed), count, lambda scene: True)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Scene]:
    """Every scene that is drawn from now on; the pictures themselves are left blank."""
    seen: list[Scene] = []

    def record(scene: Scene, size: int = 96) -> Image.Image:
        seen.append(scene)
        return Image.new("RGB", (size, size))

    monkeypatch.setattr(scenes, "draw_scene", record)
    monkeypatch.setattr(pretrain, "draw_scene", record)
    return seen


# ---- the same for everybody -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("examples", [scenes.stage1_examples, scenes.stage2_examples])
def test_training_pairs_depend_on_the_seed_alone(examples):
    random.seed(1)
    one = examples(20, seed=3)
    random.seed(2)
    two = examples(20, seed=3)
    assert [pair["caption"] for pair in one] == [pair["caption"] for pair in two]
    assert [pair["image"].tobytes() for pair in one] == [pair["image"].tobytes() for pair in two]
    assert [pair["caption"] for pair in one] != [pair["caption"] for pair in examples(20, seed=4)]


def test_evaluation_scenes_depend_on_the_seed_alone():
    one, two, other = (scenes.evaluation_scenes(20, 5, seed=seed) for seed in (0, 0, 1))
    assert [scene for _, scene in one] == [scene for _, scene in two]
    assert [image.tobytes() for image, _ in one] == [image.tobytes() for image, _ in two]
    assert [scene for _, scene in one] != [scene for _, scene in other]


# ---- what trains, and what measures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "count"), [(scenes.stage1_examples, 3000), (scenes.stage2_examples, 400)], ids=["stage1", "stage2"]
)
def test_stages_see_neither_reserved_scenes_nor_held_out_pairs(examples, count, drawn):
    captions = [pair["caption"] for pair in examples(count)]
    assert len(drawn) == count
    assert not any(scene.is_reserved for scene in drawn)
    assert not any(scene.has_held_out_pair for scene in drawn)
    read = sum((metrics.named_objects(caption) for caption in captions), Counter())
    assert not HELD_OUT_PAIRS & set(read)
    assert len(read) == len(scenes.COLOURS) * len(scenes.SHAPES) - len(HELD_OUT_PAIRS)  # all others are there


def test_vision_pretraining_sees_neither_reserved_scenes_nor_held_out_pairs(drawn):
    pretrain.pretrain_vision(steps=3, batch_size=60, lr=1e-4, seed=0, log=lambda line: None)
    assert len(drawn) == 180
    assert not any(scene.is_reserved or scene.has_held_out_pair for scene in drawn)


def test_the_language_corpus_tells_of_no_reserved_scene(monkeypatch):
    told = []

    def record(*args):
        told.extend(scenes.sample_scenes(*args))
        return told[-1:]

    monkeypatch.setattr(corpus, "sample_scenes", record)
    rng = random.Random(0)
    for _ in range(1500):
        corpus.document(rng)
    assert len(told) == 1500
    assert not any(scene.is_reserved for scene in told)


def test_evaluation_scenes_are_reserved_and_show_every_held_out_pair(drawn):
    shown = [scene for _, scene in scenes.evaluation_scenes()]
    assert len(shown) == 240
    assert all(scene.is_reserved for scene in shown)
    held_out = [scene for scene in shown if scene.has_held_out_pair]
    assert len(held_out) == 80
    assert {thing.pair for scene in held_out for thing in scene.things} >= HELD_OUT_PAIRS


def test_whether_a_scene_is_reserved_depends_on_what_it_holds_and_not_on_how_it_looks():
    some = sample(400)
    share = sum(scene.is_reserved for scene in some) / len(some)
    assert scenes.RESERVED_SHARE / 2 < share < scenes.RESERVED_SHARE * 2
    assert all(scene.is_reserved == replace(scene, jitter=scene.jitter + 1).is_reserved for scene in some)


# ---- pictures and words are true ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", scenes.SHAPES)
@pytest.mark.parametrize("size", scenes.SIZES)
def test_a_thing_has_its_colour_and_its_place(shape, size):
    for number, (colour, rgb) in enumerate(scenes.COLOURS.items()):
        row, column = scenes.ROWS[number % 3], scenes.COLUMNS[number // 3]
        image = scenes.draw_scene(Scene((Thing(size, colour, shape, row, column),), "grey", jitter=number))
        x, y = (image.width * (2 * place + 1) // 6 for place in (number // 3, number % 3))
        assert max(abs(a - b) for a, b in zip(image.getpixel((x, y)), rgb, strict=True)) <= 10
        for corner in ((0, 0), (0, 95), (95, 0), (95, 95)):
            background = scenes.BACKGROUNDS["grey"]
            assert max(abs(a - b) for a, b in zip(image.getpixel(corner), background, strict=True)) <= 10


def test_large_things_cover_more_than_small_ones():
    def covered(size: str, shape: str, jitter: int) -> int:
        image = scenes.draw_scene(Scene((Thing(size, "red", shape, "middle", "centre"),), "white", jitter))
        return sum(count for count, (_, green, _) in image.getcolors(10_000) if green < 140)

    for shape in scenes.SHAPES:
        smallest, largest = (
            edge(covered(size, shape, jitter) for jitter in range(10))
            for edge, size in ((min, "large"), (max, "small"))
        )
        assert smallest > 1.5 * largest


def test_descriptions_are_perfect_by_our_own_measure():
    some = sample(300)
    rng = random.Random(0)
    scores = metrics.score([scenes.describe(scene, rng) for scene in some], some)
    assert (scores["object_f1"], scores["position_accuracy"], scores["failure_rate"]) == (1.0, 1.0, 0.0)


def test_noisy_captions_are_short_careless_and_mostly_right():
    some = [scene for scene in sample(600) if not scene.has_held_out_pair]
    rng = random.Random(0)
    captions = [scenes.noisy_caption(scene, rng) for scene in some]
    assert all(caption == caption.lower() and "." not in caption for caption in captions)
    scores = metrics.score(captions, some)
    assert 0.7 < scores["object_f1"] < 0.95
    assert scores["position_accuracy"] < 0.7
    assert scores["failure_rate"] == 1.0
    assert scores["mean_words"] < 20


def test_documents_of_the_corpus_end_their_chats_with_the_separator():
    rng = random.Random(0)
    chats = [document for document in (corpus.document(rng) for _ in range(300)) if "<Img>" in document[0]]
    assert len(chats) > 100
    for document in chats:
        assert document[0].endswith("###Human: <Img>")
        assert document[2].startswith("</Img> ")
        assert document[2].endswith("###Assistant: ")
        assert document[-1].endswith("###")
