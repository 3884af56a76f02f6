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


def test_no_curve_no_drawing():
    assert "<svg" not in html.draw_curve([], "empty")


@pytest.mark.parametrize(
    ("extent", "step"), [(0, 1), (0.04, 0.01), (1, 0.2), (4, 1), (6.7, 2), (500, 100), (501, 200)]
)
def test_nice_steps(extent, step):
    assert html.nice_step(extent) == pytest.approx(step)
