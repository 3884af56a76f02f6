"""A chat, turn by turn: each reply is that of a fresh start, and nothing is computed that was computed before."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_sentencepiece import DOORS, IS_TRANSFORMERS_4, write_folder
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from modeling_minigpt4 import Conversation, MiniGPT4ImageProcessor, MiniGPT4Processor, Turn
from modeling_minigpt4.generation_minigpt4 import separator_pieces
from processing_minigpt4 import wrap_chat_template


LIKE_CHATML = (
    "{% for message in messages %}<|{{ message.role }}|>\n{{ message.content }}"
    "{{ eos_token if message.role == 'assistant' }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# As Qwen3's, which leaves out of earlier replies what the model said to itself.
FORGETFUL = LIKE_CHATML.replace("{{ message.content }}", "{{ message.content.split('#so#')[-1] }}")
TEMPLATES = ("vicuna_v0", "llama2", "wrapped")
PIECES = ("###", "▁###", "##", "▁cat", "▁The", ".")
WORDS = 6  # tokens of a reply that the model makes up


class Chat:
    """A tiny model with a processor, and what they are asked to do."""

    def __init__(self, model: Any, tokenizer: Any, template: str, picture: Callable) -> None:
        config = model.config
        self.model, self.picture = model, picture
        self.processor = MiniGPT4Processor(
            image_processor=MiniGPT4ImageProcessor(size={"height": 28, "width": 28}),
            tokenizer=tokenizer,
            image_token_id=config.image_token_id,
            num_image_tokens=config.num_image_tokens,
            chat_template=wrap_chat_template(tokenizer, LIKE_CHATML) if template == "wrapped" else template,
        )
        self.ends_with_separator = template == "vicuna_v0"

    def begin(self, **options: Any) -> Conversation:
        return Conversation(self.model, self.processor, **options)

    def spell(self, text: str) -> list[int]:
        """Ids of a reply as a model says it: its first word begins a text of its own."""
        return self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]

    def end(self) -> list[int]:
        return self.spell("a###")[len(self.spell("a")) :] if self.ends_with_separator else [2]


class Script(LogitsProcessor):
    """Make the model say these ids, whatever it would."""

    def __init__(self, ids: Sequence[int]) -> None:
        self.ids = list(ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids.pop(0)] = 0.0
        return forced


class Heard(BaseStreamer):
    """The ids of the prompt, and those of the reply; `stop` raises at so many tokens of it."""

    def __init__(self, stop: int | None = None) -> None:
        self.prompt: list[int] | None = None
        self.ids: list[int] = []
        self.stop = stop

    def put(self, value: torch.Tensor) -> None:
        if self.prompt is None:
            self.prompt = value[0].tolist()
            return
        self.ids += value.tolist()
        if len(self.ids) == self.stop:
            raise KeyboardInterrupt

    def end(self) -> None:
        pass


class Counts:
    pictures = 0
    tokens = 0


@contextmanager
def counted(model: Any) -> Iterator[Counts]:
    """Pictures that the vision side gets, and tokens that the decoder gets, meanwhile."""
    counts = Counts()

    def see(_: Any, args: Any, kwargs: Any) -> None:
        counts.pictures += len(args[0] if args else kwargs["pixel_values"])

    def read(_: Any, args: Any, kwargs: Any) -> None:
        counts.tokens += kwargs["inputs_embeds"].shape[:2].numel()

    hooks = [
        model.model.vision_model.register_forward_pre_hook(see, with_kwargs=True),
        model.model.language_model.register_forward_pre_hook(read, with_kwargs=True),
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def say(talk: Any, text: str, ids: Sequence[int], images: Sequence[Any] = (), **options: Any) -> str:
    """Ask something to which the model replies with these ids."""
    options = {"max_new_tokens": len(ids), "do_sample": False, **options}
    return talk.ask(text, images, logits_processor=[Script(ids)], **options)


def fresh(chat: Chat, prompt: list[int], pictures: Sequence[Any], **options: Any) -> list[int]:
    """What the model says to these ids from a fresh start."""
    given = {}
    if pictures:
        given["pixel_values"] = chat.processor.image_processor(list(pictures), return_tensors="pt")["pixel_values"]
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": WORDS, "do_sample": False, **options}
    return chat.model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options)[0, len(prompt) :].tolist()


def rendered(chat: Chat, talk: Conversation) -> str:
    """The text of the last prompt as the template writes it."""
    return chat.processor.apply_chat_template(talk.messages[:-1], add_generation_prompt=True)


def written(chat: Chat, messages: Any) -> list[int]:
    """The ids of a prompt that is tokenized anew."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
    return chat.processor.apply_chat_template([messages], **options)["input_ids"][0]


