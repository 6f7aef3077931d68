"""Draw the system as tools/llast.svg, the picture of the README.

    python tools/draw.py

Plain SVG text, so it needs no package. Colours are of Okabe and Ito, which colour-blind people can
tell apart; trained parts also have a thick border. The card behind everything makes the picture
readable on white and on dark pages.
"""

import math
from html import escape
from pathlib import Path

WIDTH, HEIGHT = 830, 460  # the width of a README on GitHub, so that 15 px stay 15 px
INK, CARD, BLUE = "#1a1a1a", "#fbfbf8", "#0072b2"
LOOKS = {
    "frozen": f'fill="#d6e6f2" stroke="{BLUE}" stroke-width="1.2"',
    "trained": 'fill="#f7dca0" stroke="#c47f00" stroke-width="3"',
    "plain": 'fill="#ffffff" stroke="#777777" stroke-width="1.2"',
    "speech": f'fill="{BLUE}"',
}


def text(x, y, words, size=15, anchor="middle", style=""):
    """One line of text whose middle (or start) is at x."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {style}>'
        f"{escape(words)}</text>"
    )


def box(x, y, w, h, words=(), look="frozen"):
    """A box with lines of text in its middle; `look` is a key of LOOKS."""
    top = y + h / 2 + 5 - 10 * (len(words) - 1)
    lines = [text(x + w / 2, top + 20 * i, line) for i, line in enumerate(words)]
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" {LOOKS[look]}/>' + "".join(lines)


def arrow(*points):
    """A line through the points with a head at its end."""
    path = " ".join(f"{x},{y}" for x, y in points)
    return (
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.8" '
        'marker-end="url(#head)"/>'
    )


def shape(x, y, words):
    """The shape of the tensor on an arrow."""
    return text(x, y, words, 15, style=f'font-family="monospace" font-weight="bold" fill="{BLUE}"')


def waveform(x, y, w, h):
    """A made-up waveform of three syllables."""
    bars = []
    for i in range(0, w, 3):
        loud = abs(math.sin(3 * math.pi * i / w)) * (0.55 + 0.45 * math.sin(2.3 * i))
        half = max(1, h / 2 * abs(loud))
        bars.append(f"M{x + i},{y + h / 2 - half:.1f}v{2 * half:.1f}")
    return f'<path d="{"".join(bars)}" stroke="{BLUE}" stroke-width="2"/>'


def spectrogram(x, y, w, h, size=8):
    """A made-up log-mel spectrogram: three syllables, stronger at low frequencies."""
    cells = []
    for i in range(w // size):
        for j in range(h // size):
            loud = abs(math.sin(3 * math.pi * (i + 0.5) * size / w)) * (0.35 + 0.65 * j * size / h)
            loud *= 0.7 + 0.3 * math.sin(2.1 * j + 0.6 * i)
            at = f'x="{x + i * size}" y="{y + j * size}" width="{size}" height="{size}"'
            cells.append(f'<rect {at} fill="{BLUE}" fill-opacity="{loud:.2f}"/>')
    return "".join(cells)


def speech_path():
    """The upper row: clip -> log-mel -> encoder -> projector."""
    return [
        waveform(30, 50, 96, 56),
        text(78, 130, "clip, 16 kHz"),
        arrow((134, 78), (190, 78)),
        shape(160, 66, "(N,)"),
        spectrogram(198, 46, 96, 64),
        text(246, 130, "log-mel"),
        arrow((300, 78), (384, 78)),
        shape(341, 66, "(M, 2S)"),
        box(390, 36, 190, 52, ["Whisper encoder"]),
        box(390, 88, 190, 32, ["LoRA"], "trained"),
        arrow((584, 78), (666, 78)),
        shape(624, 66, "(S, Da)"),
        box(672, 48, 128, 60, ["projector", "3-layer MLP"], "trained"),
    ]


def prompt_row():
    """The middle row: the words of the prompt with the speech between them."""
    parts = [arrow((736, 112), (736, 156), (232, 156), (232, 200)), shape(484, 148, "(S, D)")]
    parts += [text(244, 192, "S positions of speech", 14, "start")]
    parts += [box(30, 206, 44, 36, ["<s>"], "plain"), box(78, 206, 70, 36, ["[INST]"], "plain")]
    parts += [box(154 + 26 * i, 206, 22, 36, look="speech") for i in range(6)]
    words = "Please translate the French sentence into English."
    parts += [box(314, 206, 404, 36, [words], "plain"), box(722, 206, 78, 36, ["[/INST]"], "plain")]
    parts += [f'<path d="M30,246v8H800v-8" fill="none" stroke="{INK}"/>']
    parts += [text(415, 272, "P positions, each a vector of width D", 14)]
    return parts


def language_model():
    """The lower row: Llama and beam search."""
    return [
        arrow((125, 254), (125, 318)),
        shape(165, 300, "(P, D)"),
        box(30, 324, 190, 52, ["Llama"]),
        box(30, 376, 190, 32, ["LoRA"], "trained"),
        arrow((224, 350), (332, 350)),
        shape(276, 338, "(W, V)"),
        box(338, 324, 150, 52, ["beam search"], "plain"),
        arrow((413, 378), (413, 394), (226, 394)),
        text(424, 399, "next token of each of W beams", 14, "start"),
        arrow((492, 350), (566, 350)),
        text(574, 355, "Where is the station?", 17, "start", 'font-weight="bold"'),
    ]


def legend():
    """What the two kinds of parameters look like."""
    return [
        box(30, 428, 26, 18),
        text(64, 442, "frozen", 14, "start"),
        box(146, 428, 26, 18, look="trained"),
        text(180, 442, "trained", 14, "start"),
    ]


def draw():
    """The whole picture as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="DejaVu Sans, Verdana, sans-serif" fill="{INK}">',
        '<defs><marker id="head" markerWidth="8" markerHeight="8" refX="6" refY="4" orient="auto">'
        f'<path d="M0,0L8,4L0,8z" fill="{INK}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="10" fill="{CARD}"/>',
    ]
    parts += speech_path() + prompt_row() + language_model() + legend()
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("llast.svg").write_text(draw(), encoding="utf-8")
