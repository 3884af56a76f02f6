"""The tab in which several models answer the same question side by side, and people vote."""

import gradio as gr

from recipes_minigpt4.serving.app_state import AppState


def add_compare_tab(app: AppState, page: gr.Blocks) -> None:
    """Add the tab to the page that is being built."""
