"""The tab in which one talks to a model about pictures."""

import gradio as gr

from recipes_minigpt4.serving.app_state import AppState


def add_chat_tab(app: AppState, page: gr.Blocks) -> None:
    """Add the tab to the page that is being built."""
    with gr.Tab("Chat"):
        gr.Chatbot()
