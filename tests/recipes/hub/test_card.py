"""MODEL_CARD.md, the card of this package, and card_template.md, that of every card that is pushed."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from foreign_parts import write_encoder
from hub_server import TOKEN
from huggingface_hub import ModelCard, ModelCardData

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from modeling_minigpt4.convert_minigpt4_to_hf import PRESETS
from recipes_minigpt4.hub import card as cards
from recipes_minigpt4.hub.card import card_template, is_local, public_name, render_card


ROOT = Path(__file__).parents[3]
SECTIONS = ("Base models", "Languages and licences", "How to load", "Training", "Results", "Limits", "Citation")
HUB = {"vision": "owner/eyes", "qformer": "owner/eyes", "language_model": "owner/words"}


def settings(**changes) -> SimpleNamespace:
    """The fields of `StageArguments` that a card tells."""
    fields = {
        "learning_rate": 3e-5, "min_learning_rate": 1e-5, "warmup_steps": 200, "weight_decay": 0.05, "seed": 7,
        "per_device_train_batch_size": 12, "gradient_accumulation_steps": 2, "world_size": 4, "bf16": True,
        "fp16": False, "license": "apache-2.0", "language": "en", "hub_model_id": None, "output_dir": "/secret/my-run",
    }  # fmt: skip
    return SimpleNamespace(**{**fields, **changes})


@pytest.fixture
def on_hub(compose: Callable):
    """A model whose configuration names repositories of the Hub."""
    model, _ = compose()
    for part, source in model.config.backbones.items():
        source.update(name_or_path=HUB[part], revision="a1b2c3")
    return model


def test_a_card_says_whose_code_runs(parts: dict[str, str], on_hub, tmp_path: Path) -> None:
    assert "trust_remote_code" not in render_card(on_hub)
    sources = {"vision": write_encoder(tmp_path / "eyes"), "language_model": parts["language_model"]}
    model = MiniGPT4ForConditionalGeneration.from_backbones(**sources, trust_remote_code=True)
    model.config.backbones["vision"].update(name_or_path="owner/eyes", revision="a1b2c3")
    text = render_card(model, repo_id="you/adapter")
    own = "- vision encoder: code of [owner/eyes](https://huggingface.co/owner/eyes), revision `a1b2c3`"
    assert own in text.splitlines() and "- language model: code" not in text
    assert text.count('.from_pretrained("you/adapter", trust_remote_code=True)') == 2

    elsewhere = {name: f"owner/code--{place}" for name, place in model.config.vision_config.auto_map.items()}
    model.config.vision_config.auto_map = elsewhere
    model.config.backbones["vision"]["code_revision"] = "d4e5f6"
    text = render_card(model)
    assert "code of [owner/code](https://huggingface.co/owner/code), revision `d4e5f6`\n" in text and own not in text
    model.config.backbones = {}
    assert "- vision encoder: code of this repository\n" in render_card(model)


def test_the_card_of_the_package_is_one_page() -> None:
    text = (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80 and not re.search(r"\{\{|\{%|<!--", text)
    shown = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for word in ("Method", "Intended use", "measured", "Limits", "licences", "Citation"):
        assert re.search(rf"^## .*{word}", shown, re.MULTILINE)


@pytest.mark.parametrize("source", ["card", "template"])
def test_figures_of_the_paper_are_there(source: str) -> None:
    text = card_template() if source == "template" else (ROOT / "MODEL_CARD.md").read_text(encoding="utf-8")
    for figure in ("7.2 %", "9.6 %", "28.8", "175", "35 %", "32 %", "58.2", "32.2", "2304.10592"):
        assert figure in text


def test_a_card_that_is_told_nothing_claims_nothing() -> None:
    card = ModelCard.from_template(ModelCardData(license="other"), template_str=card_template())
    headings = re.findall(r"^#+ .*", re.sub(r"```.*?```", "", card.text, flags=re.DOTALL), re.MULTILINE)
    assert headings == ["# MiniGPT-4", *(f"## {section}" for section in SECTIONS)]
    assert "|---|---|" not in card.text and "Trained:" not in card.text
    assert "without a record" in card.text and "No settings" in card.text and "No measurements" in card.text
    assert "\n\n\n" not in card.text and not re.search(r"\{\{|\{%", card.text)


def test_template_renders_without_anything(on_hub) -> None:
    text = render_card(on_hub, settings())
    assert not re.search(r"\{\{|\{%|<!--|-->", text)
    assert ModelCard(text).data.license == "apache-2.0"
    assert "No measurements were given" in text and text.count('"your-name/your-adapter"') == 2


def test_template_is_one_for_huggingface_hub_alone() -> None:
    data = ModelCardData(language="de", license="mit", base_model="owner/words")
    card = ModelCard.from_template(data, template_path=str(ROOT / "recipes/hub/card_template.md"), title="Mine")
    assert (card.data.license, card.data.base_model) == ("mit", "owner/words")
    assert "\n# Mine\n" in card.text and "Licence of the trained weights: mit." in card.text
    assert "{%" not in card.text


def test_rendered_card_tells_everything(on_hub) -> None:
    text = render_card(
        on_hub,
        settings(hub_model_id="somebody/my-adapter"),
        steps=1000,
        stage=2,
        dataset_name="owner/pairs",
        results={"object F1": 0.9312345, "failures": "2 %"},
    )
    data = ModelCard(text).data.to_dict()
    assert data["base_model"] == ["owner/eyes", "owner/words"] and data["base_model_relation"] == "adapter"
    assert (data["language"], data["license"], data["datasets"]) == ("en", "apache-2.0", ["owner/pairs"])
    assert (data["library_name"], data["pipeline_tag"]) == ("transformers", "image-text-to-text")
    assert text.splitlines().count("---") == 2 and "\n# my-adapter\n" in text
    for row in (
        "| vision encoder | [owner/eyes](https://huggingface.co/owner/eyes), revision `a1b2c3` |",
        "| Q-Former | [owner/eyes](https://huggingface.co/owner/eyes), revision `a1b2c3` |",
        "| language model | [owner/words](https://huggingface.co/owner/words), revision `a1b2c3` |",
        "| steps | 1,000 |",
        "| batch size | 96 |",
        "| learning rate | 3e-05 |",
        "| weight decay (matrices only) | 0.05 |",
        "| warm-up steps | 200 |",
        "| seed | 7 |",
        "| precision | bfloat16 mixed |",
        "| object F1 | 0.9312 |",
        "| failures | 2 % |",
    ):
        assert f"\n{row}\n" in text
    assert "\nTrained: language_projection (408 parameters).\n" in text
    assert text.count('from_pretrained("somebody/my-adapter")') == 2
    assert "\nThis is an adapter of stage 2.\n" in text and "Not loadable by others" not in text
    for section in SECTIONS:
        assert f"\n## {section}\n" in text


def test_a_card_is_about_its_own_parts(on_hub) -> None:
    """And says nothing about those of the original, nor about what was measured with them."""
    text = render_card(on_hub, settings(), stage=2)
    assert not re.search("Vicuna|EVA|BLIP-2|LLaMA|Llama 2|65 of 100|7.2 %|32 tokens", text)
    kinds = "a `blip_2_vision_model`, the Q-Former a `blip_2_qformer`, the language model a `llama`"
    for sentence in (
        f"\nThe vision encoder is {kinds}.\n",
        "\nA picture becomes 3 tokens of the language model.",
        "only 3 tokens carry the whole picture",
    ):
        assert sentence in text, sentence


@pytest.mark.parametrize("preset, others", [("vicuna-7b", "Llama 2"), ("llama2-7b", "Vicuna")])
def test_a_card_of_the_original_s_parts_tells_of_them(preset: str, others: str) -> None:
    model = MiniGPT4ForConditionalGeneration._skeleton(PRESETS[preset].config())
    name = {"vicuna-7b": "lmsys/vicuna-7b-v1.1", "llama2-7b": "meta-llama/Llama-2-7b-chat-hf"}[preset]
    model.config.backbones = {"language_model": {"name_or_path": name}}
    text = render_card(model)
    assert all(
        part in text for part in ("EVA-CLIP", "7.2 %", "65 of 100", f"only {model.config.num_image_tokens} tokens")
    )
    licences = text[text.index("## Languages") : text.index("## How to load")]
    assert others not in licences and {"Llama 2": "Vicuna v0", "Vicuna": "Llama 2"}[others] in licences


def test_licences_of_parts_are_told_where_they_are_known(on_hub, tmp_path: Path, monkeypatch) -> None:
    """By the card in a folder, or that of a repository in the cache; otherwise the repository is named."""
    (tmp_path / "eyes").mkdir()
    (tmp_path / "eyes" / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\n---\n# Eyes\n")
    cached = tmp_path / "cache" / "models--owner--words" / "snapshots" / "a1b2c3"
    cached.mkdir(parents=True)
    (cached / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    on_hub.config.backbones["vision"]["name_or_path"] = str(tmp_path / "eyes")
    text = render_card(on_hub, settings())
    assert "| vision encoder | a local folder or file (eyes), licence own-terms |" in text
    assert "https://huggingface.co/owner/words), revision `a1b2c3`, licence mit |" in text
    assert "| Q-Former | [owner/eyes](https://huggingface.co/owner/eyes), revision `a1b2c3` |" in text


def test_tables_are_tables(on_hub) -> None:
    lines = render_card(on_hub, settings(), results={"a": 1, "b": 2}).splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("|---")]
    assert len(starts) == 3
    for start in starts:
        assert lines[start - 1].startswith("| ") and lines[start - 2] == ""
        end = next(number for number in range(start, len(lines)) if not lines[number].startswith("|"))
        assert end - start > 2 and all(line.count("|") == 3 for line in lines[start:end])


def test_stage_1_is_warned_about(on_hub) -> None:
    assert "speaks badly" in render_card(on_hub, settings(), stage=1)
    assert "speaks badly" not in render_card(on_hub, settings(), stage=2)


def test_local_backbones_are_told_without_their_path(compose: Callable, parts: dict[str, str]) -> None:
    text = render_card(compose()[0], settings(), dataset_name="/secret/data/pairs.jsonl")
    assert "**Not loadable by others as it is:**" in text and "full=True" in text
    for part in ("vision encoder", "Q-Former", "language model"):
        assert f"the {part}" in text
    assert "(llama)" in text and "(pairs.jsonl)" in text
    for secret in (*parts.values(), "/secret", str(Path(parts["vision"]).parent)):
        assert secret not in text
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data and "datasets" not in data


# Names and the part of them that a card may show; everything else in them has one of `HIDDEN` in it.
HIDDEN = ("secret", "hidden", "Users", "server")
NASTY = {
    "/secret/hidden/pairs.jsonl": "pairs.jsonl",
    "/secret/hidden/x/": "x",
    "/secret/with blank, comma/x y.tar": "x y.tar",
    "/secret/näme|`pipe/[x](y).csv": "x(y).csv",
    "~/secret/hidden/x": "x",
    "~secret/x": "x",
    "./secret/x.csv": "x.csv",
    "../../secret/hidden/x": "x",
    "secret/hidden/deep/x": "x",
    "secret/pairs.parquet": "pairs.parquet",
    "secret.d/{00000..00009}.tar": "{00000..00009}.tar",
    "/secret/{a,b}/x-{1,2}.tar": "x-{1,2}.tar",
    "/secret/**/hidden/x-?.tar": "x-?.tar",
    "C:\\Users\\me\\x.parquet": "x.parquet",
    "C:/Users/me/x.parquet": "x.parquet",
    "\\\\server\\hidden\\x.tar": "x.tar",
    "https://me:secret@hidden.host:8080/deep/x.tar?token=secret2&X-Amz-Signature=secret3": "x.tar",
    "https://hidden.host/{00..09}.tar#secret": "{00..09}.tar",
    "s3://secret-bucket/hidden/x.tar": "x.tar",
    "gs://secret:hidden@bucket/x.tar": "x.tar",
    "file:///secret/hidden/x.tar": "x.tar",
    "hf://buckets/secret/hidden/x.tar": "x.tar",
    "pipe:curl -s https://hidden.host/secret/x.tar": "x.tar",
    "/": "unnamed",
    "..": "unnamed",
    "~": "unnamed",
}


@pytest.mark.parametrize("name", NASTY)
def test_of_a_name_that_nobody_else_can_use_only_the_last_part_is_shown(name: str, on_hub) -> None:
    """Wherever it comes from: data, several of them, a backbone, the run's folder, what it measured."""
    source = {**on_hub.config.backbones["vision"], "name_or_path": name}
    on_hub.config.backbones["vision"] = source
    repo_id = None if re.fullmatch(r"\w+/[\w.]+", name) else name
    run = settings(output_dir=name, hub_model_id=repo_id, license=name, language=[name, "en"])
    names = ["owner/pairs", name, "hf://datasets/owner/tars@v1/deep/*.tar", name, "tiny"]
    results = {"object F1": 0.5, name: 1, f"measured on {name}": f"1 of {name}", "images/s": "3/4"}
    text = render_card(on_hub, run, dataset_name=names, results=results, title=name)
    assert not [word for word in HIDDEN if word in text] and "/deep" not in text
    shown = NASTY[name]
    data = next(line for line in text.splitlines() if line.startswith("| data |"))
    assert data.count(f" ({shown})") == 1  # named twice, told once
    assert "[owner/pairs](https://huggingface.co/datasets/owner/pairs)" in data
    assert "[owner/tars](https://huggingface.co/datasets/owner/tars)" in data
    metadata = ModelCard(text).data.to_dict()
    assert metadata["datasets"] == ["owner/pairs", "owner/tars"]
    assert metadata["base_model"] == ["owner/eyes", "owner/words"]  # the Q-Former's is still there
    assert "| images/s | 3/4 |" in text and "| object F1 | 0.5 |" in text
    assert f"| vision encoder | {'files of the web' if '://' in name and name[:4] != 'pipe' else 'a local'}" in text
    only = render_card(on_hub, run, dataset_name=name)
    assert not [word for word in HIDDEN if word in only] and "datasets" not in ModelCard(only).data.to_dict()
    for line in text.splitlines():
        assert not line.startswith("|") or line.count("|") == 3, line


