"""What pages are made of: pictures inside links, and curves."""

import base64
import io
import re

import pytest
from PIL import Image

from recipes_minigpt4.utils import html


def test_a_picture_comes_back_from_its_link():
    image = Image.effect_noise((9, 7), 60).convert("RGB")
    back = Image.open(io.BytesIO(base64.b64decode(html.data_uri(image).partition(",")[2])))
    assert back.tobytes() == image.tobytes()


@pytest.mark.parametrize("curve", [[(1, 2.0)], [(25, 6.5), (50, 1.25), (500, 0.001)], [(1, 0.0), (2, 0.0)]])
def test_curves_stay_inside_their_picture(curve):
    drawing = html.draw_curve(curve, "a <title>")
    assert "a &lt;title&gt;" in drawing
    (points,) = re.findall(r'points="([^"]+)"', drawing)
    points = [tuple(map(float, point.split(","))) for point in points.split()]
    assert len(points) == len(curve)
    assert all(0 <= x <= 440 and 0 <= y <= 220 for x, y in points)
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    losses = [loss for _, loss in curve]
    assert [y for _, y in points] == sorted((y for _, y in points), reverse=losses == sorted(losses))


def test_curves_side_by_side_have_one_scale_and_named_axes():
    drawing = html.draw_curves({"one": [(0, 4.0), (300, 1.0)], "two": [(0, 1.0), (150, 0.5)]})
    first, second = (
        [tuple(map(float, point.split(","))) for point in points.split()]
        for points in re.findall(r'points="([^"]+)"', drawing)
    )
    assert first[1][1] == second[0][1]  # a loss of 1 stands at the same height
    assert second[1][0] - second[0][0] == pytest.approx((first[1][0] - first[0][0]) / 2, abs=0.1)
    assert drawing.count(">loss per token<") == drawing.count(">step<") == 2
    ticks = re.findall(r'text-anchor="end">([^<]+)<', drawing)
    assert ticks == ["0", "1", "2", "3", "4"] * 2


def test_no_curve_no_drawing():
    assert "<svg" not in html.draw_curve([], "empty")


@pytest.mark.parametrize(
    ("extent", "step"), [(0, 1), (0.04, 0.01), (1, 0.2), (4, 1), (6.7, 2), (500, 100), (501, 200)]
)
def test_nice_steps(extent, step):
    assert html.nice_step(extent) == pytest.approx(step)


# ---- colours --------------------------------------------------------------------------------------------------------


def colours_of(theme: str) -> dict[str, str]:
    """Name of a colour → `#rrggbb`, of the light theme or of the dark one, which names what differs."""
    blocks = [dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in re.findall(r":root {([^}]+)}", html.STYLE)]
    assert len(blocks) == 2 and blocks[0].keys() == blocks[1].keys()
    return blocks[theme == "dark"]


def contrast(one: str, other: str) -> float:
    """Contrast ratio of WCAG 2, 1 to 21."""

    def luminance(colour: str) -> float:
        channels = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted(map(luminance, (one, other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_texts_can_be_read(theme):
    """WCAG AA: 4.5 for texts, 3 for curves and frames."""
    colours = colours_of(theme)
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for text in ("ink", "soft", "right", "wrong", "curve"):  # links have the curve's colour
        for ground in ("paper", "card"):
            assert contrast(colours[text], colours[ground]) >= 4.5, (text, ground)
    assert contrast(colours["warm"], colours["warm-card"]) >= 4.5
    for ground in ("paper", "warm-card"):
        assert contrast(colours["warm-line"], colours[ground]) >= 3


# ---- texts ----------------------------------------------------------------------------------------------------------


def test_what_is_right_is_green_and_what_is_wrong_is_struck():
    text = "a <b> & a red star"
    assert html.render_marked(text, [(2, 5, True), (8, 18, False)]) == (
        'a <span class="right">&lt;b&gt;</span> &amp; <s class="wrong">a red star</s>'
    )
    assert html.render_marked(text, []) == "a &lt;b&gt; &amp; a red star"


def test_cells_know_the_title_of_their_column():
    table = html.render_table(["", "a <b>"], [["one", "1 & 2"], ["  part", "3"]])
    assert '<td data-title="a &lt;b&gt;">1 &amp; 2</td>' in table
    assert '<tr class="part"><td data-title="">part</td>' in table
