"""What a chat template writes around pictures, instructions and answers of training text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from processing_minigpt4 import load_chat_template
from processing_minigpt4.chat_templates_minigpt4 import SEPARATOR
from processing_minigpt4.conversations_minigpt4 import SEGMENT_MARK, without_marks
from processing_minigpt4.replies_minigpt4 import without_separator
from recipes_minigpt4.data.bad_samples import NO_ANSWER, BadSampleError
from recipes_minigpt4.utils.errors import RecipeError, one_line


ANSWER = "ANSWER"
NUMBERED = "answer-{}-of-this-chat-"  # stands for an answer while a chat is rendered


@dataclass(frozen=True)
class ChatFormat:
    """
    A chat template, and what it writes around an answer.

    Args:
        processor: the model's processor.
        template: Jinja text.
        system: messages in front of all chats that bring no system text.
        start: text that the template puts between prompt and answer, mostly none.
        end: text that ends an answer: a separator, the end-of-turn token, or EOS.
    """

    processor: Any
    template: str
    system: tuple[dict[str, Any], ...] = ()
    start: str = ""
    end: str = ""

    def render(self, chat: Sequence[dict[str, Any]], **options: Any) -> str:
        """A chat as the template writes it."""
        chat = chat if chat[0]["role"] == "system" else [*self.system, *chat]
        return str(self.processor.apply_chat_template(chat, chat_template=self.template, tokenize=False, **options))

    def prompt(self, instruction: str) -> str:
        """What stands in front of the answer to an instruction about one picture."""
        content = [{"type": "image"}, {"type": "text", "text": instruction}]
        return self.render([{"role": "user", "content": content}], add_generation_prompt=True)

    def pieces(self, chat: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
        """
        The texts before, between and behind the answers of a chat, and its answers.

        Raises:
            RecipeError: if the template does not write all answers, in their order.
        """
        answers: list[str] = []
        asked: list[dict[str, Any]] = []
        for message in chat:
            if message["role"] == "assistant":
                content = [{"type": "text", "text": NUMBERED.format(len(answers))}]
                answers.append(without_marks(message["content"][0]["text"]))
                message = {**message, "content": content}
            asked.append(message)
        try:
            rendered = self.render(asked, segment_mark=SEGMENT_MARK)
        except Exception as error:  # of Jinja, and what templates raise
            raise RecipeError(
                f"The chat template cannot write a chat of the data ({one_line(error)}); choose another with "
                "--instruction_template."
            ) from error
        texts = re.split("|".join(NUMBERED.format(number) for number in range(len(answers))), rendered)
        if len(texts) != len(answers) + 1:
            raise RecipeError(
                "The chat template leaves out or repeats answers of chats with several turns, so they cannot be "
                "trained; choose another with --instruction_template."
            )
        return texts, answers


@dataclass
class ChatText:
    """A chat as it is trained: text up to the first answer, the rest, and which characters of it are learned."""

    prompt: str
    completion: str = ""
    learned: tuple[tuple[int, int], ...] = ()


def chat_text(format: ChatFormat, chat: Sequence[dict[str, Any]], end: str, cut: Any, image_token: str) -> ChatText:
    """
    The text of a chat.

    Args:
        format: the chat template.
        chat: messages as `read_chat` gives them.
        end: text that ends an answer.
        cut: cuts an answer to its longest length, and marks what is a placeholder in it as text; tells whether
            something is gone. A chat ends with the first answer that is too long.
        image_token: what marks a picture.

    Raises:
        BadSampleError: if an answer is empty.
        RecipeError: if the template cannot be used for chats.
    """
    (before, *between), answers = format.pieces(chat)
    text = ChatText("")
    for number, (answer, behind) in enumerate(zip(answers, between, strict=True)):
        answer = ended_once(answer, format.end)
        if not answer.strip():
            raise BadSampleError(NO_ANSWER)
        before = before.removesuffix(SEGMENT_MARK)
        start = (
            format.start if before.endswith(format.start) else ""
        )  # which some templates write in the last turn only
        before = before.removesuffix(start)
        if number:
            text.completion += before + SEGMENT_MARK
        else:
            text.prompt = before
        is_last = number == len(answers) - 1
        ended, rest = _ended(behind, format.end, end)
        kept, is_cut = cut(start + answer + (end if is_last else ended))
        begin = len(text.completion)
        text.completion += kept
        text.learned += ((begin, len(text.completion)),)
        if is_cut:
            break
        before = rest
    return text


def ended_once(answer: str, end: str) -> str:
    """An answer of the data without the separator (`###`) at its end, where that is what ends answers anyway."""
    return without_separator(answer) if end.strip() == SEPARATOR else answer


def _ended(behind: str, own: str, end: str) -> tuple[str, str]:
    """What ends an answer, in place of the template's own end, and what comes behind it."""
    rest = behind if behind.startswith(own) else behind.lstrip()
    return (end, rest[len(own) :]) if own and rest.startswith(own) else ("", behind)


def chat_format(processor: Any, template: str | None = None) -> ChatFormat:
    """
    The format of a chat template.

    Args:
        processor: the model's processor.
        template: name or Jinja text of the template; None is the processor's own, except that a processor that chats
            in `vicuna_v0` trains in `vicuna_v0_alignment`, as the original does.

    Raises:
        RecipeError: if there is no such template, or if it writes another prompt once the answer is there.
    """
    own = processor.chat_template
    try:
        if template is None:
            template = "vicuna_v0_alignment" if own == load_chat_template("vicuna_v0") else own
        text = template if "{" in template else load_chat_template(template, processor.tokenizer)
    except ValueError as error:
        raise RecipeError(f"{one_line(error)}.") from error
    # The system text of `llama2` is for chats; the original trains without.
    system = ({"role": "system", "content": ""},) if text == load_chat_template("llama2") else ()
    made = ChatFormat(processor, text, system)
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "QUESTION"}]}
    prompt = made.render([question], add_generation_prompt=True)
    whole = made.render([question, {"role": "assistant", "content": [{"type": "text", "text": ANSWER}]}])
    start, found, end = whole.removeprefix(prompt).partition(ANSWER)
    if not whole.startswith(prompt) or not found:
        raise RecipeError(
            "The chat template writes another prompt once the answer is there, so it cannot be trained; choose one "
            "with --instruction_template."
        )
    eos = processor.tokenizer.eos_token or ""
    end = end.partition(eos)[0] + eos if eos and eos in end else end.strip() or eos
    return ChatFormat(processor, text, system, start, end)
