"""The tab that shows what a model looks at: the prompt with its places, and attention over the picture."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
import PIL.Image

from recipes_minigpt4.serving.app_controls import QUEUED, add_question_box
from recipes_minigpt4.serving.app_errors import told_to_people
from recipes_minigpt4.serving.app_state import AppState
from recipes_minigpt4.serving.attention import ROLLOUT, Look, Maps
from recipes_minigpt4.serving.look import STYLE, draw_map, draw_maps, look, prompt_html
from recipes_minigpt4.serving.uploads import SHOWN_SIDE, open_uploads


PROMPT = "Describe this picture."
WRITE = "Add a picture; the words are part of the prompt"
LAST = "last"
ABOUT = (
    "An image token of a model with a Q-Former is a query that has looked at the picture: the brighter a patch, the "
    "more of its attention, the mean over heads. Without a Q-Former, an image token is made of the patches that light "
    "up. The encoder has mixed its patches before, so a map is a hint at what a token knows, and no proof."
)
LEAST_SIDE = 448  # pixels of the longer side of a large map
CSS = """
#look-gallery .grid-container { grid-template-columns: repeat(auto-fill, minmax(5.5rem, 1fr)) !important; }
#look-gallery img { object-fit: contain; }
#look-map .icon-button-wrapper, #compare-picture .icon-button-wrapper { display: none; }
"""
KEPT = 6 * 3600  # seconds that maps are kept


@dataclass(frozen=True)
class Seen:
    """What one person looks at."""

    pictures: Sequence[PIL.Image.Image]
    looks: Sequence[Look]

    def maps(self, number: Any, layer: str) -> tuple[PIL.Image.Image, Maps]:
        """A picture, counted from 1, and the maps over it."""
        place = min(max(int(number or 1), 1), len(self.looks)) - 1
        chosen = None if layer == LAST else layer if layer == ROLLOUT else int(layer)
        one = self.looks[place]
        return self.pictures[place], one.maps(chosen if one.layers else None)


def add_look_tab(app: AppState, page: gr.Blocks) -> None:
    """Add the tab to the page that is being built."""
    labels = list(app.talkers)
    tab = LookTab(app)
    with gr.Tab("Look", id="look"):
        model = gr.Dropdown(labels, value=labels[0], label="Model", visible=len(labels) > 1, elem_id="look-model")
        box = add_question_box(WRITE, "look-box", PROMPT)
        tab.prompt = gr.HTML(elem_id="look-prompt", css_template=STYLE)
        with gr.Column(visible=False) as tab.shown:
            with gr.Row():
                with gr.Column(scale=1, min_width=280):
                    tab.number = gr.Slider(1, 2, 1, step=1, label="Picture", visible=False, elem_id="look-picture")
                    tab.layer = gr.Radio([LAST], value=LAST, label="Layer of the Q-Former", elem_id="look-layer")
                    tab.token = gr.Slider(
                        0, 1, 0, step=1, label="Image token", info="0: the mean of all.", elem_id="look-token"
                    )
                with gr.Column(scale=1, min_width=280):
                    tab.map = gr.Image(show_label=False, interactive=False, buttons=[], elem_id="look-map")
                    tab.told = gr.Markdown(elem_id="look-told")
            tab.gallery = gr.Gallery(
                show_label=False,
                columns=8,
                height="auto",
                allow_preview=False,
                interactive=False,
                buttons=[],
                object_fit="contain",
                elem_id="look-gallery",
            )
            gr.Markdown(ABOUT)
    tab.seen = gr.State(None, time_to_live=KEPT)
    every = [tab.seen, tab.prompt, tab.shown, tab.number, tab.layer, tab.token, tab.map, tab.told, tab.gallery]
    box.submit(tab.look, [box, model], every, api_name="look", **QUEUED)
    chosen = [tab.seen, tab.number, tab.layer, tab.token]
    for control in (tab.number, tab.layer):
        control.input(tab.draw, chosen, [tab.map, tab.told, tab.gallery], api_visibility="private", **QUEUED)
    tab.token.input(tab.draw_one, chosen, [tab.map, tab.told], api_name="look_at_token", **QUEUED)
    tab.gallery.select(tab.choose, None, tab.token, api_visibility="private", queue=False).then(
        tab.draw_one, chosen, [tab.map, tab.told], api_visibility="private", **QUEUED
    )


class LookTab:
    """
    What the tab does.

    Args:
        app: what the tabs share.
    """

    def __init__(self, app: AppState) -> None:
        self.app = app
        self.seen: Any = None
        self.prompt: Any = None
        self.shown: Any = None
        self.number: Any = None
        self.layer: Any = None
        self.token: Any = None
        self.map: Any = None
        self.told: Any = None
        self.gallery: Any = None

    def look(self, message: dict[str, Any], label: str) -> Any:
        """Show the prompt with its places, and the maps of the first picture."""
        text, uploads = (message or {}).get("text") or "", (message or {}).get("files") or []
        with told_to_people():
            pictures = open_uploads(uploads, self.app.uploads)
            prompt, looks = look(self.app.talkers[label], text, pictures)
            shown: dict[Any, Any] = {self.prompt: prompt_html(prompt), self.shown: gr.Column(visible=bool(looks))}
            if not looks:
                gr.Info(f"{label} is of a kind that has no maps here; MiniGPT-4 and BLIP-2 have.")
                return {**shown, self.seen: None}
            seen = Seen([_small(picture) for picture in pictures], looks)
            layers = looks[0].layers
            choices = [
                ("Last", LAST),
                *((str(layer + 1), str(layer)) for layer in layers),
                ("All, rolled out", ROLLOUT),
            ]
            large, told, gallery = self.draw(seen, 1, LAST, 0)
            return {
                **shown,
                self.seen: seen,
                self.number: gr.Slider(1, max(len(looks), 2), 1, visible=len(looks) > 1),
                self.layer: gr.Radio(choices, value=LAST, visible=bool(layers)),
                self.token: gr.Slider(0, len(gallery), 0),
                self.map: large,
                self.told: told,
                self.gallery: gallery,
            }

    def draw(self, seen: Seen | None, number: Any, layer: str, token: Any) -> Any:
        """All maps of a picture, and a large one."""
        with told_to_people():
            if seen is None:
                return None, "", []
            picture, maps = seen.maps(number, layer)
            return *draw_map(picture, maps, int(token or 0)), list(draw_maps(picture, maps))

    def draw_one(self, seen: Seen | None, number: Any, layer: str, token: Any) -> Any:
        """A large map."""
        with told_to_people():
            if seen is None:
                return None, ""
            return draw_map(*seen.maps(number, layer), int(token or 0))

    def choose(self, event: gr.SelectData) -> int:
        """The image token whose small map was clicked."""
        return int(event.index) + 1  # type: ignore[arg-type]


def _small(picture: PIL.Image.Image) -> PIL.Image.Image:
    """A picture as the page shows it below maps: not too large, and not too small for them."""
    factor = min(max(LEAST_SIDE / max(picture.size), 1), SHOWN_SIDE / max(picture.size))
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
