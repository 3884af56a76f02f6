"""Whatever pieces spell a reply and its end, the server writes what the processor makes of it, streamed or not."""

import asyncio
import base64
import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from separator_pieces import EXTRA, HASHES, KINDS, WORDS, spell
from tiny_sentencepiece import DOORS, IS_TRANSFORMERS_4, write_folder
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList

from modeling_minigpt4 import MiniGPT4ForConditionalGeneration, MiniGPT4Processor
from recipes_minigpt4.evaluation.questions import Picture, Question, Sampling
from recipes_minigpt4.evaluation.speakers import ChatSpeaker, SpeakerOptions
from recipes_minigpt4.serving.server_compat import build_app
from recipes_minigpt4.serving.server_front import Front, FrontSettings
from recipes_minigpt4.serving.server_model import Loaded
from recipes_minigpt4.tiny import VISION_BACKBONE


def slow(folder: Path) -> Any:
    return DOORS["slow"](write_folder(folder, extra=EXTRA))


TOKENIZERS = {**KINDS, **({"slow": slow} if IS_TRANSFORMERS_4 else {})}


class Script(LogitsProcessor):
    """Makes the model say these ids."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids.pop(0)] = 0.0
        return forced


def ask(app: Any, **fields: Any) -> bytes:
    """What the application answers, without a network."""
    body = json.dumps({"messages": [{"role": "user", "content": "a cat"}], **fields}).encode()
    told = iter([{"type": "http.request", "body": body}])
    parts: list[dict] = []

    async def receive() -> dict:
        return next(told, None) or await asyncio.Event().wait()

    async def send(message: dict) -> None:
        parts.append(message)

    headers = [(b"content-type", b"application/json"), (b"host", b"here")]
    versions = {"asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1"}
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": headers, "query_string": b""}
    asyncio.run(app({**scope, **versions}, receive, send))
    assert parts[0]["status"] == 200, parts
    return b"".join(part.get("body", b"") for part in parts)


def streamed(body: bytes) -> str:
    *events, done, rest = body.decode().split("\n\n")
    assert done == "data: [DONE]" and rest == ""
    deltas = [json.loads(event.removeprefix("data: "))["choices"][0]["delta"] for event in events]
    return "".join(delta.get("content", "") for delta in deltas)


@pytest.fixture(scope="module", params=TOKENIZERS)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    folder = tmp_path_factory.mktemp("words")
    tokenizer = TOKENIZERS[request.param](folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=512, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    eyes = str(VISION_BACKBONE)
    model = MiniGPT4ForConditionalGeneration.from_backbones(eyes, str(folder), qformer=eyes).eval()
    processor = MiniGPT4Processor(
        image_processor=MiniGPT4Processor.from_backbones(eyes, str(folder), config=model.config).image_processor,
        tokenizer=tokenizer,
        image_token_id=model.config.image_token_id,
        num_image_tokens=model.config.num_image_tokens,
        chat_template="vicuna_v0",
    )
    return Loaded("words", model, processor)


def test_replies_of_any_pieces_end_where_they_end(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    app = Front(build_app(loaded), loaded, FrontSettings())
    tokenizer, chance = loaded.processor.tokenizer, random.Random(0)
    letter = spell(tokenizer, ["<0xC3>", "<0xA9>"] if "<0xC3>" in tokenizer.get_vocab() else ["Ã", "©"])  # é
    seen = set()
    for _ in range(10):
        pieces = chance.choices([*HASHES[:2], *HASHES, *WORDS * 3, "\n"], k=chance.randint(1, 8))
        ids = spell(tokenizer, pieces)
        place = chance.randint(0, len(ids))
        ids = [*ids[:place], *letter, *ids[place:], tokenizer.eos_token_id]
        (expected,) = loaded.processor.post_process_image_text_to_text([ids])
        for stream in (False, True):
            script = LogitsProcessorList([Script(ids)])
            monkeypatch.setattr(loaded.model, "_get_logits_processor", lambda *_, script=script, **__: script)
            body = ask(app, stream=stream)
            text = streamed(body) if stream else json.loads(body)["choices"][0]["message"]["content"]
            assert text == expected, (pieces, stream)
        seen.add(expected)
    assert len(seen) > 5 and any("#" in text for text in seen) and any("é" in text for text in seen)


def test_other_chat_models_are_served_too(llava: str, scenes: list[Image.Image]) -> None:
    speaker = ChatSpeaker.load(llava, SpeakerOptions("cpu", "float32"))
    question = Question(Picture("", scenes[0]), "What is this?")
    ((expected, _),) = speaker.complete([speaker.written(question)], scenes[:1], Sampling(12))
    loaded = Loaded("llava", speaker.model, speaker.processor)
    app, file = Front(build_app(loaded), loaded, FrontSettings()), io.BytesIO()
    scenes[0].save(file, "PNG")
    address = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    parts = [{"type": "image_url", "image_url": {"url": address}}, {"type": "text", "text": question.prompt}]
    asked = {"messages": [{"role": "user", "content": parts}], "max_tokens": 12, "temperature": 0}
    assert json.loads(ask(app, **asked))["choices"][0]["message"]["content"] == expected
    assert streamed(ask(app, stream=True, **asked)) == expected