def assert_same_text(chat: Chat, prompt: list[int], text: str) -> None:
    """Ids stand for a text; SentencePiece has a space in front of every piece that is tokenized alone."""
    tokenizer = chat.processor.tokenizer
    seen = chat.processor.decode(prompt, clean_up_tokenization_spaces=False)
    seen = seen if text.startswith(tokenizer.bos_token) else seen.removeprefix(tokenizer.bos_token)
    if "▁" in tokenizer.get_vocab():
        seen, text = seen.replace(" ", ""), text.replace(" ", "")
    assert seen == text


@pytest.fixture(scope="module")
def tokenizers(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sentencepiece")
    tokenizer.save_pretrained(folder / "bytes")
    byte_level = type(tokenizer).from_pretrained(folder / "bytes")  # processors teach theirs something
    return {"sentencepiece": DOORS["auto"](write_folder(folder, extra=PIECES)), "byte_level": byte_level}


@pytest.fixture(scope="module")
def make_chat(make_model: Callable, tokenizers: dict[str, Any], picture: Callable) -> Callable[..., Chat]:
    made: dict[Any, Chat] = {}

    def build(kind: str = "sentencepiece", template: str = "vicuna_v0", positions: int = 1024, **text: Any) -> Chat:
        key = (kind, template, positions, *text.items())
        if key not in made:
            fields = {"vocab_size": len(tokenizers[kind]), "max_position_embeddings": positions, **text}
            model = make_model(text=fields)
            chat = Chat(model, tokenizers[kind], template, picture)
            model.generation_config.update(eos_token_id=2, pad_token_id=0, max_new_tokens=WORDS, do_sample=False)
            if chat.ends_with_separator:
                pieces = separator_pieces(tokenizers[kind], "###")
                model.generation_config.update(separator="###", separator_pieces=pieces)
            made[key] = chat
        return made[key]

    return build


@pytest.fixture
def chat(make_chat: Callable) -> Chat:
    return make_chat()


# ---- what is computed -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("kind", ["sentencepiece", "byte_level"])
def test_a_second_turn_computes_what_is_new(kind: str, template: str, make_chat: Callable) -> None:
    chat = make_chat(kind, template)
    talk, red, first, second = chat.begin(), chat.picture("red"), Heard(), Heard()
    said = chat.spell("The cat") + chat.end()
    with counted(chat.model) as counts:
        assert say(talk, "What is this?", said, [red], streamer=first) == "The cat"
    assert (counts.pictures, counts.tokens) == (1, len(first.prompt) + len(said) - 1)
    assert first.prompt == written(chat, talk.messages[:1])

    with counted(chat.model) as counts:
        reply = talk.ask("What colour is it?", streamer=second)
    # LLaMA-2's template has no end of a reply between turns.
    kept = first.prompt + (said[:-1] if template == "llama2" else said)
    assert second.prompt[: len(kept)] == kept
    assert second.prompt[len(kept) :] == written(chat, talk.messages[:3])[len(kept) - len(second.prompt) :]
    assert_same_text(chat, second.prompt, rendered(chat, talk))
    new = len(second.prompt) - len(first.prompt) - (len(said) - 1)  # the last token was said, and not read
    assert (counts.pictures, counts.tokens) == (0, new + len(second.ids) - 1)
    assert fresh(chat, second.prompt, [red]) == second.ids
    assert reply == chat.processor.post_process_image_text_to_text([second.ids])[0]
    turns = [(turn.prompt_tokens, turn.computed_tokens, turn.new_tokens, turn.encoded_pictures) for turn in talk.turns]
    assert turns == [
        (len(first.prompt), len(first.prompt) + len(said) - 1, len(said), 1),
        (len(second.prompt), new + len(second.ids) - 1, len(second.ids), 0),
    ]
    assert all(isinstance(turn, Turn) and turn.seconds > 0 for turn in talk.turns)
    assert [message["role"] for message in talk.messages] == ["user", "assistant"] * 2
    assert talk.messages[0]["content"][0]["image"] is red
