"""What a processor's tokenizer knows beside its vocabulary: the image placeholder, and where replies end."""

import itertools
from collections.abc import Mapping
from typing import Any

from .chat_templates_minigpt4 import SEPARATOR
from .replies_minigpt4 import cut_at_last_token, is_response_template, response_template


class PlaceholderMixin:
    """
    Lets the tokenizer of a processor answer for the placeholder, which collators and harnesses look up there.

    Only look-ups of that one object know a word more: its vocabulary, what it makes of texts and what it saves stay as
    they are. Without special tokens, its texts end where the processor's do: before the template's separator. It also
    tells transformers 5 where replies end, in its `response_template`, which is saved.
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
        self._teach_end_of_replies()

    def _teach_end_of_replies(self) -> None:
        """Give the tokenizer a response template if replies end at the separator, and take it away if they do not."""
        try:
            separator = self.separator
        except ValueError:  # of a template that nobody can render, which is told to who tries
            separator = None
        if separator is not None:
            self.tokenizer.response_template = response_template(self.tokenizer)
        elif is_response_template(getattr(self.tokenizer, "response_template", None)):
            self.tokenizer.response_template = None

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "chat_template" and getattr(self, "tokenizer", None) is not None:
            self._teach_end_of_replies()

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
        return self._without_separator(text, ids, kwargs) if skips else text

    def _without_separator(self, text: str, ids: Any, options: Mapping[str, Any]) -> str:
        """The text of ids up to a separator that ends them, where the chat template ends replies with one."""
        if SEPARATOR not in text or self.separator is None:
            return text
        special = self.tokenizer.all_special_ids
        said = [token for token in ([ids] if isinstance(ids, int) else ids) if token not in special]
        pictures = [place for place, token in enumerate(said) if token == self.image_token_id]
        words = said[pictures[-1] + 1 :] if pictures else said
        own, options = type(self.tokenizer).decode, {**options, "skip_special_tokens": True}
        whole, before = (own(self.tokenizer, part, **options) for part in (words, words[:-1]))
        return cut_at_last_token(text, len(text) - len(whole) + len(before))


__all__ = ["PlaceholderMixin"]
