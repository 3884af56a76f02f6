"""What a processor's tokenizer knows beside its vocabulary: the image placeholder, and where replies end."""

import itertools
from typing import Any

from .chat_templates_minigpt4 import SEPARATOR


class PlaceholderMixin:
    """
    Lets the tokenizer of a processor answer for the placeholder, which collators and harnesses look up there.

    Only look-ups of that one object know a word more: its vocabulary, what it makes of texts and what it saves stay as
    they are. Without special tokens, its texts end where the processor's do: before the template's separator.
    """

    # What the class that this is mixed into brings.
    tokenizer: Any
    image_token: str
    image_token_id: int
    decode: Any
    separator: Any

    def _teach_tokenizer(self) -> None:
        tokenizer = self.tokenizer
        if getattr(tokenizer, "image_token", None) is None:  # unless the language model has pictures of its own
            tokenizer.image_token, tokenizer.image_token_id = self.image_token, self.image_token_id
        tokenizer.convert_tokens_to_ids = self._convert_tokens_to_ids
        tokenizer.convert_ids_to_tokens = self._convert_ids_to_tokens
        tokenizer.decode = self._decode_with_pictures

    def _convert_tokens_to_ids(self, tokens: Any) -> Any:
        """That of the tokenizer, which gives `image_token` its id, unless the vocabulary has such a word."""
        tokenizer, own = self.tokenizer, type(self.tokenizer).convert_tokens_to_ids
        found = own(tokenizer, tokens)
        if tokens is None or self.image_token not in ([tokens] if isinstance(tokens, str) else tokens):
            return found
        missing = (None, None if tokenizer.unk_token is None else own(tokenizer, tokenizer.unk_token))
        if isinstance(tokens, str):
            return self.image_token_id if found in missing else found
        pairs = zip(tokens, found, strict=True)
        return [self.image_token_id if token == self.image_token and i in missing else i for token, i in pairs]

    def _convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """That of the tokenizer, with `image_token` for each placeholder."""
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        own = type(self.tokenizer).convert_ids_to_tokens
        if isinstance(ids, int):
            return self.image_token if ids == self.image_token_id else own(self.tokenizer, ids, skip_special_tokens)
        tokens: list[str] = []
        for is_image, run in itertools.groupby(ids, lambda token: token == self.image_token_id):
            if not is_image:
                tokens += own(self.tokenizer, list(run), skip_special_tokens)
            elif not skip_special_tokens:
                tokens += [self.image_token] * len(list(run))
        return tokens

    def _decode_with_pictures(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """`decode` of the tokenizer; placeholders, and a separator at the end, are as the processor has them."""
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        if isinstance(ids, (list, tuple)) and ids and isinstance(ids[0], (list, tuple)):
            return [self._decode_with_pictures(row, *args, **kwargs) for row in ids]
        if ids == self.image_token_id or (isinstance(ids, (list, tuple)) and self.image_token_id in ids):
            return self.decode(ids, *args, **kwargs)
        text = type(self.tokenizer).decode(self.tokenizer, token_ids, *args, **kwargs)
        skips = args[0] if args else kwargs.get("skip_special_tokens", False)
        return self._without_separator(text) if skips else text

    def _without_separator(self, text: str) -> str:
        """A text without the separator at its very end, where the chat template ends replies with one."""
        ends = text.rstrip().endswith(SEPARATOR) and self.separator is not None
        return text.rstrip().rstrip(SEPARATOR) if ends else text  # "####" begins with one, where a reply is over


__all__ = ["PlaceholderMixin"]
