"""`minigpt4 push` over HTTP: what is sent, in one commit, and what happens when it cannot be."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, HubServer
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4 import cli
from recipes_minigpt4.hub import publish
from recipes_minigpt4.hub.publish import published_files


HUB = {"vision": "owner/eyes", "qformer": "owner/eyes", "language_model": "owner/words"}
LOADS = {"model.safetensors", "config.json", "generation_config.json", "processor_config.json", "tokenizer.json"}
CODE = {"modeling_minigpt4.py", "configuration_minigpt4.py", "processing_minigpt4.py", "backbones.py"}
ID = "you/adapter"


@pytest.fixture(scope="module")
def saved(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved adapter, whose backbones are in repositories, and its processor."""
    folder = tmp_path_factory.mktemp("saved")
    model = MiniGPT4ForConditionalGeneration.from_backbones(**parts)
    for part, source in model.config.backbones.items():
        source.update(name_or_path=HUB[part], revision="a1b2c3")
    model.save_pretrained(folder)
    names = {"vision": parts["vision"], "language_model": parts["language_model"]}
    MiniGPT4Processor.from_backbones(**names, config=model.config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it for a test of its own."""
    return Path(shutil.copytree(saved, tmp_path / "adapter"))


def digests(folder: Path) -> dict[str, str]:
    """What a folder holds, to tell whether something has changed."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "README.md")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def push(folder: Path, *options: str) -> int:
    return cli.main(["push", str(folder), ID, *options])


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_a_folder_becomes_a_repository_in_one_commit(
    folder: Path, hub: HubServer, capsys, tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert push(folder) == 0
    told = capsys.readouterr().out
    assert f"Uploaded to {hub.endpoint}/{ID}\n" in told
    assert f'AutoModelForVision2Seq.from_pretrained("{ID}")' in told
    files = hub.files(ID)
    assert files == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert files.keys() >= LOADS | CODE
    assert hub.messages(ID) == ["Upload MiniGPT-4"]
    assert not [name for name, content in files.items() if str(tmp_path_factory.getbasetemp()).encode() in content]
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == ["owner/eyes", "owner/words"]
    assert f'from_pretrained("{ID}")' in card.text and "# adapter\n" in card.text


def test_nothing_else_is_sent(folder: Path, hub: HubServer) -> None:
    wanted = {*(path.name for path in folder.iterdir()), "README.md", "LICENSE.txt"}
    others = (
        "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "panel.json",
        ".env", "notes.txt", "checkpoint-5/model.safetensors", "runs/now/events.out.tfevents.1", ".git/config",
        "_push-x/README.md", ".cache/huggingface/x.lock", "wandb/run.json", ".convert-1/model.safetensors",
        "features/0.safetensors",
    )  # fmt: skip
    for name in (*others, "LICENSE.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    assert push(folder) == 0
    assert hub.files(ID).keys() == wanted


def test_only_what_has_changed_is_sent_again(folder: Path, hub: HubServer) -> None:
    assert push(folder) == 0 and push(folder) == 0
    assert len(hub.messages(ID)) == 1
    weights = load_file(folder / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    assert push(folder, "--commit_message", "Better") == 0
    assert hub.messages(ID) == ["Upload MiniGPT-4", "Better"]
    assert len(hub.requests("PUT", ".")) == 2
    assert hub.files(ID)["model.safetensors"] == (folder / "model.safetensors").read_bytes()


def test_weights_of_before_go_in_the_same_commit(folder: Path, hub: HubServer) -> None:
    """They would be loaded instead of the new ones, or beside them."""
    stale = ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "additional_chat_templates/x.jinja")
    kept = ("README.md", "picture.png", "runs/old.safetensors", "LICENSE")
    hub.add_repo(ID, dict.fromkeys((*stale, *kept), b"old"))
    assert push(folder) == 0
    files = hub.files(ID)
    assert not files.keys() & set(stale) and files.keys() >= set(kept) | LOADS
    assert len(hub.messages(ID)) == 2


def test_a_branch_is_made_and_main_stays(folder: Path, hub: HubServer, capsys) -> None:
    hub.add_repo(ID, {"README.md": b"mine"})
    before = hub.head(ID)
    assert push(folder, "--revision", "trial/2") == 0 and push(folder, "--revision", "trial/2") == 0
    assert f'from_pretrained("{ID}", revision="trial/2")' in capsys.readouterr().out
    assert hub.head(ID) == before and hub.files(ID) == {"README.md": b"mine"}
    assert hub.files(ID, "trial/2").keys() >= LOADS


def test_private_is_private(folder: Path, hub: HubServer, capsys) -> None:
    assert push(folder, "--private") == 0
    assert hub.repos["model", ID].private
    hub.repos["model", ID].private = False
    before = hub.head(ID)
    assert push(folder, "--private", "--commit_message", "again") == 2
    told = capsys.readouterr().err
    assert "is there already and public" in told and f"`minigpt4 push {folder} {ID} --private`" in told
    assert hub.head(ID) == before


def test_backbones_of_this_machine_are_told_without_their_path(
    compose: Callable, tmp_path: Path, hub: HubServer, capsys
) -> None:
    model, processor = compose()
    model.save_pretrained(tmp_path / "local")
    processor.save_pretrained(tmp_path / "local")
    assert push(tmp_path / "local") == 0
    told = capsys.readouterr().out
    assert f'"{ID}", backbones={{"vision": ..., "qformer": ..., "language_model": ...}}' in told
    assert "language_model (llama)" in told and "full=True" in told
    assert "Not loadable by others" in hub.files(ID)["README.md"].decode()
    assert str(tmp_path) not in hub.files(ID)["README.md"].decode()


def test_vision_side_of_the_folder_is_sent_too(compose: Callable, parts, tmp_path: Path, hub: HubServer) -> None:
    model, processor = compose()
    shutil.copytree(parts["vision"], tmp_path / "out" / "eyes")
    for part in ("vision", "qformer"):
        model.config.backbones[part].update(name_or_path=".", subfolder="eyes")
    model.config.backbones["language_model"].update(name_or_path="owner/words")
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    assert push(tmp_path / "out") == 0
    assert hub.files(ID).keys() >= LOADS | {"eyes/config.json", "eyes/model.safetensors"}


def test_the_card_of_a_run_is_kept_and_named(folder: Path, hub: HubServer) -> None:
    (folder / "README.md").write_text('| loss | 0.5 |\nfrom_pretrained("your-name/your-adapter")\n')
    assert cli.main(["push", str(folder), "adapter"]) == 0  # whose owner is `you`
    assert hub.files(ID)["README.md"].decode() == f'| loss | 0.5 |\nfrom_pretrained("{ID}")\n'


def test_weights_in_parts(folder: Path, hub: HubServer) -> None:
    """Very large files are put in parts."""
    hub.multipart_from = 700
    assert push(folder) == 0
    assert hub.files(ID)["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert len(hub.requests("PUT", ".")) > 1 and len(hub.requests("POST", "/complete")) == 1
    assert all(one.authorization is None for one in hub.requests("PUT", "."))  # storage never sees the token


# ---- when it cannot be ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, path, fault, retried",
    [
        ("POST", "/repos/create", {"status": 500, "times": 2}, "create"),
        ("POST", "/commit/", {"status": 503, "times": 2}, "commit"),
        ("POST", "/commit/", {"status": 409}, "commit"),
        ("POST", "/commit/", {"status": 412}, "commit"),
        ("POST", "/commit/", {"drop_after": 100}, "commit"),
        ("POST", "/preupload/", {"drop_after": 10}, "preupload"),
        ("GET", "/api/models/", {"status": 502}, "models"),
        ("POST", "validate-yaml", {"drop_after": 5}, "validate"),
        ("POST", "objects/batch", {"status": 500}, "batch"),
        ("PUT", ".", {"drop_after": 300}, "."),
        ("PUT", ".", {"status": 500}, "."),
    ],
)
def test_what_passes_is_tried_again(method, path, fault, retried, folder: Path, hub: HubServer) -> None:
    hub.fail(method, path, **fault)
    assert push(folder) == 0
    assert hub.files(ID) == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert hub.messages(ID) == ["Upload MiniGPT-4"]
    assert hub.pauses and hub.pauses == sorted(hub.pauses)
    assert sum(one.status == 200 for one in hub.requests("PUT", ".")) == 1  # what was there is not sent again
    assert all(fault.times == 0 for fault in hub.faults)


def test_a_lost_answer_makes_no_second_commit(folder: Path, hub: HubServer) -> None:
    hub.fail("POST", "/commit/", lose_answer=True)
    assert push(folder) == 0
    assert len(hub.messages(ID)) == 1 and hub.files(ID).keys() >= LOADS


def test_a_commit_that_came_in_between_is_built_upon(folder: Path, hub: HubServer, monkeypatch) -> None:
    repo = hub.add_repo(ID, {"README.md": b"mine"})
    create_commit, came = HfApi.create_commit, []

    def too_late(self, *args, **kwargs):
        if not came:
            files = repo.commits[hub.head(ID)]
            came.append(repo.commit("main", {**files, "model-1.safetensors": files["README.md"]}, "theirs"))
        return create_commit(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", too_late)
    assert push(folder) == 0
    assert [one.status for one in hub.requests("POST", "/commit/")] == [412, 200] and len(hub.pauses) == 1
    assert hub.messages(ID)[-2:] == ["theirs", "Upload MiniGPT-4"]
    assert "model-1.safetensors" not in hub.files(ID)  # which nobody knew of before


@pytest.mark.parametrize(
    "method, path, fault, told",
    [
        ("POST", "/commit/", {"status": 503}, "the Hub is overloaded or out of order (503)"),
        ("POST", "/commit/", {"status": 409}, "somebody else was changing the repository at the same time (409)"),
        ("POST", "/commit/", {"status": 400, "message": "No space left"}, "the Hub refused (400: "),
        ("POST", "/commit/", {"status": 403}, "your token may not write there (403)"),
        ("POST", "/commit/", {"status": 401}, "the Hub does not know you (401)"),
        ("POST", "/commit/", {"drop_after": 1000}, "the connection to the Hub broke"),
        ("PUT", ".", {"drop_after": 300}, "the connection to the Hub broke"),
        ("PUT", ".", {"status": 500}, "the Hub is overloaded or out of order (500)"),
        ("POST", "objects/verify", {"status": 404}, "there is no such repository or branch"),
    ],
)
def test_what_stays_is_told_and_nothing_is_half_there(
    method, path, fault, told, folder: Path, hub: HubServer, capsys
) -> None:
    hub.add_repo(ID, {"README.md": b"mine", "model.safetensors": b"theirs"})
    head, files, mine = hub.head(ID), hub.files(ID), digests(folder)
    hub.fail(method, path, **{"times": 1000, **fault})
    assert push(folder) == 2
    _, mark, line = capsys.readouterr().err.partition("minigpt4 push: ")  # a bar may be unfinished before it
    assert mark and line.count("\n") == 1
    assert f"{folder} is whole but not on the Hub: {told}" in line
    assert f"`minigpt4 push {folder} {ID}`" in line and TOKEN not in line
    assert hub.head(ID) == head and hub.files(ID) == files and digests(folder) == mine
    asked = len(hub.requests("POST", "/commit/"))
    assert asked <= 1 or fault.get("status") in publish.PASSING | {503}  # no is no
    hub.faults.clear()
    assert push(folder) == 0 and hub.files(ID).keys() >= LOADS


@pytest.mark.parametrize(
    "token, told",
    [
        ("hf_of_nobody", "the Hub does not know you (401)"),
        (None, "the Hub does not know you (401)"),
        ("hf_of_a_reader", "your token may not write there (403)"),
        ("hf_of_another", "your token may not write there (403)"),
    ],
)
def test_who_may_not_is_told_at_once(token, told, folder: Path, hub: HubServer, monkeypatch, capsys) -> None:
    hub.add_user("you", "hf_of_a_reader", write=False)
    hub.add_user("another", "hf_of_another")
    monkeypatch.setenv("HF_TOKEN", token) if token else monkeypatch.delenv("HF_TOKEN")
    assert push(folder) == 2
    assert told in capsys.readouterr().err
    assert not hub.pauses and ("model", ID) not in hub.repos


def test_somebody_else_s_repository_is_left_alone(folder: Path, hub: HubServer, capsys) -> None:
    for repo_id, private in (("another/theirs", False), ("another/secret", True)):
        hub.add_repo(repo_id, {"config.json": b"{}"}, private=private)
        before = hub.head(repo_id)
        assert cli.main(["push", str(folder), repo_id]) == 2
        assert "may not write there (403)" in capsys.readouterr().err and hub.head(repo_id) == before


def test_offline_is_told(folder: Path, monkeypatch, capsys) -> None:
    assert push(folder) == 2  # as all tests are
    assert "HF_HUB_OFFLINE is set; unset it" in capsys.readouterr().err


# ---- what is not sent at all ----------------------------------------------------------------------------------------


def drop(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rewrite(change: Callable[[dict], dict]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return edit


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def as_other_model(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama"}')


def as_checkpoints(folder: Path) -> None:
    (folder / "checkpoint-7").mkdir()
    (folder / "config.json").rename(folder / "checkpoint-7" / "config.json")


def with_nan(tensors: dict) -> dict:
    name = min(tensors)
    return {**tensors, name: torch.full_like(tensors[name], float("nan"))}


@pytest.mark.parametrize(
    "damage, told",
    [
        (shutil.rmtree, "There is no folder"),
        (drop("config.json"), "holds no model"),
        (as_checkpoints, "checkpoint-7"),
        (as_other_model, "holds a 'llama' model"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (drop("model.safetensors"), "has no weights"),
        (cut, "truncated or damaged"),
        (rewrite(lambda tensors: {name: tensor[:1] for name, tensor in tensors.items()}), "has the shape"),
        (rewrite(lambda tensors: {min(tensors): tensors[min(tensors)]}), "lacks model.language_projection"),
        (rewrite(lambda tensors: {**tensors, "more": torch.ones(1)}), "holds more"),
        (rewrite(with_nan), "NaN or infinity"),
        (drop("tokenizer.json"), "no processor that loads"),
        (drop("processor_config.json"), "no processor that loads"),
        (drop("modeling_minigpt4.py"), "lacks modeling_minigpt4.py"),
        (drop("segments_minigpt4.py"), "lacks segments_minigpt4.py"),
        (lambda folder: (folder / "README.md").write_text(f"token: {TOKEN}"), "README.md holds a token"),
        (lambda folder: (folder / "NOTICE.md").write_text("https://me:pa55word@host/x"), "NOTICE.md holds a token"),
    ],
)
def test_what_would_not_load_is_not_sent(damage, told, folder: Path, hub: HubServer, capsys) -> None:
    damage(folder)
    assert push(folder) == 2
    error = capsys.readouterr().err
    assert told in error and error.startswith("minigpt4 push: ") and error.count("\n") == 1
    assert TOKEN not in error and "pa55word" not in error
    assert not hub.requests("POST", "/commit/") and not hub.requests("PUT", ".")


def test_adapter_of_the_language_model_is_looked_at(compose: Callable, tmp_path: Path, hub: HubServer, capsys) -> None:
    from peft import LoraConfig

    model, processor = compose()
    model.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "out")
    processor.save_pretrained(tmp_path / "out")
    assert push(tmp_path / "out") == 0
    assert hub.files(ID).keys() >= {"peft/adapter_config.json", "peft/adapter_model.safetensors"}
    assert "LORA adapter" in hub.files(ID)["README.md"].decode()
    (tmp_path / "out" / "peft" / "adapter_model.safetensors").unlink()
    assert push(tmp_path / "out") == 2
    assert "lacks adapter_model.safetensors" in capsys.readouterr().err


def test_full_weights_are_looked_at(compose: Callable, tmp_path: Path, hub: HubServer, capsys) -> None:
    model, processor = compose()
    model.save_pretrained(tmp_path / "out", full=True, max_shard_size="20KB")
    processor.save_pretrained(tmp_path / "out")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 1 and push(tmp_path / "out") == 0
    assert hub.files(ID).keys() >= {path.name for path in shards} | {"model.safetensors.index.json"}
    assert "holds all weights" in hub.files(ID)["README.md"].decode()
    shards[0].unlink()
    assert push(tmp_path / "out") == 2
    assert shards[0].name in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a/b/c", "you/ad apter", "you/adapter.git", "../adapter"])
def test_names_of_repositories_are_looked_at(name: str, folder: Path, hub: HubServer, capsys) -> None:
    assert cli.main(["push", str(folder), name]) == 2
    assert "no name of a repository" in capsys.readouterr().err and not hub.seen


def test_published_files_are_sorted_and_inside(folder: Path) -> None:
    names = list(published_files(folder))
    assert names == sorted(names) and not any(name.startswith(("/", "..")) for name in names)
