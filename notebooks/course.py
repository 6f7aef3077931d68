"""Functions that the notebooks share. They help to show results; no lesson is in this file."""

import base64
import io
import os
from contextlib import contextmanager
from pathlib import Path

import matplotlib.pyplot as plt
import soundfile
import torch
import torch.nn.functional as F
from IPython.display import HTML

from llast import LLaST
from whisper_encoder import SAMPLE_RATE

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "tiny"
CORPUS = TINY / "corpus"

# The colours of Okabe and Ito: also colour-blind people see the difference.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = (
    "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
)  # fmt: skip
GREY = "#777777"
# For spectrograms. With few colours, the figures in a notebook need much less space.
MAGMA = plt.get_cmap("magma", 24)
plt.rcParams.update({
    "figure.dpi": 80, "figure.constrained_layout.use": True, "image.interpolation": "nearest",
    "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "axes.prop_cycle": plt.cycler(color=[BLUE, ORANGE, GREEN, RED, PURPLE, SKY]),
})  # fmt: skip


def load_trained_model() -> LLaST:
    """Return the model in the folder of the environment variable LLAST_MODEL, or tiny/model.

    Its parameters need no gradients: with gradients, `.numpy()` would be an error.
    """
    model = LLaST.from_pretrained(os.environ.get("LLAST_MODEL", TINY / "model"))
    return model.requires_grad_(False)


def reveal(name: str, guess, value, reason: str = ""):
    """Print your guess next to the right value."""
    guess = "no guess" if guess is ... else f"your guess: {guess}"
    print(f"{name}: {value}   ({guess})" + (f"\n    {reason}" if reason else ""))


def play(audio: torch.Tensor, rate: int = SAMPLE_RATE) -> HTML:
    """Return a player for a waveform (N,). Put it in the last line of a cell."""
    file = io.BytesIO()
    loudest = audio.abs().max().clamp(min=1e-9)
    samples = (0.7 * audio / loudest).cpu().numpy()  # below 1, so that nothing is clipped
    soundfile.write(file, samples, rate, format="MP3", compression_level=0.75)
    data = base64.b64encode(file.getvalue()).decode()
    return HTML(f'<audio controls src="data:audio/mpeg;base64,{data}"></audio>')


def attention_and_weights(q, k, v, **options):
    """Return what PyTorch's attention returns, and its weights (B, H, queries, keys).

    PyTorch does not return the weights. But attention returns the weighted sum of the rows of v.
    If v is the identity matrix, this sum is the weights themselves.
    """
    B, H, S, _ = k.shape
    identity = torch.eye(S, dtype=v.dtype, device=v.device).expand(B, H, S, S)
    attention = F.scaled_dot_product_attention
    return attention(q, k, v, **options), attention(q, k, identity, **options)


@contextmanager
def watch_attention(attention=attention_and_weights):
    """Collect the attention weights of every layer that runs inside the `with` block.

        with watch_attention() as maps:
            model.speech_encoder(mel)
        maps[0]  # (B, H, queries, keys) of the first layer

    whisper_encoder.py and llama.py call F.scaled_dot_product_attention. This replaces it by
    `attention`, a function with the same arguments that returns (result, weights).
    """
    original, maps = F.scaled_dot_product_attention, []

    def watched(*tensors, **options):
        F.scaled_dot_product_attention = original  # `attention` itself may call it
        try:
            result, weights = attention(*tensors, **options)
        finally:
            F.scaled_dot_product_attention = watched
        maps.append(weights.detach())
        return result

    F.scaled_dot_product_attention = watched
    try:
        yield maps
    finally:
        F.scaled_dot_product_attention = original


def draw_tree(steps: list, text_of, title: str, first: int = 1, last: int = 5):
    """Draw the steps `first` to `last` of a beam search, one column for each step.

    A step is a list of extensions (parent beam, token, total log-probability, state), the best one
    first. The state is "continues", "ended" or "dropped". Only the two best dropped ones are drawn.
    """
    colours = {"continues": BLUE, "ended": RED, "dropped": GREY}
    last = min(last, len(steps))
    fig, ax = plt.subplots(figsize=(1.9 * (last - first + 1), 3.2))
    parent_rows, n_rows = [], 0
    for x, step in enumerate(steps[:last], start=1):
        dropped = [extension for extension in step if extension[3] == "dropped"]
        drawn = [extension for extension in step if extension not in dropped[2:]]
        for row, (parent, token, total, state) in enumerate(drawn):
            if x >= first:
                ax.text(x, row, f"{text_of(token)}  {total:.2f}", color=colours[state], va="center")
            if x > first:
                ax.plot(
                    [x - 0.36, x - 0.04], [parent_rows[parent], row], color=colours[state], lw=1
                )
        parent_rows = [row for row, extension in enumerate(drawn) if extension[3] == "continues"]
        n_rows = max(n_rows, len(drawn))
    steps_drawn = range(first, last + 1)
    ax.set(xlim=(first - 0.1, last + 0.75), ylim=(n_rows - 0.5, -0.5), yticks=[])
    ax.set(xticks=[x + 0.2 for x in steps_drawn], xticklabels=steps_drawn)
    ax.set(xlabel="step; the numbers are log-probabilities (nats)", ylabel="the best one is on top")
    ax.set_title(title, loc="left")
    for i, (state, colour) in enumerate(colours.items()):
        ax.text(last - 0.65 + 0.5 * i, -0.75, state, color=colour)
    plt.show()
