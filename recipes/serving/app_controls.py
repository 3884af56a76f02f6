"""The controls of how replies are made, which several tabs show."""

from typing import Any

import gradio as gr

from recipes_minigpt4.serving.settings import ReplySettings
from recipes_minigpt4.utils.ranges import MAX_SEED


MOST_TOKENS = 2000  # that the slider offers
ANY_SEED = -1  # shown for None


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
