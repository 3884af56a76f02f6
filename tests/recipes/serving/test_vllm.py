"""vLLM itself: `make test-vllm` installs it and runs these tests. Its greedy replies are those of `generate`."""

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from tiny_sentencepiece import write_folder
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.tiny import LANGUAGE_BACKBONE, VISION_BACKBONE


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm is not installed; `make test-vllm` has it"
    ),
]

KEY = "a-key-of-tests"
NEW_TOKENS = 24
START_SECONDS = 600
STOP_SECONDS = 120


@dataclass
class Served:
    """A server, and the model that it serves."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    model: Any
    processor: Any

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=KEY, max_retries=0, timeout=120)

    def ask(self, messages: list[dict[str, Any]], **options: Any) -> Any:
        options = {"temperature": 0, "max_tokens": NEW_TOKENS, **options}
        return self.client.chat.completions.create(model="tiny", messages=messages, **options)  # type: ignore[arg-type]

    def reply(self, messages: list[dict[str, Any]], **options: Any) -> str:
        return str(self.ask(messages, **options).choices[0].message.content).strip()

    def generated(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The same, by `generate`."""
        inputs = self.processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        options = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **options}
        ids = self.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]
        return str(self.processor.post_process_image_text_to_text(ids)[0])

    def log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")


def save_words(folder: Path) -> None:
    """The embedded world's language model, which ends replies with `###`."""
    save(folder, str(LANGUAGE_BACKBONE), "vicuna_v0_alignment")


def save_sentence_pieces(folder: Path) -> None:
    """A language model with a tokenizer such as LLaMA's, and weights that react to everything they are given."""
    place = write_folder(folder.with_name("language_model"))
    tokenizer = AutoTokenizer.from_pretrained(place)
    config = OPTConfig(  # whose learned positions end with its window
        vocab_size=len(tokenizer), hidden_size=128, word_embed_proj_dim=128, ffn_dim=128, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=512, init_std=0.3, tie_word_embeddings=False,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    language_model = OPTForCausalLM(config)
    # Bytes that are no text have other replacements one by one, as vLLM writes them, than together.
    pieces = [number for token, number in tokenizer.get_vocab().items() if token.startswith("<0x")]
    with torch.no_grad():
        language_model.lm_head.weight[pieces] = 0
    language_model.save_pretrained(place)
    save(folder, str(place), "vicuna_v0")


def save(folder: Path, language_model: str, template: str) -> None:
    """An adapter alone."""
    eyes = str(VISION_BACKBONE)
    model = MiniGPT4ForConditionalGeneration.from_backbones(eyes, language_model, qformer=eyes)
    processor = MiniGPT4Processor.from_backbones(eyes, language_model, config=model.config, chat_template=template)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.fixture(scope="module", params=[save_words, save_sentence_pieces], ids=["words", "sentence_pieces"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """vLLM with an adapter, on each of the tokenizers."""
    folder = tmp_path_factory.mktemp("vllm")
    torch.manual_seed(0)
    request.param(folder / "adapter")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("minigpt4")), "serve", f"tiny={folder / 'adapter'}", "--engine", "vllm",
        "--port", str(port), "--", "--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "16",
    ]  # fmt: skip
    names = {"HF_HOME": str(folder / "home"), "MINIGPT4_API_KEY": KEY, "VLLM_CPU_KVCACHE_SPACE": "1"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, **names}, stdout=log, stderr=log)
    model = MiniGPT4ForConditionalGeneration.from_pretrained(folder / "adapter").eval()
    server = Served(process, port, folder, model, MiniGPT4Processor.from_pretrained(folder / "adapter"))
    try:
        wait_until(lambda: is_healthy(port) or process.poll() is not None, START_SECONDS)
        assert process.poll() is None, server.log()[-5000:]
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


def wait_until(true: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.5)


def is_healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def picture(colour: str, mode: str = "RGB") -> dict[str, Any]:
    """A part of a message, as OpenAI's clients send pictures."""
    file = BytesIO()
    image = Image.new(mode, (80, 60), colour)
    image.paste(Image.new(mode, (30, 30), "white"), (10, 10))
    if mode == "RGBA":
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    image.save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": address}}


def says(*parts: Any, role: str = "user") -> dict[str, Any]:
    return {
        "role": role,
        "content": [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts],
    }


RED, BLUE = picture("red"), picture("blue")
QUESTION = "Describe this image in detail."
CHATS = {
    "one picture": [says(RED, QUESTION)],
    "another picture": [says(BLUE, QUESTION)],
    "one that is transparent": [says(picture("green", "RGBA"), QUESTION)],
    "two pictures": [says(RED, "and", BLUE, "What is different?")],
    "the other way round": [says(BLUE, "and", RED, "What is different?")],
    "two turns": [says(RED, QUESTION), says("A red square.", role="assistant"), says("And what else?")],
    "two turns with a separator": [
        says(RED, QUESTION),
        says("A red square.###", role="assistant"),
        says("And what else?"),
    ],
    "a picture in turn two": [says("Hello."), says("Hello!", role="assistant"), says(BLUE, QUESTION)],
    "words alone": [says("Who are you?")],
    "words in front": [says("Who is in here:", RED)],
    "system words": [says("You are a painter.", role="system"), says(RED, QUESTION)],
    "<image> in front of a picture": [says("<image> is what I typed.", RED, QUESTION)],
    "<image> behind a picture": [says(RED, "What does <image> stand for?")],
    "<image> alone": [says("<image>")],
    "spaces and marks": [says(RED, "  two  spaces, \n a line, </s> <s> and ### in words ")],
}


