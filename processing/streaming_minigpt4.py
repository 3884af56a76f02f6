"""Replies as they come, piece by piece, without what ends them."""

import re
from typing import Any

from transformers import TextIteratorStreamer


_BYTE = re.compile(r"<0x[0-9A-F]{2}>")


class ReplyStreamer(TextIteratorStreamer):
    """
    Iterate over the pieces of a reply while `generate` writes it in another thread.

    The pieces joined are the text of `post_process_image_text_to_text`: no special token, no separator (`###`), and no
    white space around it. What may change with the next token is held back: `#` and `##`, which may begin the
    separator, white space, which may be the last, and a character of several tokens. One reply at a time; once it is
    over, the streamer is ready for the next.

    Args:
        processor: that of the model. Processors and tokenizers of other models do as well; they have no separator.
        skip_prompt (`bool`, defaults to `True`): leave the prompt out; otherwise it comes first.
        timeout (`float`, *optional*): seconds to wait for a piece before `queue.Empty` is raised. Without, an error
            in `generate` leaves whoever reads waiting, unless `end()` is called.
        **decode_kwargs: options of the processor's `decode`; special tokens are skipped unless these say otherwise.

    ```python
    streamer = ReplyStreamer(processor)
    Thread(target=model.generate, kwargs={**inputs, "streamer": streamer}).start()
    for piece in streamer:
        print(piece, end="", flush=True)
    ```
    """

    def __init__(
        self, processor: Any, skip_prompt: bool = True, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:
        super().__init__(processor, skip_prompt, timeout, **{"skip_special_tokens": True, **decode_kwargs})
        tokenizer = getattr(processor, "tokenizer", processor)
        own = getattr(tokenizer, "clean_up_tokenization_spaces", False)
        self.cleans_up = bool(self.decode_kwargs.get("clean_up_tokenization_spaces", own))
        self.words = tokenizer
        self.silent = frozenset(tokenizer.all_special_ids if self.decode_kwargs["skip_special_tokens"] else ())
        self._start_anew()

    def _start_anew(self) -> None:
        self.token_cache: list[int] = []
        self.next_tokens_are_prompt = True
        self.shown = ""
        self.prompt_length = 0  # characters of a prompt that is shown
        # Asked for each reply, as a processor may get another chat template.
        self.separator: str | None = getattr(self.tokenizer, "separator", None)
        self.unsure = re.compile(rf"[\s\ufffd{re.escape((self.separator or '')[:1])}]*\Z")

    def put(self, value: Any) -> None:
        """
        Take the prompt of shape (1, length) or (length,), and then new ids of any number.

        Raises:
            ValueError: if there are several rows.
        """
        if value.ndim > 1 and value.shape[0] > 1:
            raise ValueError(
                f"A ReplyStreamer shows one reply, and there are {value.shape[0]} rows; generate them one by one, or "
                "leave `streamer` out."
            )
        is_prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if is_prompt and self.skip_prompt:
            return
        self.token_cache.extend(value.flatten().tolist())
        if is_prompt:
            self.prompt_length = len(self.tokenizer.decode(self.token_cache, **self.decode_kwargs))
        piece = self._rest(self._settled())
        if piece:
            self.on_finalized_text(piece)

    def end(self) -> None:
        """Show what was held back, but for a separator and white space, and let the iteration end."""
        text = self._text(self.token_cache)
        stripped = text.rstrip()
        piece = self._rest(text if len(stripped) < self.prompt_length else stripped)
        self._start_anew()
        self.on_finalized_text(piece, stream_end=True)

    def _rest(self, text: str) -> str:
        """What of a text is not shown yet."""
        piece = text[len(self.shown) :]
        self.shown += piece
        return piece

    def _text(self, ids: list[int]) -> str:
        """The text of ids up to the separator of the reply, with white space at its end."""
        text = self.tokenizer.decode(ids, **self.decode_kwargs) if ids else ""
        prompt, reply = text[: self.prompt_length], text[self.prompt_length :]
        reply = reply.partition(self.separator)[0] if self.separator else reply
        return prompt + reply if prompt else reply.lstrip()

    def _is_open(self, token: int) -> bool:
        """Whether a token is a byte of SentencePiece, whose runs become U+FFFD if one does not fit, or no text."""
        return token in self.silent or bool(_BYTE.fullmatch(str(self.words.convert_ids_to_tokens(token))))

    def _settled(self) -> str:
        """The text so far that no further token can change."""
        end = len(self.token_cache)
        while end and self._is_open(self.token_cache[end - 1]):
            end -= 1
        text = self.unsure.sub("", self._text(self.token_cache[:end]))
        if self.cleans_up:  # which takes spaces away around the last two words
            text = text.rsplit(maxsplit=2)[0] if len(text.split()) > 2 else ""
        return text if text.startswith(self.shown) else self.shown


__all__ = ["ReplyStreamer"]
