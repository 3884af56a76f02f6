"""The client of a chat model on this machine: a tiny Llama, made here."""

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes_minigpt4.llm import local
from recipes_minigpt4.llm.client import Answer, ClientOptions, Failure, Request, open_client
from recipes_minigpt4.llm.local import LocalClient, SeededSampling
from recipes_minigpt4.utils.errors import RecipeError


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if enable_thinking is not defined or enable_thinking %}thinking\n{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TEXTS = ("a red square", "The picture shows a blue square on a white ground, and nothing else.", "grey", "", "x y z")


def save_chat_model(language_model: str, folder: Path, template: str) -> Path:
    shutil.copytree(language_model, folder)
    (folder / "chat_template.jinja").write_text(template)
    return folder


@pytest.fixture(scope="module")
def folder(parts: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A chat model whose generation settings say the opposite of what is asked for."""
    folder = save_chat_model(parts["language_model"], tmp_path_factory.mktemp("models") / "chat", TEMPLATE)
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": True, "temperature": 5.0, "top_k": 3, "eos_token_id": [2, 300], "max_length": 7})
    )
    return folder


@pytest.fixture(scope="module")
def connect(folder: Path) -> Callable[..., LocalClient]:
    def build(where: Path | str = folder, **options: Any) -> LocalClient:
        client = open_client(f"local:{where}", ClientOptions(**{"device": "cpu", **options}))
        assert isinstance(client, LocalClient)
        return client

    return build


def ask(text: str, **sampling: Any) -> Request:
    return Request(({"role": "user", "content": text},), **{"max_tokens": 12, **sampling})


def answers(client: LocalClient, requests: list[Request]) -> list[Any]:
    return [outcome for _, outcome in sorted(client.ask(requests))]


MIXED = [
    *(ask(text) for text in TEXTS),
    *(ask(text, temperature=0.7) for text in TEXTS),
    *(ask(TEXTS[0], temperature=1.5, seed=seed, max_tokens=4 + seed) for seed in range(4)),
]


def test_answers_do_not_depend_on_the_batch(connect: Callable) -> None:
    together = answers(connect(batch_size=5), MIXED)
    alone = answers(connect(batch_size=1), MIXED[::-1])[::-1]
    assert together == alone
    assert len({answer.text for answer in together}) > 8  # the model reacts to what it reads
    for answer, request in zip(together, MIXED, strict=True):
        assert answer.completion_tokens == request.max_tokens or answer.finish_reason == "stop"


def likeliest(folder: Path, prompt: str) -> tuple[int, list[int]]:
    """The length of a prompt, and its twelve tokens that follow, one by one and without a cache."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
    length = ids.shape[1]
    for _ in range(12):
        ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return length, ids[0, length:].tolist()


def test_the_likeliest_answer_is_that_of_the_model(connect: Callable, folder: Path) -> None:
    chat = ({"role": "system", "content": "Say it."}, {"role": "user", "content": TEXTS[0]})
    (answer,) = answers(connect(), [Request(chat, max_tokens=12)])
    length, said = likeliest(folder, "<s>system: Say it.\nuser: a red square\nassistant:")
    assert not {2, 300} & set(said)
    expected = connect().tokenizer.decode(said, skip_special_tokens=True).strip()
    assert answer == Answer(expected, length, 12, finish_reason="length")


def test_an_answer_ends_where_the_model_ends_it(connect: Callable, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, model := tmp_path / "model")
    _, said = likeliest(folder, "<s>user: a red square\nassistant:")
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [said[5], 2]}))
    (answer,) = answers(connect(model), [ask(TEXTS[0])])
    before = said[: said.index(said[5])]
    assert (answer.finish_reason, answer.completion_tokens) == ("stop", len(before))
    assert answer.text == connect().tokenizer.decode(before).strip() != ""


def test_other_seeds_give_other_answers_and_the_same_one_the_same(connect: Callable) -> None:
    requests = [ask(TEXTS[0], temperature=1.0, seed=seed) for seed in range(6)]
    first = [answer.text for answer in answers(connect(), requests)]
    torch.manual_seed(99)  # which has no part in it
    assert [answer.text for answer in answers(connect(), requests)] == first and len(set(first)) > 3