def test_the_pictures_and_chats_have_replies_of_their_own(served: Served) -> None:
    replies = {name: served.generated(chat) for name, chat in CHATS.items()}
    assert len(set(replies.values())) > len(CHATS) / 2, replies


@pytest.mark.parametrize("name", CHATS)
def test_greedy_replies_are_those_of_generate(served: Served, name: str) -> None:
    assert served.reply(CHATS[name]) == served.generated(CHATS[name])


def test_a_reply_comes_in_pieces_and_never_shows_its_separator(served: Served) -> None:
    for chat in (CHATS["one picture"], CHATS["words alone"]):
        pieces = [chunk.choices[0].delta.content or "" for chunk in served.ask(chat, stream=True)]
        assert "".join(pieces).strip() == served.generated(chat)
        assert len([piece for piece in pieces if piece]) > 1


def test_what_a_client_stops_at_is_added_to_the_separator(served: Served) -> None:
    chat = CHATS["one picture"]
    whole = served.generated(chat, max_new_tokens=80)
    assert served.reply(chat, stop=["never said"], max_tokens=80) == whole
    word = whole.split()[1]
    assert served.reply(chat, stop=word) == whole.partition(word)[0].strip()


def test_prompts_that_are_no_chats_have_places_for_words_only(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="A red <image> square", max_tokens=4, temperature=0)
    assert answer.choices[0].text
    place = served.processor.image_token_id
    with pytest.raises(openai.BadRequestError, match=f"The id {place} is a picture's"):
        served.client.completions.create(model="tiny", prompt=[1, place, 5], max_tokens=4)


@pytest.mark.parametrize(
    "address, reason",
    [
        ("http://127.0.0.1:9/cat.png", "from where nothing is fetched"),
        ("file:///etc/passwd", "not from files"),
        ("data:image/png;base64,AAAA", "damaged or in no format"),
    ],
)
def test_a_picture_that_is_not_to_be_had_is_told(served: Served, address: str, reason: str) -> None:
    with pytest.raises(openai.BadRequestError, match=reason):
        served.reply([says({"type": "image_url", "image_url": {"url": address}}, QUESTION)])


def test_other_mistakes_of_clients_are_told(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens"):
        served.reply([says("word " * 800)])
    with pytest.raises(openai.BadRequestError, match="cannot place a message of role 'tool'"):
        served.reply([says("A result.", role="tool")])
    with pytest.raises(openai.NotFoundError, match="other"):
        served.client.chat.completions.create(model="other", messages=CHATS["words alone"])  # type: ignore[arg-type]
    with pytest.raises(openai.AuthenticationError, match="API key is wrong or missing"):
        served.client.with_options(api_key="another").models.list()
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"http://127.0.0.1:{served.port}/invocations", data=b"{}", timeout=10)


def test_eight_at_once_get_the_replies_that_they_get_alone(served: Served) -> None:
    chats = list(CHATS.values())[:8]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(served.reply, chats))
    assert replies == [served.generated(chat) for chat in chats]


def test_eight_long_prompts_at_once_are_longer_than_the_window_of_one(served: Served) -> None:
    chats = [[says(RED, f"{number} " * 60, "What?")] for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(served.reply, chats))
    assert replies == [served.generated(chat) for chat in chats]


def test_it_is_still_there_and_has_told_nobody_its_key(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.reply(CHATS["one picture"]) == served.generated(CHATS["one picture"])
    log = served.log()
    assert KEY not in log
    assert "Traceback" not in log
    command = subprocess.run(["ps", "-o", "args=", "-p", str(served.process.pid)], capture_output=True, text=True)
    assert KEY not in command.stdout


def test_a_signal_ends_it_after_the_replies_under_way(served: Served) -> None:
    options = {"max_tokens": 200, "extra_body": {"ignore_eos": True}}
    stream = served.client.completions.create(
        model="tiny", prompt="The picture", temperature=0, stream=True, stop=["\ufffd\ufffd"], **options
    )
    pieces = [next(iter(stream)).choices[0].text]
    served.process.send_signal(signal.SIGTERM)
    reasons = [(chunk.choices[0].finish_reason, pieces.append(chunk.choices[0].text))[0] for chunk in stream]
    assert reasons[-1] in ("length", "stop")
    assert served.process.wait(STOP_SECONDS) == 0
    assert not is_healthy(served.port)
    (folder,) = (served.folder / "home" / "minigpt4" / "whole").glob("adapter-*")
    assert json.loads((folder / "config.json").read_text())["backbones"] == {}
