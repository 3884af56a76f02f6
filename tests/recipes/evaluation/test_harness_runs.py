"""The harnesses themselves, on local rows and offline: `make test-harness` installs them and runs these tests."""

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.evaluation.harness import TASKS, main
from recipes_minigpt4.evaluation.harness.chats import Chat, chat_about, losses, reply
from recipes_minigpt4.evaluation.harness.choices import question
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE, metrics
from recipes_minigpt4.tiny.scenes import evaluation_scenes


pytestmark = pytest.mark.slow

SCENES = 6
TEXT = ("A square has", ["four equal sides.", "no corners at all."])  # nothing to look at
ROWS = [  # of A-OKVQA, pictures by their paths
    {"image": "0.png", "question": "Which shape is there?", "choices": ["circle", "star", "heart", "cross"],
     "correct_choice_idx": 2},
    {"image": "1.png", "question": "Which colour is there?", "choices": ["red", "blue", "pink", "a very dark brown"],
     "correct_choice_idx": 0},
]  # fmt: skip
KEY = "a-key-of-many-letters"  # of the server
OWN_TASK = """
include: {folder}/{task}.yaml
task: own_{task}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: rows.jsonl
"""


def needs(package: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed; `make test-harness` has it")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an adapter and a whole model, scenes, and rows of one's own with their tasks."""
    folder = tmp_path_factory.mktemp("harness")
    torch.manual_seed(0)
    model = MiniGPT4ForConditionalGeneration.from_backbones(
        vision=VISION_BACKBONE, qformer=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE
    )
    processor = MiniGPT4Processor.from_backbones(
        vision=VISION_BACKBONE, language_model=LANGUAGE_BACKBONE, config=model.config
    )
    for name in ("adapter", "whole"):
        model.save_pretrained(folder / name, full=name == "whole")
        processor.save_pretrained(folder / name)
    assert main(["scenes", str(folder / "scenes.parquet"), "--scenes", str(SCENES)]) == 0
    for number, (image, _) in enumerate(evaluation_scenes(len(ROWS), 0)):
        image.save(folder / f"{number}.png")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    text = {"text": TEXT[0], "choices": TEXT[1], "right": 0}
    (folder / "text.jsonl").write_text(json.dumps(text) + "\n")
    for harness, tasks in TASKS.items():
        (folder / f"own_{harness}").mkdir()
        for task in sorted(tasks.glob("minigpt4_aokvqa*.yaml")):
            text_of = OWN_TASK.format(folder=tasks, task=task.stem)
            (folder / f"own_{harness}" / task.name).write_text(text_of)
    (folder / "own_lm_eval" / "text.yaml").write_text(
        "task: text_alone\ndataset_path: json\ndataset_kwargs: {data_files: {test: text.jsonl}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: text\ndoc_to_choice: choices\ndoc_to_target: right\n"
    )
    return folder


@pytest.fixture(scope="module")
def environment(place: Path) -> dict[str, str]:
    """Of every process: offline, without a GPU, and without what this machine has."""
    names = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "home"), "HOME": str(place), "OMP_NUM_THREADS": "1"}
    server = {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1", "OPENAI_API_KEY": KEY, "MINIGPT4_API_KEY": KEY}
    return {**os.environ, **names, **server, "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def server(place: Path, environment: dict[str, str]) -> Iterator[str]:
    """The address of `minigpt4 serve adapter`."""
    command = [sys.executable, "-m", "recipes_minigpt4.cli", "serve", "adapter", "--device", "cpu", "--port", "0"]
    log = place / "server.log"
    with open(log, "w") as told:
        process = subprocess.Popen(command, cwd=place, env=environment, stdout=told, stderr=subprocess.STDOUT)
    try:
        begun = re.compile(r"^adapter answers at (http://127\.0\.0\.1:\d+)/v1 ", re.MULTILINE)
        while (found := begun.search(log.read_text())) is None:
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def ended(place: Path, environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess]:
    """`ended(harness, *arguments)`: the command, once it has ended."""

    def ended(harness: str, *arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", harness, *arguments]
        return subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)

    return ended


@pytest.fixture(scope="module")
def run(place: Path, ended: Callable[..., subprocess.CompletedProcess]) -> Callable[..., dict[str, Any]]:
    """`run(harness, *arguments)`: what the command wrote, offline: `results`, and the samples of every task."""

    def run(harness: str, *arguments: str) -> dict[str, Any]:
        output = place / f"output-{len(list(place.glob('output-*')))}"
        done = ended(harness, *arguments, "--output_path", str(output), "--log_samples")
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        found = list(output.rglob("*results*.json"))  # lmms-eval ends with 0 after a failure too
        assert len(found) == 1, done.stdout[-3000:] + done.stderr[-3000:]
        samples = {}
        for file in output.rglob("*samples*.jsonl"):
            rows = [json.loads(line) for line in file.read_text().splitlines()]
            samples[file.name] = sorted(rows, key=lambda row: row["doc_id"])
        return {"results": json.loads(found[0].read_text())["results"], "samples": samples}

    return run


def samples_of(found: dict[str, Any], task: str) -> list[Any]:
    """What the model gave for every row of a task, in the rows' order."""
    (rows,) = [rows for name, rows in found["samples"].items() if re.search(rf"samples_{task}(_20|\.)", name)]
    return [row["filtered_resps"] for row in rows]


def texts_of(found: dict[str, Any], task: str) -> list[str]:
    """The replies to a task with one for every row; harnesses strip them or do not."""
    texts = [text if isinstance(text, str) else text[0] for text in samples_of(found, task)]
    return [text.strip() for text in texts]


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, Any]:
    """The same, asked of the model here."""
    model = MiniGPT4ForConditionalGeneration.from_pretrained(place / "adapter").eval()
    processor = MiniGPT4Processor.from_pretrained(place / "adapter")
    images = [image for image, _ in evaluation_scenes(SCENES, SCENES // 3)]

    def replies(chats: list[Chat], length: int) -> list[str]:
        return reply(model, processor, chats, {"do_sample": False, "max_new_tokens": length})

    pictures = [Image.open(place / row["image"]) for row in ROWS]
    asked = [chat_about([picture], question(row)) for picture, row in zip(pictures, ROWS, strict=True)]
    plain = [chat_about([picture], row["question"]) for picture, row in zip(pictures, ROWS, strict=True)]
    scenes = replies([chat_about([image], "Describe this image in detail.") for image in images], 120)
    return {
        "scenes": scenes,
        "short": replies([chat_about([image], "Describe this image in detail.") for image in images], 7),
        "scores": metrics.score(scenes, [scene for _, scene in evaluation_scenes(SCENES, SCENES // 3)]),
        "aokvqa": replies(asked, 30),
        "likelihood": [
            losses(model, processor, [chat] * 4, row["choices"]) for chat, row in zip(plain, ROWS, strict=True)
        ],
        "text": [text_alone(model, processor, *TEXT)],
    }


@torch.inference_mode()
def text_alone(model: Any, processor: Any, text: str, endings: list[str]) -> list[float]:
    """The log-probability of every ending of a text, without a chat around it."""
    found = []
    for ending in endings:
        start = len(processor.tokenizer(text)["input_ids"])
        ids = torch.tensor([processor.tokenizer(f"{text} {ending}")["input_ids"]])
        scores = model(input_ids=ids).logits.log_softmax(-1)[0, start - 1 : -1]
        found.append(float(scores.gather(-1, ids[0, start:, None]).sum()))
    return found


def metrics_of(found: dict[str, Any], task: str) -> dict[str, float]:
    return {name.partition(",")[0]: value for name, value in found["results"][task].items() if "stderr" not in name}


@needs("lm_eval")
def test_lm_eval_runs_an_adapter(run: Callable, expected: dict) -> None:
    found = run(
        "lm_eval", "--model", "hf-multimodal", "--model_args", "pretrained=adapter,trust_remote_code=True",
        "--apply_chat_template", "--device", "cpu", "--batch_size", "4",
        "--include_path", str(TASKS["lm_eval"]), "--tasks", "minigpt4_scenes",
    )  # fmt: skip
    assert texts_of(found, "minigpt4_scenes") == expected["scenes"]
    scores = metrics_of(found, "minigpt4_scenes")
    assert {name: scores[name] for name in metrics.SCORES} == pytest.approx(expected["scores"])
    assert "###" not in "".join(expected["scenes"]) and len(set(expected["scenes"])) > 1


@needs("lm_eval")
def test_lm_eval_runs_a_whole_model_and_keeps_the_length_that_a_task_sets(run: Callable, expected: dict) -> None:
    found = run(
        "lm_eval", "--model", "hf-multimodal", "--model_args", "pretrained=whole,trust_remote_code=True",
        "--apply_chat_template", "--device", "cpu", "--batch_size", "3", "--gen_kwargs", "max_gen_toks=7",
        "--include_path", str(TASKS["lm_eval"]), "--tasks", "minigpt4_scenes",
    )  # fmt: skip
    assert texts_of(found, "minigpt4_scenes") == expected["short"] != expected["scenes"]


@needs("lm_eval")
def test_lm_eval_runs_rows_of_ones_own(run: Callable, expected: dict) -> None:
    found = run(
        "lm_eval", "--model", "hf-multimodal", "--model_args", "pretrained=adapter,trust_remote_code=True",
        "--apply_chat_template", "--device", "cpu", "--include_path", "own_lm_eval", "--tasks", "own_minigpt4_aokvqa",
    )  # fmt: skip
    assert texts_of(found, "own_minigpt4_aokvqa") == expected["aokvqa"]
    assert metrics_of(found, "own_minigpt4_aokvqa").keys() >= {"acc", "unread"}


@needs("lm_eval")
def test_lm_eval_scores_likelihoods_of_text(run: Callable, expected: dict) -> None:
    found = run(
        "lm_eval", "--model", "hf-multimodal", "--model_args", "pretrained=adapter,trust_remote_code=True",
        "--device", "cpu", "--include_path", "own_lm_eval", "--tasks", "text_alone",
    )  # fmt: skip
    likelihoods = [[float(first) for first, _ in row] for row in samples_of(found, "text_alone")]
    assert likelihoods == [pytest.approx(row, abs=1e-3) for row in expected["text"]]


@needs("lmms_eval")
def test_lmms_eval_runs_an_adapter(run: Callable, expected: dict) -> None:
    shared = ["--model", "minigpt4", "--model_args", "pretrained=adapter", "--device", "cpu", "--batch_size", "4"]
    found = run("lmms_eval", *shared, "--include_path", str(TASKS["lmms_eval"]), "--tasks", "minigpt4_scenes")
    assert texts_of(found, "minigpt4_scenes") == expected["scenes"]
    scores = metrics_of(found, "minigpt4_scenes")
    assert {name: scores[name] for name in metrics.SCORES} == pytest.approx(expected["scores"])


@needs("lmms_eval")
def test_lmms_eval_runs_a_whole_model_and_scores_likelihoods_with_pictures(run: Callable, expected: dict) -> None:
    found = run(
        "lmms_eval", "--model", "minigpt4", "--force_simple", "--model_args", "pretrained=whole", "--device", "cpu",
        "--batch_size", "3", "--include_path", "own_lmms_eval",
        "--tasks", "own_minigpt4_aokvqa_likelihood,own_minigpt4_aokvqa",
    )  # fmt: skip
    said = [[float(loss) for loss, _ in row] for row in samples_of(found, "own_minigpt4_aokvqa_likelihood")]
    assert said == [pytest.approx([loss for loss, _ in row], abs=1e-4) for row in expected["likelihood"]]
    best = [min(range(4), key=row.__getitem__) for row in said]
    right = [choice == row["correct_choice_idx"] for choice, row in zip(best, ROWS, strict=True)]
    assert metrics_of(found, "own_minigpt4_aokvqa_likelihood")["acc"] == sum(right) / 2
    assert texts_of(found, "own_minigpt4_aokvqa") == expected["aokvqa"]


@needs("lmms_eval")
@pytest.mark.parametrize(
    ("arguments", "sentence"), [({"speed": 3}, "has no speed; leave it out"), ({"batch_size": "auto"}, "from 1 on")]
)
def test_what_the_model_of_lmms_eval_does_not_take(place: Path, arguments: dict, sentence: str) -> None:
    from recipes_minigpt4.evaluation.harness.lmms_model import MiniGPT4

    with pytest.raises(ValueError, match=sentence):
        MiniGPT4(str(place / "adapter"), **arguments)


# ---- behind a server ------------------------------------------------------------------------------------------------


def served_by_lm_eval(server: str, more: str = "") -> list[str]:
    """The arguments of lm_eval for the model of a server."""
    where = f"model=adapter,base_url={server}/v1/chat/completions{more}"
    return ["--model", "local-chat-completions", "--model_args", where, "--apply_chat_template"]


@needs("lm_eval")
def test_lm_eval_asks_a_server(run: Callable, expected: dict, server: str) -> None:
    ours = ["--include_path", str(TASKS["lm_eval"]), "--tasks", "minigpt4_scenes_served"]
    found = run("lm_eval", *served_by_lm_eval(server, ",num_concurrent=4"), *ours)
    assert texts_of(found, "minigpt4_scenes_served") == expected["scenes"]
    scores = metrics_of(found, "minigpt4_scenes_served")
    assert {name: scores[name] for name in metrics.SCORES} == pytest.approx(expected["scores"])
    short = run("lm_eval", *served_by_lm_eval(server), *ours, "--gen_kwargs", "max_gen_toks=7,num_beams=1")
    assert texts_of(short, "minigpt4_scenes_served") == expected["short"]


@needs("lm_eval")
def test_lm_eval_asks_a_server_about_rows_of_ones_own(run: Callable, expected: dict, server: str) -> None:
    own = ["--include_path", "own_lm_eval", "--tasks", "own_minigpt4_aokvqa_served"]
    found = run("lm_eval", *served_by_lm_eval(server), *own)
    assert texts_of(found, "own_minigpt4_aokvqa_served") == expected["aokvqa"]
    assert metrics_of(found, "own_minigpt4_aokvqa_served").keys() >= {"acc", "unread"}


@needs("lm_eval")
def test_lm_eval_tells_what_a_server_refuses(ended: Callable, server: str) -> None:
    own = ["--include_path", "own_lm_eval", "--tasks", "own_minigpt4_aokvqa_served"]
    done = ended("lm_eval", *served_by_lm_eval(server, ",max_retries=1"), *own, "--gen_kwargs", "logprobs=True")
    assert done.returncode != 0 and "`logprobs` cannot be True here; leave it out." in done.stdout + done.stderr


@needs("lmms_eval")
@pytest.mark.parametrize("model", ["openai", "async_openai"])
def test_lmms_eval_asks_a_server(model: str, run: Callable, expected: dict, server: str) -> None:
    asked = ["--model", model, "--model_args", f"model_version=adapter,base_url={server}/v1"]
    found = run("lmms_eval", *asked, "--include_path", str(TASKS["lmms_eval"]), "--tasks", "minigpt4_scenes")
    assert texts_of(found, "minigpt4_scenes") == expected["scenes"]
    scores = metrics_of(found, "minigpt4_scenes")
    assert {name: scores[name] for name in metrics.SCORES} == pytest.approx(expected["scores"])


@needs("lmms_eval")
def test_lmms_eval_asks_a_server_about_rows_of_ones_own(run: Callable, expected: dict, server: str) -> None:
    asked = ["--model", "openai", "--model_args", f"model_version=adapter,base_url={server}/v1"]
    found = run("lmms_eval", *asked, "--include_path", "own_lmms_eval", "--tasks", "own_minigpt4_aokvqa")
    assert texts_of(found, "own_minigpt4_aokvqa") == expected["aokvqa"]
    assert metrics_of(found, "own_minigpt4_aokvqa").keys() >= {"acc", "unread"}


@needs("lmms_eval")
def test_lmms_eval_gives_no_numbers_if_a_server_refuses(place: Path, ended: Callable, server: str) -> None:
    asked = ["--model", "openai", "--model_args", f"model_version=other,base_url={server}/v1,max_retries=1"]
    own = ["--include_path", "own_lmms_eval", "--tasks", "own_minigpt4_aokvqa", "--output_path", "refused"]
    done = ended("lmms_eval", *asked, *own)  # whose exit status is 0
    assert "A request to the server has failed, so there are no numbers" in done.stdout + done.stderr
    assert "There is no model 'other' here; this server has one, 'adapter'." in done.stdout + done.stderr
    assert not list(place.glob("refused/**/*results*.json"))
