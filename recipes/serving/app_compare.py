"""The tab in which several models answer the same question side by side, and people vote."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import gradio as gr

from recipes_minigpt4.evaluation.suites.votes import ALL_BAD, BEST, TIE
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
from recipes_minigpt4.serving.compare import MOST_MODELS, Comparison, answers, new_comparison
from recipes_minigpt4.serving.uploads import open_uploads, save_shown
from recipes_minigpt4.serving.votes import BallotBox
from recipes_minigpt4.utils.errors import RecipeError


PROMPT = "Describe this picture."
WRITE = "Add a picture and ask about it; all models answer"
KEPT = 6 * 3600  # seconds that a comparison waits for a vote
LETTERS = "abcd"


@dataclass(eq=False)
class Asked:
    """What one person has asked last on this tab."""

    comparison: Comparison | None = None
    stop: threading.Event = field(default_factory=threading.Event)
    voted: bool = False


def add_compare_tab(app: AppState, page: gr.Blocks) -> BallotBox | None:
    """
    Add the tab to the page that is being built, if there are several models.

    Returns:
        Where votes go; whoever serves the page closes it at the end.
    """
    if len(app.talkers) < 2:
        return None
    tab = CompareTab(app)
    with gr.Tab("Compare", id="compare"):
        asked = gr.State(None, time_to_live=KEPT)
        with gr.Row():
            with gr.Column(scale=3, min_width=300):
                box = add_question_box(WRITE, "compare-box", PROMPT, several=False)
                tab.note = gr.Markdown(tab.welcome(), elem_id="compare-note")
                blind = gr.Checkbox(True, label="Hide the names until I have voted", elem_id="compare-blind")
                controls = add_reply_controls(app.settings)
            with gr.Column(scale=1, min_width=200):
                tab.picture = gr.Image(
                    show_label=False, interactive=False, buttons=[], visible=False, elem_id="compare-picture"
                )
        with gr.Row(elem_id="compare-replies"):
            for letter in LETTERS[: len(tab.labels)]:
                with gr.Column(min_width=180):
                    tab.replies.append(_reply(letter))
                    tab.bests.append(gr.Button("Best", interactive=False, elem_id=f"compare-best-{letter}"))
        with gr.Row():
            tab.others = [
                gr.Button("Tie", interactive=False, elem_id="compare-tie"),
                gr.Button("All bad", interactive=False, elem_id="compare-bad"),
            ]
    tab.box, tab.asked = box, asked
    _connect(tab, blind, controls)
    page.unload(tab.leave)
    return tab.votes


def _reply(letter: str) -> gr.Textbox:
    return gr.Textbox(
        label=letter.upper(),
        lines=9,
        max_lines=9,  # so that the buttons below stand in one row
        interactive=False,
        autoscroll=False,
        elem_id=f"compare-reply-{letter}",
    )


def _connect(tab: "CompareTab", blind: Any, controls: list[Any]) -> None:
    """Say what happens when somebody clicks."""
    shown = [tab.box, tab.asked, tab.note, tab.picture, *tab.replies, *tab.buttons]
    tab.box.submit(tab.ask, [tab.box, blind, *controls], shown, api_name="compare", **QUEUED)
    tab.box.stop(tab.stop, tab.asked, None, api_name="compare_stop", **QUICK)
    named = [*(f"vote_{letter}" for letter in LETTERS[: len(tab.bests)]), "vote_tie", "vote_bad"]
    for place, (button, name) in enumerate(zip(tab.buttons, named, strict=True)):
        after = [tab.note, *tab.replies, *tab.buttons]
        button.click(partial(tab.vote, place), tab.asked, after, api_name=name, **QUICK)


class CompareTab:
    """
    What the tab does.

    Args:
        app: what the tabs share.
    """

    def __init__(self, app: AppState) -> None:
        self.app = app
        self.labels = list(app.talkers)[:MOST_MODELS]
        self.votes = BallotBox(app.output_dir, {label: app.talkers[label] for label in self.labels})
        # By the name that Gradio gives to a tab of a browser, as long as somebody has it open.
        self.people: WeakValueDictionary[str, Asked] = WeakValueDictionary()
        self.box: Any = None
        self.asked: Any = None
        self.note: Any = None
        self.picture: Any = None
        self.replies: list[Any] = []
        self.bests: list[Any] = []
        self.others: list[Any] = []

    @property
    def buttons(self) -> list[Any]:
        """Those to vote with: one per place, then tie and all bad."""
        return [*self.bests, *self.others]

    def welcome(self) -> str:
        """What stands there before the first question."""
        left_out = list(self.app.talkers)[MOST_MODELS:]
        text = f"{len(self.labels)} models answer at once, with the same seed. Vote when all have ended."
        return f"{text} The page compares four; left out: {', '.join(left_out)}." if left_out else text

    # Gradio gives the names of arguments to those who call the page as an API.
    def ask(
        self,
        request: gr.Request,
        message: dict[str, Any],
        blind: bool,
        num_beams: float,
        temperature: float,
        top_p: float,
        repetition_penalty: float,
        length_penalty: float,
        max_new_tokens: float,
        seed: float,
    ) -> Iterator[Any]:
        """Ask all models; replies grow side by side."""
        values = (num_beams, temperature, top_p, repetition_penalty, length_penalty, max_new_tokens, seed)
        text, uploads = (message or {}).get("text") or "", (message or {}).get("files") or []
        with told_to_people():
            if len(uploads) != 1:
                raise RecipeError("Models are compared on one picture; add one.")
            (picture,) = open_uploads(uploads, self.app.uploads)
            name = Path(uploads[0]).name
            comparison = new_comparison(self.labels, name, picture, text, settings_of(values), bool(blind))
            asked = self.people[str(request.session_hash)] = Asked(comparison)
            shown = gr.Image(save_shown(picture, self.app.uploads), visible=True)
            yield {
                self.box: _box(replying=True),
                self.asked: asked,
                self.note: _note(comparison, "The models reply …"),
                self.picture: shown,
                **self._texts(asked),
                **dict.fromkeys(self.buttons, gr.Button(interactive=False)),
            }
            last = time.monotonic()
            with contextlib.closing(answers(comparison, self.app.talkers, picture, asked.stop)) as steps:
                for _ in steps:
                    if time.monotonic() - last > PAUSE:
                        yield self._texts(asked)
                        last = time.monotonic()
            ready = comparison.is_whole
            yield {
                self.box: _box(),
                self.note: _note(comparison, _end(comparison)),
                **self._texts(asked),
                **dict.fromkeys(self.buttons, gr.Button(interactive=ready)),
            }

    def stop(self, asked: Asked | None) -> None:
        """End all replies."""
        if asked is not None:
            asked.stop.set()

    def leave(self, request: gr.Request) -> None:
        """End the replies to somebody who has closed the page."""
        self.stop(self.people.pop(str(request.session_hash), None))

    def vote(self, place: int, asked: Asked | None) -> Any:
        """Count a vote: for the reply at a place, for a tie, or that all are bad. Names are told now."""
        with told_to_people():
            comparison = None if asked is None else asked.comparison
            if asked is None or comparison is None:
                raise RecipeError("There is nothing to vote on; ask the models first.")
            kinds = [*([BEST] * len(self.bests)), TIE, ALL_BAD]
            best = comparison.order[place] if kinds[place] == BEST else None
            counted = self.votes.add(comparison, kinds[place], best)
            asked.voted = True
            told = {BEST: f"{best} is the best", TIE: "a tie", ALL_BAD: "all are bad"}[kinds[place]]
            text = f"Counted: {told}." if counted else "You have voted on this already; the first vote counts."
            return {
                self.note: _note(comparison, text),
                **self._texts(asked),
                **dict.fromkeys(self.buttons, gr.Button(interactive=False)),
            }

    def _texts(self, asked: Asked) -> dict[Any, Any]:
        """The replies as far as they came, below the names that may be told."""
        comparison = asked.comparison
        assert comparison is not None
        said = [comparison.told[label] for label in comparison.order]
        texts = [one.text if one.error is None else f"{one.text}\n\nNo reply: {one.error}".strip() for one in said]
        titles = [comparison.title(place, asked.voted) for place in range(len(texts))]
        pairs = zip(self.replies, texts, titles, strict=True)
        return {reply: gr.Textbox(value=text, label=title) for reply, text, title in pairs}


def _note(comparison: Comparison, text: str) -> str:
    return f"{text} Seed {comparison.settings.seed}." if comparison.settings.draws else text


def _end(comparison: Comparison) -> str:
    if comparison.is_whole:
        return "Which reply is the best?"
    if any(one.error for one in comparison.told.values()):
        return "Not all models could reply, so there is nothing to vote on."
    return "Replies were stopped, so there is nothing to vote on; ask again."


def _box(replying: bool = False) -> Any:
    """The text box, with its button to send or to stop."""
    return gr.MultimodalTextbox(submit_btn=not replying, stop_btn=replying)
