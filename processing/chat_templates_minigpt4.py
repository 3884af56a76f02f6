"""The chat templates of MiniGPT-4: by name, or built around the one a language model brings."""

from pathlib import Path
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template


_FOLDER = Path(__file__).parent / "chat_templates"
_WRAPPED = "wrapped"


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
        known = ", ".join(available_chat_templates()) or "none, as the package `minigpt4-transformers` is not installed"
        raise ValueError(f"There is no chat template named {name!r}; pass Jinja text, or one of these names: {known}.")
    if name == _WRAPPED:
        return wrap_chat_template(tokenizer)
    return (_FOLDER / f"{name}.jinja").read_text(encoding="utf-8")


def wrap_chat_template(tokenizer: Any) -> str:
    """
    Chat template that renders exactly what the tokenizer's own does, and knows about pictures and replies.

    A picture becomes `<image>` at the place in the message where the user put it. Each reply with its end-of-turn
    token is marked for `return_assistant_tokens_mask` (TRL's `assistant_only_loss`), unless the tokenizer's template
    changes replies so that their place cannot be told; a template that brings `{% generation %}` marks keeps them.

    Raises:
        ValueError: if the tokenizer has no chat template.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        raise ValueError(
            "The tokenizer has no chat template that could be wrapped; choose another by name, such as 'vicuna_v0', "
            "or pass Jinja text."
        )
    inner = tokenizer.get_chat_template()
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
    reply = "minigpt4-reply"
    chat = [{"role": "user", "content": "minigpt4-question"}, {"role": "assistant", "content": reply}]
    chat += [{"role": "user", "content": "minigpt4-question"}]
    (rendered,), _ = render_jinja_template([chat], chat_template=template, **tokenizer.special_tokens_map)
    behind = rendered.partition(reply)[2].lstrip()
    tokens = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
    return max((token for token in tokens if token.strip() and behind.startswith(token)), key=len, default="")


def _jinja_string(text: str) -> str:
    """`text` as a Jinja string literal."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


__all__ = ["available_chat_templates", "load_chat_template", "wrap_chat_template"]
