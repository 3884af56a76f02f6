"""Where replies end in chat templates that close them with a separator: in text, in a history, for servers."""

import re
from collections.abc import Callable, Sequence
from typing import Any

from .chat_templates_minigpt4 import SEPARATOR


_AT_THE_END = re.compile(rf"\s*{SEPARATOR}[\s{SEPARATOR[0]}]*\Z")
_RUN = re.compile(rf"{SEPARATOR}{SEPARATOR[0]}*")  # "####" begins with one, where a reply is over

# Whatever stands in front of a reply is no part of it, so servers and pipelines forget all of the prompt.
_WHOLE_PROMPT = ".*"


def cut_reply(text: str, separator: str) -> str:
    """A reply without prompt up to its separator, and without white space around it."""
    return text.partition(separator)[0].strip()


def cut_behind_prompt(text: str, opening: str, separator: str) -> str | None:
    """
    Prompt and last reply, cut where the separator begins in the reply; None if the text has no `opening`.

    White space between prompt and reply stays, so that the prompt alone is the beginning of the two.
    """
    prompt, found, reply = text.rpartition(opening) if opening else ("", "", text)
    if not found:
        return None
    reply = reply.partition(separator)[0]
    return prompt + opening + (reply.rstrip() or reply)


def cut_at_last_token(text: str, before: int) -> str:
    """
    A text up to a separator at its end, or in what its last token says; all of it if there is none.

    Args:
        text: of all ids, which may hold separators that end earlier turns.
        before: how many characters of it all ids but the last say.
    """
    for run in _RUN.finditer(text):
        if run.end() > min(before, len(text.rstrip()) - 1):
            return text[: run.start()]
    return text


def without_separator(text: str) -> str:
    """A reply without a separator at its very end and the white space around that; others stay as they are."""
    return _AT_THE_END.sub("", text)


def close_replies_once(chats: Sequence[Sequence[dict[str, Any]]], find_separator: Callable[[], str | None]) -> None:
    """
    Take the separator from the end of replies of normalized chats, where the template writes one there.

    Args:
        chats: lists of messages, changed in place.
        find_separator: the template's separator or None; asked only if there is a reply that ends with one.
    """
    replies = [message["content"] for chat in chats for message in chat if message["role"] == "assistant"]
    last = [parts[-1] for parts in replies if parts and parts[-1]["type"] == "text"]
    ended = [part for part in last if part["text"].rstrip().endswith(SEPARATOR)]
    if ended and find_separator() == SEPARATOR:
        for part in ended:
            part["text"] = without_separator(part["text"])


def response_template(tokenizer: Any) -> dict[str, Any]:
    """
    What tells transformers 5's servers and pipelines where a reply ends that a separator may close.

    They read it on the tokenizer. What follows the separator, or EOS, is dropped.
    """
    ends = [SEPARATOR, *filter(None, [tokenizer.eos_token])]
    close = rf"\s*(?:{'|'.join(map(re.escape, ends))})"
    return {
        "defaults": {"role": "assistant", "content": ""},
        "start_anchor_pattern": _WHOLE_PROMPT,
        "fields": {"content": {"open_pattern": r"\A\s*", "close_pattern": close}},
    }


def is_response_template(found: Any) -> bool:
    """Whether a tokenizer's `response_template` is one of these, which go with chat templates of a separator."""
    return isinstance(found, dict) and found.get("start_anchor_pattern") == _WHOLE_PROMPT


__all__ = [
    "close_replies_once",
    "cut_at_last_token",
    "cut_behind_prompt",
    "cut_reply",
    "is_response_template",
    "response_template",
    "without_separator",
]