def test_a_relative_folder_that_exists_is_local(on_hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret" / "pairs").mkdir(parents=True)
    assert "[secret/pairs]" in render_card(on_hub, settings(), dataset_name="secret/pairs")
    monkeypatch.chdir(tmp_path)
    text = render_card(on_hub, settings(output_dir="."), dataset_name="secret/pairs")
    assert "secret" not in text and "(pairs)" in text and f"# {tmp_path.name}\n" in text


def test_tokens_are_no_part_of_a_card(on_hub) -> None:
    run = settings(license=TOKEN, hub_model_id=f"https://me:{TOKEN}@huggingface.co/you/x")
    text = render_card(on_hub, run, title=TOKEN, dataset_name=[f"/x/{TOKEN}"], results={TOKEN: TOKEN})
    assert TOKEN not in text and "hf_…" in text


@pytest.mark.parametrize(
    "name, local",
    [
        ("owner/name", False),
        ("gpt2", False),
        ("/abs/path", True),
        ("./rel", True),
        ("../up", True),
        ("~/home", True),
        ("runs/stage1/checkpoint-5", True),
    ],
)
def test_paths_and_repositories_are_told_apart(name: str, local: bool) -> None:
    assert is_local(name) == local
    assert (name in public_name(name)) != local


def test_a_folder_that_looks_like_a_repository_is_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert is_local("owner/name")


def test_languages_may_be_several(on_hub) -> None:
    text = render_card(on_hub, settings(language=["en", "de"]))
    assert "Language: en, de" in text and ModelCard(text).data.language == ["en", "de"]


def test_titles_and_ids_cannot_break_the_metadata(on_hub) -> None:
    text = render_card(on_hub, settings(license="cc-by-nc-4.0", hub_model_id="a/b"), dataset_name="tiny")
    metadata = yaml.safe_load(text.split("---")[1])
    assert metadata["license"] == "cc-by-nc-4.0" and metadata["tags"] == cards.TAGS + cards.TRAINING_TAGS
    assert "coloured shapes" in text
