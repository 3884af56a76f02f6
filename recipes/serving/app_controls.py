"""What several tabs show: a box to ask in, the controls of how replies are made, and how their events run."""

from typing import Any

import gradio as gr

from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.serving.uploads import ENDINGS
from recipes_minigpt4.utils.ranges import MAX_SEED


MOST_TOKENS = 2000  # that the slider offers
ANY_SEED = -1  # shown for None
PAUSE = 0.05  # seconds between two looks at a reply that grows
# Events for which models compute: four of all people's at once, and others wait in line.
QUEUED: dict[str, Any] = {"concurrency_id": "reply", "concurrency_limit": 4, "show_progress": "hidden"}
QUICK: dict[str, Any] = {"queue": False, "show_progress": "hidden"}


def add_question_box(placeholder: str, name: str, text: str | None = None, several: bool = True) -> Any:
    """
    Add a box for words and pictures to the tab that is being built.

    Args:
        placeholder: what stands in it while it is empty.
        name: its id on the page.
        text: what it holds at first.
        several: whether it takes several pictures.
    """
    return gr.MultimodalTextbox(
        None if text is None else {"text": text, "files": []},
        show_label=False,
        placeholder=placeholder,
        elem_id=name,
        file_count="multiple" if several else "single",
        file_types=list(ENDINGS),
        sources=["upload"],
        max_plain_text_length=100_000,
    )


def add_reply_controls(settings: ReplySettings) -> list[Any]:
    """
    Add them, closed, to the tab that is being built.

    Args:
        settings: what they show at first.

    Returns:
        The controls, as an event takes them for inputs; `settings_of` reads their values.
    """
    with gr.Accordion("How replies are made", open=False):
        return [
            gr.Slider(1, 10, settings.num_beams, step=1, label="Beams", info="With several, a reply comes at once."),
            gr.Slider(0, 2, settings.temperature, step=0.1, label="Temperature", info="0: the likeliest every time."),
            gr.Slider(0.05, 1, settings.top_p, step=0.05, label="Top-p", info="Share of likely tokens to draw from."),
            gr.Slider(1, 2, settings.repetition_penalty, step=0.05, label="Repetition penalty"),
            gr.Slider(-2, 2, settings.length_penalty, step=0.1, label="Length penalty", info="For beams."),
            gr.Slider(1, MOST_TOKENS, settings.max_new_tokens, step=1, label="Longest reply", info="In tokens."),
            gr.Number(
                ANY_SEED if settings.seed is None else settings.seed,
                precision=0,
                minimum=ANY_SEED,
                maximum=MAX_SEED,
                label="Seed",
                info=f"{ANY_SEED}: other draws every time.",
            ),
        ]


def settings_of(values: Any) -> ReplySettings:
    """What the values of the controls, in their order, say."""
    beams, temperature, top_p, repetition_penalty, length_penalty, max_new_tokens, seed = values
    return ReplySettings(
        temperature=float(temperature),
        top_p=float(top_p),
        num_beams=int(beams),
        repetition_penalty=float(repetition_penalty),
        length_penalty=float(length_penalty),
        max_new_tokens=int(max_new_tokens),
        seed=None if seed is None or seed == ANY_SEED else int(seed),
    )
