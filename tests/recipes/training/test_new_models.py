"""Fields of a new projection and of what it is given: in a run, a plan and an inspection; beside a saved model."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from modeling_minigpt4 import MiniGPT4Config, MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4 import cli, stage1_pretrain
from recipes_minigpt4.planning.inspect_data import main as inspect
from recipes_minigpt4.planning.plan import make_plan


# Fields, what the configuration then has, and image tokens of a picture; 28 pixels are 4 × 4 patches and a CLS token.
CASES = [
    ({}, {"patch_merge_size": 4, "patch_merge_layout": "square", "vision_feature_select_strategy": "default"}, 4),
    ({"patch_merge_layout": "consecutive"}, {"patch_merge_size": 4, "patch_merge_layout": "consecutive"}, 4),
    ({"patch_merge_size": 2}, {"patch_merge_size": 2, "patch_merge_layout": "consecutive"}, 8),
    ({"vision_feature_select_strategy": "full"}, {"patch_merge_size": 1}, 17),
    ({"vision_feature_layer": -2, "image_size": 56}, {"vision_feature_layer": -2, "image_size": (56, 56)}, 16),
]


@pytest.mark.parametrize(("fields", "expected", "tokens"), CASES)
def test_run_plan_and_inspection_have_them(
    fields: dict, expected: dict, tokens: int, stage: Callable, clip: str, pairs_file: Path, tmp_path: Path, capsys
) -> None:
    arguments = stage(vision=clip, qformer=None, max_steps=1, **fields)
    plan = make_plan(arguments)
    assert plan.row.image == tokens
    trained = stage1_pretrain.main(arguments).model
    saved = MiniGPT4Config.from_pretrained(tmp_path / "run")
    assert {name: getattr(saved, name) for name in expected} == expected
    assert saved.num_image_tokens == tokens
    planned = sum(part.count for part in plan.parts if part.trains)
    assert planned == sum(p.numel() for p in trained.model.language_projection.parameters())
    processor = MiniGPT4Processor.from_pretrained(tmp_path / "run")
    height, width = saved.image_size
    assert processor.num_image_tokens == tokens
    assert processor.image_processor.size == {"height": height, "width": width}
    named = [name for name in arguments if name.startswith("--") and name[2:] in (*fields, "vision", "language_model")]
    values = [arguments[arguments.index(name) + 1] for name in named]
    (found,) = inspect([str(pairs_file), *(text for pair in zip(named, values, strict=True) for text in pair)])
    (alone,) = inspect([str(pairs_file), "--stage", "1", "--model_name_or_path", str(tmp_path / "run")])
    assert found.tokens == alone.tokens


def test_they_are_refused_beside_a_saved_model_that_has_others(
    stage: Callable, clip: str, tmp_path: Path, pairs_file: Path, capsys: pytest.CaptureFixture
) -> None:
    stage1_pretrain.main(stage("one", vision=clip, qformer=None, max_steps=1, image_size=56))
    folder = tmp_path / "one"
    same = {"patch_merge_size": 4, "patch_merge_layout": "square", "image_size": 56}
    assert cli.main(["stage2", *stage("two", model_name_or_path=folder, max_steps=1, **same)]) == 0
    assert torch.isfinite(
        MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "two").model.language_projection.weight
    ).all()
    others = {
        "patch_merge_size": (2, "4"),
        "patch_merge_layout": ("consecutive", "square"),
        "vision_feature_select_strategy": ("full", "default"),
        "vision_feature_layer": (-2, "None"),
        "image_size": (28, "56 × 56"),
        "projector_num_layers": (3, "1"),
    }
    for command in ("stage2", "plan", "inspect"):
        for name, (other, kept) in others.items():
            arguments = stage("three", model_name_or_path=folder, **{name: other})
            if command == "inspect":
                arguments = [str(pairs_file), "--model_name_or_path", str(folder), f"--{name}", str(other)]
            assert cli.main([command, *arguments]) == 2
            told = capsys.readouterr().err.splitlines()[-1]
            assert f"{name} is {other}, but the model of {folder} has {kept}; leave it out." in told


def test_joining_has_no_effect_beside_a_qformer(stage: Callable, capsys: pytest.CaptureFixture) -> None:
    for command in ("stage1", "plan"):
        for name, value in (("patch_merge_size", 2), ("patch_merge_layout", "square")):
            assert cli.main([command, *stage(**{name: value})]) == 2
            assert f"--{name} has no effect beside --qformer" in capsys.readouterr().err.splitlines()[-1]


def test_what_does_not_fit_the_encoder_is_told_in_one_sentence(stage: Callable, clip: str, capsys) -> None:
    for fields, told in (
        ({"patch_merge_size": 3}, "gives 16 tokens, which cannot be joined 3 at a time"),
        ({"vision_feature_layer": -9}, "`vision_feature_layer` is -9, but the hidden states of this vision encoder"),
        ({"patch_merge_layout": "square", "patch_merge_size": 2}, "'square', but `patch_merge_size` is 2"),
    ):
        for command in ("stage1", "plan"):
            assert cli.main([command, *stage(vision=clip, qformer=None, **fields)]) == 2
            printed = capsys.readouterr().err.splitlines()[-1]
            assert told in printed and printed.endswith(".") and not printed.endswith("..")


def test_the_original_keeps_its_way_without_a_qformer(stage: Callable, parts: dict[str, str], tmp_path: Path) -> None:
    """BLIP-2's encoder: patches are joined row by row, without CLS."""
    trained = stage1_pretrain.main(stage(qformer=None, max_steps=1)).model
    pixels = torch.randn(1, 3, 28, 28)
    tokens = trained.model.vision_model(pixels).last_hidden_state
    assert torch.equal(trained.model.encode_images(pixels).last_hidden_state, tokens[:, 1:].reshape(1, 1, 64))
    config = MiniGPT4Config.from_pretrained(tmp_path / "run")
    assert (config.patch_merge_size, config.patch_merge_layout) == (4, "consecutive")
