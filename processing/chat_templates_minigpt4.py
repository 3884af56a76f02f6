"""The chat templates of MiniGPT-4: by name, or built around the one a language model brings."""

import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from .processing_compat_minigpt4 import RENDERING


_FOLDER = Path(__file__).parent / "chat_templates"
_WRAPPED = "wrapped"
SEPARATOR = "###"
_WRAPPED_ALREADY = "minigpt4 = namespace"


def available_chat_templates() -> list[str]:
    """Names that `load_chat_template` knows; none where only the code that travels with a checkpoint is present."""
    return sorted(path.stem for path in _FOLDER.glob("*.jinja"))


def load_chat_template(name: str, tokenizer: Any = None) -> str:
    """
    Text of a chat template.

    Args:
        name: one of
            `"vicuna_v0"`: chats in the format of MiniGPT-4 with Vicuna v0; a system message replaces its system text;
            `"vicuna_v0_alignment"`: the same without system text, as in the second training stage, where a space
            stands before the `###` that ends the instruction;
            `"llama2"`: chats in the format of MiniGPT-4 with Llama-2-chat;
            `"wrapped"`: the tokenizer's own chat template, see `wrap_chat_template`.
        tokenizer: the tokenizer whose template is wrapped; needed for `"wrapped"` only.

    Raises:
        ValueError: if there is no template of that name, or nothing to wrap.
    """
    if name not in available_chat_templates():
        known = (
            ", ".join(available_chat_templates()) or "none, as the package `minigpt4-transformers` is not installed"
        )
        raise ValueError(f"There is no chat template named {name!r}; pass Jinja text, or one of these names: {known}.")
    if name == _WRAPPED:
        return wrap_chat_template(tokenizer)
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def wrap_chat_template(tokenizer: Any, template: str | None = None) -> str:
    """
    Chat template that renders what the tokenizer's own, or another, does, and knows about pictures and replies.

    A picture becomes `<image>` at the place in the message where the user put it. Each reply with its end-of-turn
    token is marked for `return_assistant_tokens_mask` (TRL's `assistant_only_loss`), unless the tokenizer's template
    changes replies so that their place cannot be told; a template that brings `{% generation %}` marks keeps them.

    Args:
        tokenizer: what knows the special tokens that end a turn.
        template: Jinja text for messages whose content is a string; the tokenizer's own if left out.

    Raises:
        ValueError: if there is no template to wrap, or only the code that travels with a checkpoint is present.
    """
    if template is None and getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "The tokenizer has no chat template that could be wrapped; choose another by name, such as 'vicuna_v0', "
            "or pass Jinja text."
        )
    inner = tokenizer.get_chat_template() if template is None else template
    if _WRAPPED_ALREADY in inner:
        return inner  # a saved processor gives its wrapped template to its tokenizer too
    if not _FOLDER.is_dir():
        raise ValueError(
            "This chat template takes contents that are strings, and only the package `minigpt4-transformers` can "
            "teach it about pictures; install it, or pass a template that takes lists of parts."
        )
    wrapper = (_FOLDER / f"{_WRAPPED}.jinja").read_text(encoding="utf-8")
    if "endgeneration" in inner:
        prelude = wrapper[: wrapper.index("{%- set minigpt4_text -%}")]
        return prelude.removesuffix("-%}\n") + "%}\n" + inner
    # Jinja drops one newline at the very end of a template, which is not the end any more once it is inlined.
    wrapper = wrapper.replace("{%- set minigpt4_text -%}\n", "{%- set minigpt4_text %}\n")
    wrapper = wrapper.replace("{%- set minigpt4_marked -%}\n", "{%- set minigpt4_marked %}\n")
    wrapper = wrapper.replace("%END_OF_TURN%", _jinja_string(_end_of_turn(tokenizer, inner)))
    return wrapper.replace("%INNER%", inner.removesuffix("\n"))


def _end_of_turn(tokenizer: Any, template: str) -> str:
    """The special token that the template puts behind a reply (`<|im_end|>`, `<end_of_turn>`, `</s>`), or `""`."""
    reply_end = "\ufdd3"  # survives templates that change words
    chat = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "reply" + reply_end}]
    chat += [{"role": "user", "content": "question"}]
    behind = _rendered(chat, template, tokenizer.special_tokens_map).partition(reply_end)[2].lstrip()
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return max((token for token in tokens if token.strip() and behind.startswith(token)), key=len, default="")


def separator_of(template: str, tokenizer: Any) -> str | None:
    """The text `###` if the template ends replies with it, as the Vicuna templates do; None for every other."""
    if SEPARATOR not in template:
        return None
    return SEPARATOR if _around_reply(template, tokenizer)[1].startswith(SEPARATOR) else None


def reply_opening_of(template: str, tokenizer: Any) -> str:
    """The text that the template puts between a question and its reply, such as `###Assistant:`; `""` if unknown."""
    return _around_reply(template, tokenizer)[0]


def _around_reply(template: str, tokenizer: Any) -> tuple[str, str]:
    """What stands between a question and its reply, and what stands behind the reply, without spaces around."""
    text = "minigpt4-text"
    chat = [{"role": role, "content": [{"type": "text", "text": text}]} for role in ("user", "assistant")]
    before, _, behind = _rendered(chat, template, tokenizer.special_tokens_map).rpartition(text)
    return before.rpartition(text)[2].strip(), behind.strip()


def knows_parts(template: str, tokenizer: Any) -> bool:
    """
    Whether a template is for contents that are lists of parts; one that is for strings only has to be wrapped.

    One that takes texts in both forms but has no place for a picture counts as one for strings.
    """
    tokens = tokenizer.special_tokens_map.items()
    return _knows_parts(template, tuple((name, token) for name, token in tokens if isinstance(token, str)))


@lru_cache(maxsize=64)
def _knows_parts(template: str, special_tokens: tuple[tuple[str, str], ...]) -> bool:
    text = "20190408"  # survives templates that change words

    def shown(content: Any) -> str:
        rendered = _rendered([{"role": "user", "content": content}], template, dict(special_tokens))
        return "" if re.search(r"""['"]type['"]""", rendered) else rendered  # a list printed as it is

    parts = shown([{"type": "image"}, {"type": "text", "text": text}])
    return ("<image>" in parts and text in parts) or text not in shown(text)


def _rendered(chat: list[dict[str, Any]], template: str, special_tokens: dict[str, Any]) -> str:
    """A chat as text, or `""` if the template raises: it may raise anything where it refuses a message."""
    try:
        with RENDERING:
            (rendered,), _ = render_jinja_template([chat], chat_template=template, **special_tokens)
    except Exception:
        return ""
    return str(rendered)


def _jinja_string(text: str) -> str:
    """`text` as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


__all__ = [
    "SEPARATOR",
    "available_chat_templates",
    "knows_parts",
    "load_chat_template",
    "reply_opening_of",
    "separator_of",
    "wrap_chat_template",
]
