"""The picture of the README."""

from pathlib import Path

from tools import draw


def test_the_picture_in_the_repository_is_what_draw_draws():
    picture = Path(draw.__file__).with_name("llast.svg")
    assert picture.read_text(encoding="utf-8") == draw.draw(), "run: python tools/draw.py"
