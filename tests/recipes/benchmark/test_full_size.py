"""The full-size check on a small model: what it writes, what it measures, and what it refuses."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import safe_open

from recipes_minigpt4.benchmark import full_size
from recipes_minigpt4.benchmark.full_size import build_config, check, main, parse, run_check
from recipes_minigpt4.utils.errors import RecipeError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """The folder of a run whose weights were kept, and what it measured."""
    folder = tmp_path_factory.mktemp("check")
    arguments = ["--preset", "small", "--shard_size", "2MB", "--limit", "1000", "--keep"]
    return folder, run_check(parse(["--output_dir", str(folder), *arguments]))


def stored_names(folder: Path) -> set[str]:
    """Tensors in the shards of a folder, which its index must name."""
    names = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names |= set(file.keys())
    if (index := folder / "model.safetensors.index.json").exists():
        assert set(json.loads(index.read_text())["weight_map"]) == names
    return names


def test_folders_look_as_on_the_hub(run) -> None:
    folder = run[0] / "small-bfloat16"
    language, vision = stored_names(folder / "language_model"), stored_names(folder / "vision")
    assert len(list((folder / "language_model").glob("model-*.safetensors"))) > 1
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} < language
    assert {name.split(".")[0] for name in vision} == {"vision_model", "qformer", "query_tokens"}
    assert stored_names(folder / "adapter") == {f"model.language_projection.{kind}" for kind in ("weight", "bias")}
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (folder / "language_model" / name).exists()


def test_what_is_measured(run) -> None:
    folder, result = run
    assert json.loads((folder / "result.json").read_text()) == result
    assert result["new_tokens"] == 8 and result["finite"]
    config = build_config("small")
    projection = (config.qformer_config.hidden_size + 1) * config.text_config.hidden_size
    assert result["trainable_parameters"] == projection
    # bfloat16 but for the projection in float32; the only buffers are rotary frequencies and position ids
    assert 0 <= result["weights_bytes"] - 2 * (result["parameters"] + projection) < 10_000
    assert result["peak_bytes"] >= result["peak_loading_bytes"] >= result["before_loading_bytes"] > 0
    assert result["peak_bytes"] >= result["peak_anonymous_bytes"] > 0
    assert result["ratio"] == result["peak_bytes"] / result["weights_bytes"]
    shards = [path.name for path in (folder / "small-bfloat16" / "language_model").glob("*.safetensors")]
    assert {f"language_model/{name}" for name in shards} < set(result["mapped_files"])


def test_too_much_memory_fails_in_one_sentence_and_kept_weights_are_used_again(run, monkeypatch, capsys) -> None:
    """A small model takes far less than the interpreter, so the limit of large ones is exceeded if it is asked for."""
    folder, result = run
    monkeypatch.setattr(full_size, "measure_in_new_process", lambda adapter: result)
    monkeypatch.setattr(full_size, "write_shards", None)  # nothing is written again
    arguments = ["--output_dir", str(folder), "--preset", "small", "--keep"]
    assert main(arguments) == 0
    capsys.readouterr()
    assert main([*arguments, "--limit", "1.15"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("full_size: Peak memory was ") and told.count("\n") == 1
    assert told.endswith("at most 1.15 times is allowed.\n")


def test_a_process_that_dies_is_told(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when the memory does not suffice."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RecipeError, match="exit status 1"):
        full_size.measure_in_new_process(tmp_path)


def test_weights_are_deleted_unless_they_are_kept(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(adapter: Path) -> dict:
        assert (adapter / "model.safetensors").exists()
        return {"new_tokens": 8, "finite": True, "ratio": 1.0, "mapped_files": []}

    monkeypatch.setattr(full_size, "measure_in_new_process", measure)
    assert main(["--output_dir", str(tmp_path), "--preset", "small"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_a_full_disk_is_told_before_anything_is_written(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=15e9))
    with pytest.raises(RecipeError, match=r"take 15\.\d GB, but the disk of .* has 15\.0 GB left"):
        run_check(parse(["--output_dir", str(tmp_path)]))
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "change, told",
    [
        ({"new_tokens": 7}, "7 tokens instead of 8"),
        ({"finite": False}, "not finite"),
        ({"ratio": 1.1501}, "1.150 times the weights"),
    ],
)
def test_a_bad_run_is_told(change: dict, told: str) -> None:
    good = {"new_tokens": 8, "finite": True, "ratio": 1.15, "peak_bytes": 115e8, "weights_bytes": 1e10}
    check(good, 1.15)
    with pytest.raises(RecipeError, match=told):
        check({**good, **change}, 1.15)


@pytest.mark.parametrize("preset, parameters", [("vicuna-7b", 768 * 4096 + 4096), ("llama2-7b", 5632 * 4096 + 4096)])
def test_presets_are_the_released_models(preset: str, parameters: int) -> None:
    """Sizes of the projection: 3.1 million parameters with the Q-Former, and 4 joined patches without."""
    config = build_config(preset)
    features = config.qformer_config.hidden_size if config.qformer_config else 4 * config.vision_config.hidden_size
    assert (features + 1) * config.text_config.hidden_size == parameters


def test_a_folder_that_cannot_be_made_is_told(tmp_path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--output_dir", str(tmp_path / "file"), "--preset", "small"]) == 1
    assert "cannot be made" in capsys.readouterr().err
