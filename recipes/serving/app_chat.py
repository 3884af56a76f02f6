"""The tab in which one talks to a model about pictures."""

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import gradio as gr

from recipes_minigpt4.serving.app_controls import (
    PAUSE,
    QUEUED,
    QUICK,
    add_question_box,
    add_reply_controls,
    settings_of,
)
from recipes_minigpt4.serving.app_errors import told_to_people
from recipes_minigpt4.serving.app_state import AppState
from recipes_minigpt4.serving.options import PROMPT
from recipes_minigpt4.serving.page_chat import PageChat, Question
from recipes_minigpt4.serving.uploads import open_uploads, save_shown


WELCOME = "Add a picture, ask about it, and see the reply grow."
WRITE = "Add pictures, and ask about them"
JOINER = "\u2060"  # has no width, and no line breaks there
MARKUP = re.compile(r"(<(?=[a-zA-Z/!?])|&(?=[a-zA-Z#]))")


def add_chat_tab(app: AppState, page: gr.Blocks) -> None:
    """Add the tab to the page that is being built."""
    labels = list(app.talkers)
    with gr.Tab("Chat", id="chat"), gr.Row():
        with gr.Column(scale=3, min_width=300):
            log = gr.Chatbot(
                show_label=False,
                elem_id="chat-log",
                height="calc(100vh - 290px)",
                min_height=320,
                render_markdown=False,  # what models and people say is text; see `as_text`
                latex_delimiters=[],
                buttons=["copy"],
                editable="user",
                group_consecutive_messages=False,  # Gradio (6.31) cannot edit words behind a picture
                feedback_options=None,
                placeholder=WELCOME,
                examples=_examples(app),
            )
            box = add_question_box(WRITE, "chat-box")
        with gr.Column(scale=1, min_width=260):
            model = gr.Dropdown(
                labels,
                value=labels[0],
                label="Model",
                info="Another model begins a new chat.",
                visible=len(labels) > 1,
                elem_id="chat-model",
            )
            again = gr.Button("Restart", elem_id="chat-restart")
            controls = add_reply_controls(app.settings)
    log.keep_in_cache.update(map(str, app.examples))
    tab = ChatTab(app)
    box.submit(tab.ask, [box, model, *controls], [box, log], api_name="ask", **QUEUED)
    log.retry(tab.retry, controls, [box, log], api_name="retry", **QUEUED)
    log.edit(tab.edit, controls, [box, log], api_visibility="private", **QUEUED)
    log.undo(tab.undo, None, [box, log], api_name="undo", **QUICK)
    log.example_select(tab.example, None, box, api_visibility="private", **QUICK)
    box.stop(tab.stop, None, None, api_name="stop", **QUICK)
    hidden = {"api_visibility": "private"}
    for trigger, named in ((again.click, {"api_name": "restart"}), (log.clear, hidden), (model.change, hidden)):
        begun = trigger(tab.restart, None, [box, log], **named, **QUICK)
        begun.then(tab.now, None, log, **hidden, **QUICK)  # last words of a reply that was under way may come later
    page.unload(tab.leave)


def _examples(app: AppState) -> list[Any]:
    return [{"text": PROMPT, "display_text": path.stem, "files": [str(path)]} for path in app.examples]


