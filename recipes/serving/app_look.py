"""The tab that shows what a model looks at: the prompt with its places, and attention over the picture."""

import gradio as gr

from recipes_minigpt4.serving.app_state import AppState


def add_look_tab(app: AppState, page: gr.Blocks) -> None:
    """Add the tab to the page that is being built."""
