"""`--push_to_hub` over HTTP: what is on the Hub while a run goes on and after it, and what failures cost."""

import json
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration
from recipes_minigpt4 import cli, stage1_pretrain, stage2_finetune
from recipes_minigpt4.training import push_to_hub
from recipes_minigpt4.training.trainer import MiniGPT4Trainer
from recipes_minigpt4.utils.errors import RecipeError


ID = "you/adapter"
LOADS = {
    "model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "chat_template.jinja", "README.md",
}  # fmt: skip
LORA = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
EVERY_STEP = {"save_strategy": "steps", "save_steps": 1, "hub_always_push": True}


@pytest.fixture
def pushing(stage: Callable) -> Callable[..., list[str]]:
    """Arguments of a stage that pushes."""
    return lambda **fields: stage(push_to_hub=True, **{"hub_model_id": ID, **fields})


@pytest.fixture
def end_of_training(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """What is set when all steps are done, and the trainer begins to wait for pushes that are not."""
    event, wait = threading.Event(), MiniGPT4Trainer._finish_current_push

    def finish(trainer: MiniGPT4Trainer) -> None:
        event.set()
        wait(trainer)

    monkeypatch.setattr(MiniGPT4Trainer, "_finish_current_push", finish)
    return event


def names_of(files: dict[str, bytes]) -> set[str]:
    """What is not code, of which there has to be some."""
    code = {name for name in files if name.endswith(".py")}
    assert {"modeling_minigpt4.py", "processing_minigpt4.py", "backbones.py"} <= code
    return files.keys() - code - {"special_tokens_map.json", "preprocessor_config.json"}  # older releases have these


def load(files: dict[str, bytes], folder: Path) -> MiniGPT4ForConditionalGeneration:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return MiniGPT4ForConditionalGeneration.from_pretrained(folder)


# ---- what is there --------------------------------------------------------------------------------------------------


def test_every_save_is_pushed_with_what_loads_and_its_numbers(
    pushing, tmp_path: Path, hub: HubServer, tmp_path_factory
) -> None:
    (tmp_path / "run" / "_push-old").mkdir(parents=True)  # left by a run that was killed
    trainer = stage1_pretrain.main(pushing(max_steps=2, panel_steps=1, **EVERY_STEP))
    # The last save is what the last step has pushed, and needs no commit.
    assert hub.messages(ID) == ["Training in progress, step 1", "Training in progress, step 2"]
    repo = hub.repos["model", ID]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    for step, (sha, _) in enumerate(repo.history[1:]):
        files = hub.files(ID, sha)
        here = str(tmp_path_factory.getbasetemp()).encode()
        assert {name for name, content in files.items() if here in content} == {"config.json"}  # where backbones are
        assert names_of(files) == LOADS | {"panel.html"}
        card = ModelCard(files["README.md"].decode())
        assert f"| steps | {step + 1} |" in card.text and f"| training loss | {losses[step]:.4g} |" in card.text
        assert "training token accuracy" in card.text and f'from_pretrained("{ID}")' in card.text
        weights = load(files, tmp_path / f"pulled{step}").model.language_projection.weight
        here = MiniGPT4ForConditionalGeneration.from_pretrained(tmp_path / "run" / f"checkpoint-{step + 1}")
        assert torch.equal(weights, here.model.language_projection.weight)
    assert not list((tmp_path / "run").glob("_push-*"))  # what was linked for the way


def test_an_adapter_of_peft_is_pushed_too(pushing, tmp_path: Path, hub: HubServer) -> None:
    stage1_pretrain.main(pushing(max_steps=1, peft_config=json.dumps(LORA), **EVERY_STEP))
    for sha, _ in hub.repos["model", ID].history[1:]:
        adapter = {"peft/adapter_config.json", "peft/adapter_model.safetensors"}
        assert names_of(hub.files(ID, sha)) == LOADS | adapter
        assert "LORA adapter" in hub.files(ID, sha)["README.md"].decode()


def test_the_end_alone(pushing, hub: HubServer, tmp_path: Path) -> None:
    stage1_pretrain.main(pushing(hub_model_id=None, hub_strategy="end", hub_private_repo=True, **EVERY_STEP))
    assert hub.messages("you/run") == ["End of training"] and hub.repos["model", "you/run"].private
    assert '"you/run"' in hub.files("you/run")["README.md"].decode()
    assert str(tmp_path) not in hub.files("you/run")["README.md"].decode()


def test_a_branch(pushing, hub: HubServer) -> None:
    stage1_pretrain.main(pushing(max_steps=1, hub_revision="trial", **EVERY_STEP))
    assert not hub.files(ID) and names_of(hub.files(ID, "trial")) == LOADS


def test_checkpoints_to_go_on_from(pushing, stage, tmp_path: Path, hub: HubServer) -> None:
    stage1_pretrain.main(pushing(max_steps=2, hub_strategy="checkpoint", **EVERY_STEP))
    files = {
        name.removeprefix("last-checkpoint/"): content
        for name, content in hub.files(ID).items()
        if name.startswith("last-checkpoint/")
    }
    assert files.keys() >= {"optimizer.pt", "scheduler.pt", "trainer_state.json", "model.safetensors"}
    assert "training_args.bin" not in files
    shutil.rmtree(tmp_path / "run")
    for name, content in files.items():
        (tmp_path / "pulled" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pulled" / name).write_bytes(content)
    resumed = stage1_pretrain.main(stage(max_steps=3, resume_from_checkpoint=tmp_path / "pulled"))
    assert resumed.state.global_step == 3 and len(resumed.state.log_history) >= 4  # two of them of before


def test_checkpoints_may_go_while_they_are_sent(pushing, hub: HubServer, end_of_training) -> None:
    """`save_total_limit` deletes the folders of pushes that have not even begun."""
    hub.fail("GET", f"/api/models/{ID}", hold=end_of_training)
    stage1_pretrain.main(pushing(max_steps=3, save_total_limit=1, hub_strategy="all_checkpoints", **EVERY_STEP))
    assert hub.messages(ID)[:3] == [f"Training in progress, step {step}" for step in (1, 2, 3)]
    assert {f"checkpoint-{step}/optimizer.pt" for step in (1, 2, 3)} <= hub.files(ID).keys()


def test_a_slow_push_is_not_waited_for(pushing, hub: HubServer, end_of_training) -> None:
    """Saves in the meantime are left to the next one, and the last waits its turn."""
    hub.fail("POST", "/commit/", hold=end_of_training)
    stage1_pretrain.main(pushing(max_steps=3, **{**EVERY_STEP, "hub_always_push": False}))
    assert hub.messages(ID) == ["Training in progress, step 1", "End of training"]
    assert "| steps | 3 |" in hub.files(ID)["README.md"].decode()


def test_push_to_hub_of_the_trainer(stage, hub: HubServer, monkeypatch) -> None:
    """As in a script: after training, without the options."""
    trainer = stage1_pretrain.main(stage(max_steps=1))
    assert not hub.requests("POST", ".")
    trainer.args.hub_model_id = ID
    commit = trainer.push_to_hub("Mine", revision="late", results={"object F1": 0.5})
    assert commit.oid == hub.head(ID, "late") and hub.messages(ID) == ["Mine"]
    assert "| object F1 | 0.5 |" in hub.files(ID, "late")["README.md"].decode()
    assert trainer.push_to_hub("Later", blocking=False).result().oid == hub.head(ID)
    assert names_of(hub.files(ID)) == LOADS


# ---- failures -------------------------------------------------------------------------------------------------------


def test_a_push_that_fails_costs_one_line(pushing, tmp_path: Path, hub: HubServer, caplog) -> None:
    hub.fail("POST", "/commit/", status=403, times=2)
    stage1_pretrain.main(pushing(max_steps=3, **EVERY_STEP))
    (told,) = [record.getMessage() for record in caplog.records if "is not on the Hub" in record.getMessage()]
    assert told.startswith("step 1 is not on the Hub: your token may not write there (403)")
    assert "\n" not in told and "Training goes on" in told
    assert hub.messages(ID) == ["Training in progress, step 3"]
    assert (tmp_path / "run" / "checkpoint-3" / "model.safetensors").is_file()


def test_a_full_disk_costs_one_line(pushing, hub: HubServer, monkeypatch, caplog) -> None:
    def full(*args, **kwargs) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(push_to_hub.tempfile, "TemporaryDirectory", full)
        stage1_pretrain.main(pushing(max_steps=2, **EVERY_STEP))
    assert sum("step 1 is not on the Hub: [Errno 28] No space left" in text for text in caplog.messages) == 1
    assert hub.messages(ID) == ["End of training"]


def test_a_connection_that_breaks_is_made_again(pushing, hub: HubServer) -> None:
    hub.fail("PUT", ".", drop_after=500, times=3)
    hub.fail("POST", "/commit/", lose_answer=True)
    stage1_pretrain.main(pushing(max_steps=1, **EVERY_STEP))
    assert hub.messages(ID) == ["Training in progress, step 1"]


def test_all_is_saved_when_the_last_push_fails(pushing, stage, tmp_path: Path, hub: HubServer, capsys) -> None:
    hub.fail("POST", "/commit/", status=503, times=100)
    assert cli.main(["stage1", *pushing(max_steps=2, **EVERY_STEP)]) == 2
    run = tmp_path / "run"
    _, mark, told = capsys.readouterr().err.rpartition("minigpt4 stage1: ")
    assert mark and told.count("\n") == 1
    assert f"{run} is whole but not on the Hub: the Hub is overloaded or out of order (503)" in told
    assert f"`minigpt4 push {run} {ID}`" in told
    assert not hub.files(ID)
    assert {"trainer_state.json", "README.md", "checkpoint-2"} <= {path.name for path in run.iterdir()}
    hub.faults.clear()
    assert cli.main(["push", str(run), ID]) == 0
    assert names_of(hub.files(ID)) == LOADS
    assert "training loss" in hub.files(ID)["README.md"].decode()


@pytest.mark.parametrize(
    "token, fields, told",
    [
        ("hf_of_nobody", {}, "the Hub does not know you (401)"),
        (TOKEN, {"hub_model_id": "another/adapter"}, "your token may not write there (403)"),
        (TOKEN, {"hub_model_id": "you/there", "hub_private_repo": True}, "is there already and public"),
    ],
)
def test_who_cannot_push_is_told_before_training(
    token, fields, told, pushing, tmp_path: Path, hub: HubServer, monkeypatch, capsys
) -> None:
    hub.add_repo("you/there")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(MiniGPT4Trainer, "train", lambda *_, **__: pytest.fail("It trains."))
    assert cli.main(["stage1", *pushing(**fields)]) == 2
    _, _, line = capsys.readouterr().err.rpartition("minigpt4 stage1: ")
    assert f"{fields.get('hub_model_id', ID)} cannot be pushed to: " in line and told in line
    assert "without --push_to_hub" in line and line.count("\n") == 1


def test_a_dead_connection_is_told_before_training(pushing, hub: HubServer, monkeypatch) -> None:
    hub.fail("POST", "/repos/create", drop_after=5, times=100)
    with pytest.raises(RecipeError, match="cannot be pushed to: the connection to the Hub broke"):
        stage1_pretrain.main(pushing())
    assert len(hub.pauses) == 3


def test_offline_is_told_before_training(pushing) -> None:
    with pytest.raises(RecipeError, match="cannot be pushed to: HF_HUB_OFFLINE is set; unset it"):
        stage1_pretrain.main(pushing())


# ---- secrets --------------------------------------------------------------------------------------------------------


def test_the_token_of_a_run_is_written_nowhere(pushing, tmp_path: Path, hub: HubServer, monkeypatch, capsys) -> None:
    monkeypatch.delenv("HF_TOKEN")
    fields = {"max_steps": 1, "hub_token": TOKEN, "hub_strategy": "all_checkpoints", **EVERY_STEP}
    assert cli.main(["stage1", *pushing(**fields)]) == 0
    assert names_of({name: b"" for name in hub.files(ID) if "/" not in name}) == LOADS  # the token was the one given
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert "training_args.bin" in {path.name for path in files}
    for content in (*(path.read_bytes() for path in files), *hub.files(ID).values()):
        assert TOKEN.encode() not in content
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    args = torch.load(tmp_path / "run" / "training_args.bin", weights_only=False)
    assert args.hub_token is None and args.hub_model_id == ID


@pytest.mark.parametrize("module", [stage1_pretrain, stage2_finetune])
def test_settings_show_no_token(module, pushing) -> None:
    """As they are written to TensorBoard, W&B and the like, printed, or pickled."""
    *_, args = module.parse(pushing(hub_token=TOKEN))
    assert args.hub_token == TOKEN
    shown = [str(args), repr(args), args.to_json_string(), str(args.to_dict()), str(args.to_sanitized_dict())]
    assert not [text for text in (*shown, pickle.dumps(args).decode("latin-1")) if TOKEN in text]
