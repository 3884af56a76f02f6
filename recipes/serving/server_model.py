"""The model as the server of transformers meets it: made for one request, and all that decides about its reply."""

import contextvars
import inspect
import secrets
import threading
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import GenerationConfig

from modeling_minigpt4.checks_minigpt4 import max_positions
from recipes_minigpt4.serving.server_requests import Exchange, RefusedError
from recipes_minigpt4.serving.talk import Stopped


COLD = 1e-5  # a temperature at which scores are no longer numbers that can be drawn from: the likeliest token it is
COUNTS = ("num_beams", "top_k")  # which JSON may write as 2.0
LEAST = 1024  # tokens that a reply may have if nobody says how many, as in transformers' own server
# The request that is being answered; the server of transformers hands nothing on.
EXCHANGE: contextvars.ContextVar[Exchange] = contextvars.ContextVar("exchange")


@dataclass(frozen=True)
class Loaded:
    """
    The one model of a server.

    Args:
        name: what clients call it.
        model: the model, in evaluation mode.
        processor: its processor.
    """

    name: str
    model: Any
    processor: Any
    # One reply at a time: torch draws from one source of random numbers in a process.
    busy: threading.Lock = field(default_factory=threading.Lock)

    @property
    def card(self) -> dict[str, Any]:
        """What `/v1/models` tells."""
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "minigpt4"}

    @property
    def positions(self) -> int | None:
        """Tokens that fit into the model's window, if it has one."""
        return max_positions(self.model.config.get_text_config(decoder=True))

    @property
    def separator(self) -> str | None:
        """The text that ends a reply, beside tokens that do."""
        return getattr(self.processor, "separator", None)

    def prepare(self, exchange: Exchange) -> None:
        """
        Make tensors of a request's chat, whose pictures are open.

        Raises:
            RefusedError: if it leaves no room for a reply.
            ValueError: if the chat template does not take it.
        """
        inputs = self.processor.apply_chat_template(
            exchange.messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        if "token_type_ids" not in inspect.signature(self.model.forward).parameters:
            inputs.pop("token_type_ids", None)  # which some tokenizers of transformers 4 tell everybody
        exchange.prompt_tokens = int(inputs["input_ids"].shape[-1])
        if self.positions is not None and exchange.prompt_tokens >= self.positions:
            raise RefusedError(
                f"The chat has {exchange.prompt_tokens:,} tokens, pictures included, but the model has "
                f"{self.positions:,} positions, a reply included; shorten it, or leave out earlier turns.",
                param="messages",
                code="context_length_exceeded",
            )
        exchange.inputs = inputs.to(self.model.device, self.model.dtype)

    def of_request(self) -> tuple[Any, Any]:
        """Model and processor for the request under way."""
        exchange = EXCHANGE.get()
        return RequestModel(self, exchange), RequestProcessor(self, exchange)


class RequestProcessor:
    """The processor, which has written the chat of the request already."""

    def __init__(self, loaded: Loaded, exchange: Exchange) -> None:
        self.loaded, self.exchange = loaded, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded.processor, name)

    def apply_chat_template(self, conversation: Any = None, **options: Any) -> Any:
        """Tensors of the chat of the request, whatever chat is given."""
        return self.exchange.inputs

    def decode(self, ids: Any, **options: Any) -> Any:
        """Text as it is: what ends a reply is seen to later."""
        return self.loaded.processor.tokenizer.decode(ids, **options)


class _Late:
    """A streamer that ends when it is told to, and not when `generate` does."""

    def __init__(self, streamer: Any) -> None:
        self.put = streamer.put

    def end(self) -> None:
        """Not yet."""


class RequestModel:
    """The model, whose `generate` does what the request says, one request at a time."""

    def __init__(self, loaded: Loaded, exchange: Exchange) -> None:
        self.loaded, self.exchange = loaded, exchange

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loaded.model, name)

    def generate(self, *, generation_config: GenerationConfig, streamer: Any = None, **given: Any) -> torch.Tensor:
        """
        Write the reply.

        Args:
            generation_config: a copy of the model's own, for this request.
            streamer: gets its tokens, and ends when the numbers of `exchange` are known.
            given: inputs; other things that servers pass are left out.
        """
        exchange, inputs = self.exchange, {key: value for key, value in given.items() if torch.is_tensor(value)}
        configure(generation_config, exchange, self.loaded.positions)
        beams = (generation_config.num_beams or 1) > 1
        try:
            with self.loaded.busy, torch.inference_mode():
                if exchange.gone.is_set():
                    raise RefusedError("The client has gone.", 499)
                seed = exchange.numbers.get("seed")
                torch.manual_seed(secrets.randbits(63) if seed is None else int(seed))
                ids: torch.Tensor = self.loaded.model.generate(
                    **inputs,
                    generation_config=generation_config,
                    tokenizer=self.loaded.processor.tokenizer,
                    streamer=None if streamer is None or beams else _Late(streamer),
                    stopping_criteria=[Stopped(exchange.gone)],
                )
            start = inputs["input_ids"].shape[-1]
            if streamer is not None and beams:
                streamer.put(inputs["input_ids"][0])
                streamer.put(ids[0, start:])
            self._count(ids[0, start:].tolist(), generation_config)
            return ids
        except Exception as error:
            exchange.error = error
            raise
        finally:
            if streamer is not None:
                streamer.end()

    def _count(self, reply: list[int], config: GenerationConfig) -> None:
        ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        self.exchange.text = self.loaded.processor.tokenizer.decode(reply, skip_special_tokens=True)
        self.exchange.new_tokens = len(reply)
        self.exchange.cut_short = len(reply) >= (config.max_new_tokens or 0) and not set(ends) & set(reply[-1:])


def configure(config: GenerationConfig, exchange: Exchange, positions: int | None) -> None:
    """
    Write what a request says into a generation configuration.

    Args:
        config: the model's own, copied.
        exchange: the request.
        positions: of the model's window; a reply never goes beyond.
    """
    most = exchange.max_tokens or max(config.max_new_tokens or 0, LEAST)
    config.max_new_tokens = most if positions is None else min(most, positions - exchange.prompt_tokens)
    config.max_length = None
    if exchange.stop:
        config.stop_strings = list(exchange.stop)
    numbers = {key: value for key, value in exchange.numbers.items() if key != "seed"}
    if (temperature := numbers.pop("temperature", None)) is not None:
        draws = config.do_sample = temperature > COLD
        config.temperature = temperature if draws else None
        config.top_k = int(numbers.pop("top_k", 0)) if draws else None
        if not draws:
            numbers = {key: value for key, value in numbers.items() if key not in ("top_k", "top_p")}
            config.top_p = None
    for key, value in numbers.items():
        setattr(config, key, int(value) if key in COUNTS else value)