class ChatTab:
    """
    What the tab does.

    Args:
        app: what the tabs share.
    """

    def __init__(self, app: AppState) -> None:
        self.app = app

    # Gradio gives the names of arguments to those who call the page as an API.
    def ask(
        self,
        request: gr.Request,
        message: dict[str, Any],
        model: str,
        num_beams: float,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        length_penalty: float,
        max_new_tokens: float,
        seed: float,
    ) -> Iterator[Any]:
        """Ask a question; the text box is emptied, and gets it back if something goes wrong."""
        values = (num_beams, temperature, top_p, repetition_penalty, length_penalty, max_new_tokens, seed)
        chat = self._chat(request)
        text, uploads = (message or {}).get("text") or "", (message or {}).get("files") or []
        with told_to_people(), chat.turn():
            pictures = open_uploads(uploads, self.app.uploads)
            shown = tuple(save_shown(picture, self.app.uploads) for picture in pictures)
            question = Question(text, tuple(uploads), shown)
            growing = chat.ask(self.app.talkers[model], question, pictures, settings_of(values))
            yield from self._show(chat, growing, {"text": text, "files": uploads})

    def retry(
        self,
        request: gr.Request,
        num_beams: float,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        length_penalty: float,
        max_new_tokens: float,
        seed: float,
    ) -> Iterator[Any]:
        """Ask the last question once more."""
        values = (num_beams, temperature, top_p, repetition_penalty, length_penalty, max_new_tokens, seed)
        chat = self._chat(request)
        with told_to_people(), chat.turn():
            yield from self._show(chat, chat.retry(settings_of(values)), None)

    def edit(self, request: gr.Request, event: gr.EditData, *values: Any) -> Iterator[Any]:
        """Ask an earlier question in other words; what came after it is gone."""
        chat = self._chat(request)
        with told_to_people(), chat.turn():
            old = chat.undo(_turns_from(chat, int(event.index)))  # type: ignore[arg-type]
            pictures = open_uploads(old.uploads, self.app.uploads)
            question = Question(str(event.value).replace(JOINER, ""), old.uploads, old.shown)
            growing = chat.ask(chat.talk.talker, question, pictures, settings_of(values))  # type: ignore[union-attr]
            yield from self._show(chat, growing, {"text": question.text, "files": list(old.uploads)})

    def undo(self, request: gr.Request) -> tuple[Any, Any]:
        """Take back the last question, which stands in the text box again."""
        chat = self._chat(request)
        with told_to_people(), chat.turn():
            question = chat.undo()
            return {"text": question.text, "files": list(question.uploads)}, _messages(chat.exchanges())

    def restart(self, request: gr.Request) -> tuple[Any, Any]:
        """Begin anew."""
        chat = self._chat(request)
        chat.stop()
        with told_to_people(), chat.turn():
            chat.forget()
            return _box(), []

    def now(self, request: gr.Request) -> list[dict[str, Any]]:
        """The chat as it is."""
        return _messages(self._chat(request).exchanges())

    def stop(self, request: gr.Request) -> None:
        """End the reply that is under way."""
        self._chat(request).stop()

    def example(self, event: gr.SelectData) -> dict[str, Any]:
        """Put an example into the text box."""
        path = self.app.examples[int(event.index)]  # type: ignore[arg-type]
        return {"text": PROMPT, "files": [str(path)]}

    def leave(self, request: gr.Request) -> None:
        """Forget somebody who has closed the page."""
        self.app.chats.close(str(request.session_hash))

    def _chat(self, request: gr.Request) -> PageChat:
        return self.app.chats.of(str(request.session_hash))

    def _show(self, chat: PageChat, growing: Any, message: Any) -> Iterator[Any]:
        """What the text box and the chat show while a reply grows; afterwards, or if it fails, what they show then."""
        shown, last = None, 0.0
        try:
            with contextlib.closing(growing):
                for exchanges in growing:
                    if shown is None:
                        yield _box(replying=True), _messages(exchanges)
                    elif time.monotonic() - last > PAUSE:
                        yield gr.skip(), _messages(exchanges)
                    else:
                        continue
                    shown, last = exchanges, time.monotonic()
        except Exception:
            yield _box(message), _messages(chat.exchanges())
            raise
        yield _box(), _messages(chat.exchanges())


def _box(message: Any = None, replying: bool = False) -> Any:
    """The text box, with its button to send or to stop."""
    return gr.MultimodalTextbox(value=message, submit_btn=not replying, stop_btn=replying)


def _messages(exchanges: list[tuple[Question, str]]) -> list[dict[str, Any]]:
    """Questions and replies as Gradio shows them."""
    return [message for question, reply in exchanges for message in _exchange(question, reply)]


def _exchange(question: Question, reply: str) -> list[dict[str, Any]]:
    # A message for each picture, as Gradio (6.31) cannot edit words that share one with it.
    text = [as_text(question.text)] if question.text else []
    asked = [{"role": "user", "content": content} for content in (*({"path": path} for path in question.shown), *text)]
    return [*asked, {"role": "assistant", "content": as_text(reply)}]


def as_text(text: str) -> str:
    """
    A text that the page shows as it is: with a sign of no width in what would be a tag or an entity of HTML.

    Gradio takes a text for HTML even where it is not to take it for Markdown, so a model could have pictures fetched.
    """
    return MARKUP.sub(rf"\1{JOINER}", text)


def _turns_from(chat: PageChat, message: int) -> int:
    """How many turns there are from that of a message on, where messages are counted as `_messages` writes them."""
    lengths = [len(_exchange(question, reply)) for question, reply in chat.exchanges()]
    return sum(message < sum(lengths[: turn + 1]) for turn in range(len(lengths)))