def test_sampling_has_the_probabilities_of_the_softmax() -> None:
    logits = torch.tensor([1.0, 0.0, 2.0, -1.0])
    requests = [ask("a", temperature=0.8, seed=seed) for seed in range(4000)]
    scores = SeededSampling([*requests, ask("a")])(torch.empty(0), logits.expand(4001, 4))
    drawn = Counter(scores[:-1].argmax(-1).tolist())
    for token, share in enumerate((logits / 0.8).softmax(-1).tolist()):
        assert abs(drawn[token] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5
    assert scores[-1].tolist() == logits.tolist()  # a row that is not sampled


def test_answers_are_kept_until_the_model_changes(
    connect: Callable, folder: Path, tmp_path: Path, monkeypatch
) -> None:
    shutil.copytree(folder, model := tmp_path / "model")
    asked: list[int] = []
    generate = LocalClient._generate
    monkeypatch.setattr(
        LocalClient, "_generate", lambda self, batch: asked.append(len(batch)) or generate(self, batch)
    )
    options = {"cache": tmp_path / "kept", "batch_size": 4}
    requests = [ask(text) for text in TEXTS]
    first = answers(connect(model, **options), requests)
    assert asked == [4, 1] and [answer.cached for answer in answers(connect(model, **options), requests)] == [True] * 5
    weights = model / "model.safetensors"
    os.utime(weights, ns=(1, 1))  # trained anew
    assert [answer.cached for answer in answers(connect(model, **options), requests)] == [False] * 5
    assert connect(model).name.startswith("local:model@") and connect(model).name.endswith(" in float32")
    assert connect(model, dtype="bfloat16").name.endswith(" in bfloat16") and first[0].cost == 0


def test_ctrl_c_keeps_the_batches_that_are_done(connect: Callable, tmp_path: Path, monkeypatch) -> None:
    client, generate = connect(cache=tmp_path, batch_size=2), LocalClient._generate

    def interrupted(self: LocalClient, batch: Any) -> Any:
        if len(self.cache._answers) == 4:
            raise KeyboardInterrupt
        return generate(self, batch)

    monkeypatch.setattr(LocalClient, "_generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answers(client, [ask(text) for text in TEXTS])
    monkeypatch.setattr(LocalClient, "_generate", generate)
    again = answers(connect(cache=tmp_path), [ask(text) for text in TEXTS])
    assert sum(answer.cached for answer in again) == 4


def test_a_batch_that_is_too_large_is_halved(connect: Callable, monkeypatch) -> None:
    sizes, generate = [], LocalClient._generate

    def small_memory(self: LocalClient, batch: Any) -> Any:
        sizes.append(len(batch))
        if len(batch) > 2:
            raise torch.cuda.OutOfMemoryError("too large")
        return generate(self, batch)

    expected = answers(connect(), [ask(text) for text in TEXTS])
    monkeypatch.setattr(LocalClient, "_generate", small_memory)
    assert answers(connect(batch_size=5), [ask(text) for text in TEXTS]) == expected and sizes == [5, 2, 2, 1]
    monkeypatch.setattr(LocalClient, "_generate", lambda self, batch: small_memory(self, [0, 0, 0]))
    with pytest.raises(RecipeError, match=r"does not fit the memory; name a smaller model\.$"):
        answers(connect(batch_size=5), [ask(text) for text in TEXTS])


def test_what_does_not_fit_the_model_fails_alone(connect: Callable) -> None:
    got = answers(connect(), [ask("a " * 600), ask("a")])
    assert isinstance(got[0], Failure) and isinstance(got[1], Answer)
    assert got[0].reason.endswith("tokens and an answer of 12 do not fit the model's 512 positions")


def test_what_cannot_answer_is_told(connect: Callable, parts: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"^local:\S+ has no chat template; name a model that was trained to chat\.$"
    ):
        connect(parts["language_model"])
    strict = "{{ raise_exception('only users') }}"
    model = save_chat_model(parts["language_model"], tmp_path / "strict", strict)
    with pytest.raises(
        RecipeError, match=r"^The chat template of local:strict@.* \(only users\); name another model\.$"
    ):
        answers(connect(model), [ask("a")])
    with pytest.raises(RecipeError, match=r"^local:\S+none: there is no such folder; name a folder or repository"):
        connect(tmp_path / "none")
    for where in ("nobody/nothing", "nobody/nothing@v1", "a/b/c"):
        with pytest.raises(RecipeError, match=rf"^local:{where} cannot be loaded as a language model \(.*\); name a"):
            connect(where)
    picture = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
    with pytest.raises(RecipeError, match=r"is asked about pictures; a local model reads text only\.$"):
        answers(connect(), [Request(({"role": "user", "content": picture},))])


def test_code_of_others_is_not_run(connect: Callable, folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, model := tmp_path / "foreign")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'was_run')!r}, 'w')\n")
    with pytest.raises(RecipeError, match="cannot be loaded as a language model"):
        connect(model)
    assert not (tmp_path / "was_run").exists()


def test_parts_of_text_are_text(connect: Callable) -> None:
    parts = [{"type": "text", "text": TEXTS[0]}]
    got = answers(connect(), [ask(TEXTS[0]), Request(({"role": "user", "content": parts},), max_tokens=12)])
    assert got[0] == got[1]


def test_fingerprints_tell_models_apart(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, model := tmp_path / "model")
    first = local.fingerprint(model)
    (model / "notes.md").write_text("nothing that matters")
    assert local.fingerprint(model) == first
    (model / "chat_template.jinja").write_text("another")
    assert local.fingerprint(model) != first
