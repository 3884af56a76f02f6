"""Chats of tiny models: what they are asked, what they are made to say, and what is counted meanwhile."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from modeling_minigpt4 import Conversation, MiniGPT4ImageProcessor, MiniGPT4Processor
from processing_minigpt4 import wrap_chat_template
from processing_minigpt4.conversations_minigpt4 import LITERAL_MARK


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


@contextmanager
def recorded(model: Any) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Prompt and reply, as ids, of each call of `generate` meanwhile."""
    calls: list[tuple[list[int], list[int]]] = []
    own = model.generate

    def generate(**kwargs: Any) -> Any:
        found = own(**kwargs)
        prompt = kwargs["input_ids"][0].tolist()
        calls.append((prompt, found.sequences[0, len(prompt) :].tolist()))
        return found

    model.generate = generate
    try:
        yield calls
    finally:
        del model.generate


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
    return chat.model.generate(ids, attention_mask=torch.ones_like(ids), **given, **options)[0, len(prompt) :].tolist()


def rendered(chat: Chat, talk: Conversation) -> str:
    """The text of the last prompt as the template writes it, without what marks a placeholder that is text."""
    text: str = chat.processor.apply_chat_template(talk.messages[:-1], add_generation_prompt=True)
    return text.replace(LITERAL_MARK, "")


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
