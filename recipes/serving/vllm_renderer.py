"""Chats to ids inside vLLM, by the processor that made those of training: the same places, the same dummy prefixes."""

import re
import threading
from typing import Any

import PIL.Image
from jinja2 import TemplateError
from vllm.exceptions import VLLMValidationError
from vllm.renderers.chat_utils import parse_chat_messages, parse_chat_messages_async
from vllm.renderers.hf import HfRenderer
from vllm.renderers.inputs.preprocess import parse_dec_only_prompt
from vllm.utils.async_utils import make_async

from processing_minigpt4.segments_minigpt4 import encode_rows
from recipes_minigpt4.serving.vllm_model import processor_of


# The prompt needs to know where pictures are, not what they show: their pixels are made elsewhere, once.
BLANK = PIL.Image.new("RGB", (1, 1))
OPTIONS = {"add_generation_prompt", "continue_final_message", "tools", "documents"}
# What is no option of a template though its name may stand there.
NOT_OPTIONS = {"messages", "images", "videos", "audio", "text", "segment_mark", "tokenize", "return_dict"}


class MiniGPT4Renderer(HfRenderer):  # type: ignore[misc]
    """
    Makes prompts. What a user types is text, `<image>` too; pictures are where the messages have them.

    Args:
        config: vLLM's.
        tokenizer: vLLM's, for everything but prompts with pictures and chats.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.processor = processor_of(self.model_config)
        self._one_at_a_time = threading.Lock()  # fast tokenizers are not for several threads
        self._ids_of_async = make_async(self._ids_of, executor=self._executor)

    def _ids_of(self, conversation: list[Any], params: Any) -> list[int]:
        """The ids of a chat, image tokens included."""
        template = params.chat_template or self.processor.chat_template
        options = options_of(str(template), params.chat_template_kwargs)
        chat = [{**message, "content": _with_pictures(message.get("content"))} for message in conversation]
        options |= {"chat_template": params.chat_template, "tokenize": True, "return_dict": True}
        try:
            with self._one_at_a_time:
                inputs = self.processor.apply_chat_template(chat, **options)
        except TemplateError as error:  # a chat that the template refuses
            raise VLLMValidationError(str(error), parameter="messages") from error
        (ids,) = inputs["input_ids"]
        return list(ids)

    def render_messages(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """A chat as vLLM takes it, and its prompt."""
        conversation, pictures, uuids = parse_chat_messages(messages, **self._how_to_parse(params))
        return conversation, _prompt(self._ids_of(conversation, params), pictures, uuids)

    async def render_messages_async(self, messages: list[Any], params: Any) -> tuple[list[Any], Any]:
        """The same, with pictures fetched side by side."""
        conversation, pictures, uuids = await parse_chat_messages_async(messages, **self._how_to_parse(params))
        ids = await self._render_with_timeout(self._ids_of_async(conversation, params))
        return conversation, _prompt(ids, pictures, uuids)

    def _how_to_parse(self, params: Any) -> dict[str, Any]:
        """Contents stay lists of parts, and pictures keep their alpha, for the processor's background."""
        given = params.media_io_kwargs or {}
        return {
            "model_config": self.model_config,
            "content_format": "openai",
            "media_io_kwargs": {**given, "image": {"image_mode": None, **given.get("image", {})}},
            "mm_processor_kwargs": params.mm_processor_kwargs,
        }

    def _tokenize_prompt(self, prompt: Any, params: Any) -> Any:
        """A prompt that is no chat: with pictures, `<image>` marks their places."""
        if not prompt.get("multi_modal_data"):
            return super()._tokenize_prompt(prompt, params)
        processor = self.processor
        with self._one_at_a_time:
            (row,) = encode_rows(
                processor.tokenizer,
                [prompt["prompt"]],
                processor.image_token,
                processor.image_token_id,
                processor.num_image_tokens,
                add_special_tokens=params.add_special_tokens,
                with_spans=False,
            )
        ids, _ = row.joined()
        return self._build_tokens_prompt(ids, prompt)

    def _process_tokens(self, prompt: Any, **kwargs: Any) -> Any:
        self._refuse_empty_places(prompt)
        return super()._process_tokens(prompt, **kwargs)

    async def _process_tokens_async(self, prompt: Any, **kwargs: Any) -> Any:
        self._refuse_empty_places(prompt)
        return await super()._process_tokens_async(prompt, **kwargs)

    def _refuse_empty_places(self, prompt: Any) -> None:
        """Refuse ids with places for pictures, which only who sends ids can write, if there is no picture."""
        place = self.processor.image_token_id
        if not prompt.get("multi_modal_data") and place in prompt["prompt_token_ids"]:
            raise VLLMValidationError(
                f"The id {place} is a picture's and no word's; send chats with pictures, or ids of words only."
            )

    def validate_token_ids(self, token_ids: Any, *, parameter: str | None = None) -> None:
        """See that ids are words, or places of pictures."""
        place = self.processor.image_token_id
        super().validate_token_ids([token for token in token_ids if token != place], parameter=parameter)


def options_of(template: str, given: dict[str, Any]) -> dict[str, Any]:
    """What of `chat_template_kwargs` is for the template: what every template knows, and variables of its own."""
    own = {name for name in given if name not in NOT_OPTIONS and re.search(rf"\b{re.escape(name)}\b", template)}
    return {name: value for name, value in given.items() if value is not None and name in own | OPTIONS}


def _with_pictures(content: Any) -> Any:
    """The content of a message with a picture in every place of one."""
    if not isinstance(content, list):
        return content
    return [{"type": "image", "image": BLANK} if part.get("type") == "image" else part for part in content]


def _prompt(ids: list[int], pictures: Any, uuids: Any) -> Any:
    prompt = parse_dec_only_prompt(ids)
    prompt.update({"multi_modal_data": pictures} if pictures is not None else {})
    prompt.update({"multi_modal_uuids": uuids} if uuids is not None else {})
    return prompt
