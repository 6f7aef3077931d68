# %% [markdown]
# # 1 · Sound to mel: what does the model hear?
#
# **60 minutes**, of which the computer needs less than one. This notebook explains
# `whisper_encoder.py` from `resample` to `clip_to_mel`. It needs no model.
#
# After this notebook you can
# 1. predict how many mel frames and how many positions a clip has;
# 2. compute Whisper's picture of a clip, the log-mel spectrogram, from its samples;
# 3. say what this picture leaves out.
#
# The notebook stops at the first exercise that is not done yet, with
# `NotImplementedError: your turn`. Write your answer in place of this line, run the cell,
# then run the check below it.

# %% tags=["setup"]
import math
import sys

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import BLUE, CORPUS, GREEN, MAGMA, ORANGE, play, reveal
from data import read_corpus
from whisper_encoder import (
    HOP,
    N_FFT,
    SAMPLE_RATE,
    clip_to_mel,
    load_audio,
    log_mel_spectrogram,
    mel_filters,
    n_states,
    resample,
)

torch.set_num_threads(1)  # for such small tensors, more threads are not faster

# %% [markdown]
# ## 1.1 A clip is a list of numbers
# A microphone measures the air pressure 16,000 times per second. These numbers are the
# clip.

# %%
row = read_corpus(CORPUS, "fr", "en")[0]["test"][7]
audio = load_audio(row.path)  # (N,)
print(row.sentence)
print(
    f"{len(audio):,} samples, {len(audio) / SAMPLE_RATE:.2f} s, the first five: {audio[:5]}"
)
play(audio)

# %% [markdown]
# Whisper makes one **mel frame** every 10 ms (`HOP` is 160 samples). Later, a convolution
# joins two frames to one **state** of the encoder. Each state takes one position of the
# LLM.
#
# **Predict, then run.** How many mel frames and how many states does this clip have?

# %% tags=["guess"]
n_frames_guess = 147  # ← your guess
n_states_guess = 74  # ← your guess

# %%
n_frames = clip_to_mel(audio, 80, "clip").shape[1]
reveal("mel frames", n_frames_guess, n_frames, "100 per second, padded to an even number")
reveal("states", n_states_guess, n_states(len(audio)), "50 per second, rounded up")

# %% [markdown]
# ## 1.2 Frames (12 minutes)
# One sample says nothing about a sound. So we look at 400 samples (`N_FFT`, 25 ms) at a
# time, every 160 samples. Frame `i` has its centre at sample `160 i`. Its first 200
# samples are before the centre. At the two ends of the clip some of these samples do not
# exist. There we use the mirror image of the clip: sample -1 is sample 1, sample -2 is
# sample 2, and so on.
#
# The slow way, which is also the specification:


# %%
def slow_frames(audio):
    frames = []
    for i in range(len(audio) // HOP):
        frame = []
        for j in range(N_FFT):
            index = HOP * i - N_FFT // 2 + j
            if index < 0:
                index = -index
            if index >= len(audio):
                index = 2 * (len(audio) - 1) - index
            frame.append(audio[index].item())
        frames.append(frame)
    return torch.tensor(frames)


# %% [markdown]
# **Exercise 1.** The same without loops. You need `F.pad(..., mode="reflect")` (it wants
# two or three dimensions: `audio[None]`), and `Tensor.unfold(dim, size, step)`. The loops
# above make `N // HOP` frames, but `unfold` makes one more: leave out the last one.


# %% tags=["exercise"]
def frames_of(audio):
    """(N,) -> (N // HOP, N_FFT)"""
    # BEGIN SOLUTION
    padded = F.pad(audio[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    return padded.unfold(0, N_FFT, HOP)[:-1]
    # END SOLUTION


# %% tags=["check"]
for n_samples in (1600, 1760, 2400):
    test_audio = torch.randn(n_samples, generator=torch.Generator().manual_seed(n_samples))
    expected, result = slow_frames(test_audio), frames_of(test_audio)
    n = len(expected)
    assert result.shape[1] == N_FFT, (
        f"a frame has {N_FFT} samples, yours have {result.shape[1]}"
    )
    assert len(result) <= n, (
        f"leave out the last frame: expected {n} frames, found {len(result)}"
    )
    assert len(result) == n, f"pad both ends by N_FFT // 2: {n} frames, found {len(result)}"
    middle = result[2, N_FFT // 2]
    assert middle == test_audio[2 * HOP], "the centre of frame i is not at sample HOP * i"
    assert result[0, 0] != 0, "before the clip there are zeros; use its mirror image"
    assert torch.equal(result, expected), (
        "the first and last frames are not as in the loops"
    )
print("ok: the same frames as with loops, for three lengths")


# %% tags=["wrong"] expects="use its mirror image"
def frames_of(audio):
    return F.pad(audio, (N_FFT // 2, N_FFT // 2)).unfold(0, N_FFT, HOP)[:-1]


# %% tags=["wrong"] expects="pad both ends"
def frames_of(audio):
    return audio.unfold(0, N_FFT, HOP)


# %% tags=["wrong"] expects="leave out the last frame"
def frames_of(audio):
    padded = F.pad(audio[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    return padded.unfold(0, N_FFT, HOP)


# %% tags=["wrong"] expects="a frame has 400 samples"
def frames_of(audio):
    padded = F.pad(audio[None], (N_FFT // 2, N_FFT // 2), mode="reflect")[0]
    return padded.unfold(0, HOP, N_FFT)[:-1]


# %% tags=["wrong"] expects="the centre of frame i"
def frames_of(audio):
    padded = F.pad(audio[None], (0, N_FFT), mode="reflect")[0]
    return padded.unfold(0, N_FFT, HOP)[:-1]


# %% [markdown]
# ## 1.3 Frequencies
# A Fourier transform splits a frame into waves: how strong is the wave of 40 Hz, of 80
# Hz, and so on? The *power* of a wave is the square of its strength. Before the
# transform, we fade the frame out at both ends (the Hann window). A frame that ends
# suddenly looks as if it had waves that are not there.

# %%
hann = torch.hann_window(N_FFT)
power = torch.fft.rfft(frames_of(audio) * hann).abs() ** 2  # (frames, bins)
loud = power.sum(dim=1).argmax().item()  # the loudest frame

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.6))
milliseconds = torch.arange(N_FFT) / SAMPLE_RATE * 1000
left.plot(milliseconds, frames_of(audio)[loud], color="0.7", label="frame")
left.plot(milliseconds, frames_of(audio)[loud] * hann, color=BLUE, label="faded out")
left.set(
    xlabel="time in the frame (ms)", ylabel="sample", title=f"frame {loud}, the loudest"
)
left.set_ylim(-0.5, 0.8)
left.legend(loc="upper right")
hertz = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1)
right.plot(hertz, 10 * power[loud].log10(), color=ORANGE)
right.set(xlabel="frequency (Hz)", ylabel="power (dB)", title="its waves")
plt.show()

# %% [markdown]
# The regular peaks on the right are the voice: its fundamental frequency and the
# multiples of it. The wide hills over several peaks are the vowel: the mouth makes some
# frequencies louder than others.
#
# **Exercise 2 (5 minutes).** Four questions about range and resolution. Two of the
# numbers are given above, two you compute. A wave needs at least two samples per period.
# A wave fits a frame if it has a whole number of periods in it.

# %% tags=["exercise"]
# highest frequency (Hz), width of a bin (Hz), length and distance of frames (ms)
# BEGIN SOLUTION
highest, bin_width, length, distance = 8000, 40, 25, 10
# END SOLUTION

# %% tags=["check"]
assert highest != SAMPLE_RATE, (
    "a wave of 16,000 Hz would have one sample per period; two are needed"
)
assert highest == SAMPLE_RATE / 2, (
    f"highest frequency: half of {SAMPLE_RATE}, not {highest}"
)
assert bin_width != HOP, (
    "bin width: HOP counts samples; one period per frame of 25 ms is how many Hz?"
)
assert bin_width == SAMPLE_RATE / N_FFT, (
    "bin width: the frequency with one period in a frame"
)
assert (length, distance) != (10, 25), (
    "frame length and distance are exchanged: frames overlap"
)
assert length == 1000 * N_FFT / SAMPLE_RATE, f"N_FFT / SAMPLE_RATE in ms is not {length}"
assert distance == 1000 * HOP / SAMPLE_RATE, f"HOP / SAMPLE_RATE in ms is not {distance}"
print(f"ok: 0 to {highest} Hz in steps of {bin_width} Hz, {length} ms every {distance} ms")

# %% tags=["wrong"] expects="two are needed"
highest, bin_width, length, distance = 16000, 40, 25, 10

# %% tags=["wrong"] expects="HOP counts samples"
highest, bin_width, length, distance = 8000, 160, 25, 10

# %% tags=["wrong"] expects="are exchanged"
highest, bin_width, length, distance = 8000, 40, 10, 25

# %% [markdown]
# ## 1.4 Mel bins (10 minutes)
# People hear the difference between 100 and 200 Hz much better than between 7,000 and
# 7,100 Hz. So the 201 bins are summed into 80 mel bins: narrow ones for low frequencies,
# wide ones for high frequencies. The weights of one mel bin are a triangle over the
# frequency (in Hz): 0 at `left`, largest at `middle`, 0 at `right`, and 0 outside. Its
# **area** is 1, so its height is `2 / (right - left)`.
#
# **Exercise 3.** Write the triangle. All three corners and `hertz` are in Hz.


# %% tags=["exercise"]
def triangle(left, middle, right, hertz):
    """Weights of one mel bin at the frequencies `hertz` (n,). -> (n,)"""
    # BEGIN SOLUTION
    rising = (hertz - left) / (middle - left)
    falling = (right - hertz) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)
    # END SOLUTION


# %% tags=["check"]
grid = torch.arange(0, 8001.0)  # every Hz
for corners in ((100, 200, 400), (1000, 1300, 1400), (5000, 5500, 6200)):
    weights, (a, b, c) = triangle(*corners, grid), corners
    assert weights.shape == grid.shape, "one weight for each frequency"
    assert weights.min() >= 0, "weights below 0: outside of the triangle they must be 0"
    assert weights.argmax() == b, (
        f"the largest weight must be at {b} Hz: are the slopes exchanged?"
    )
    outside = torch.cat([weights[: a + 1], weights[c:]])
    assert outside.max() == 0, f"weights outside of {a} to {c} Hz are not 0"
    assert abs(weights.max() - 1) > 1e-3, "the height is 1, but the area must be 1"
    assert abs(weights.sum() - 1) < 1e-3, (
        f"the area is {weights.sum():.3f}; it must be 1 (in Hz)"
    )
print("ok: three triangles with area 1")


# %% tags=["wrong"] expects="the height is 1"
def triangle(left, middle, right, hertz):
    rising, falling = (hertz - left) / (middle - left), (right - hertz) / (right - middle)
    return torch.minimum(rising, falling).clamp(min=0)


# %% tags=["wrong"] expects="weights below 0"
def triangle(left, middle, right, hertz):
    rising, falling = (hertz - left) / (middle - left), (right - hertz) / (right - middle)
    return torch.minimum(rising, falling) * 2 / (right - left)


# %% tags=["wrong"] expects="are the slopes exchanged"
def triangle(left, middle, right, hertz):
    rising, falling = (hertz - left) / (right - middle), (right - hertz) / (middle - left)
    return torch.minimum(rising, falling).clamp(min=0) * 2 / (right - left)


# %% tags=["wrong"] expects="the area is"
def triangle(left, middle, right, hertz):
    rising, falling = (hertz - left) / (middle - left), (right - hertz) / (right - middle)
    bins = (right - left) / 40  # the width in bins instead of Hz
    return torch.minimum(rising, falling).clamp(min=0) * 2 / bins


# %% [markdown]
# <details><summary>Hint</summary>
#
# Two straight lines: one rises from 0 at `left` to 1 at `middle`, the other falls from 1
# at `middle` to 0 at `right`. The triangle is the smaller of the two, but never below 0.
# </details>
#
# The corners of all triangles follow the mel scale: equal steps below 1 kHz, equal ratios
# above. The library's `mel_filters` does the same. Are the numbers the same, too?

# %%
step, ratio = (
    200 / 3,
    math.log(6.4) / 27,
)  # Hz per mel below 1 kHz; 27 mels from 1 to 6.4 kHz
mels = torch.linspace(
    0, 15 + math.log(8) / ratio, 82, dtype=torch.float64
)  # 8 kHz is the last
corners = torch.where(
    mels < 15, step * mels, 1000 * torch.exp(ratio * (mels - 15))
).tolist()
filters = torch.stack(
    [triangle(*corners[i : i + 3], hertz) for i in range(80)]
)  # (80, bins)
print(f"largest weight {filters.max():.4f}")
print(f"largest difference from mel_filters {(filters - mel_filters(80)).abs().max():.1e}")

# %% [markdown]
# ## 1.5 The logarithm (10 minutes)
# We also hear ratios of loudness, not differences. Whisper's scale, for the whole clip:
# 1. raise every value below `1e-10` to `1e-10` (the logarithm of 0 is minus infinity);
# 2. take the logarithm with base 10;
# 3. subtract 8 from the **maximum of the clip**: this is a limit. Raise every value below
#    it to the limit. (A factor of 10 in power is 10 dB, so the limit is 80 dB lower.)
# 4. add 4 and divide by 4.
#
# **Exercise 4.** Write it.


# %% tags=["exercise"]
def whisper_scale(mel):
    """Power in mel bins (80, frames) -> what the encoder reads (80, frames)"""
    # BEGIN SOLUTION
    log = mel.clamp(min=1e-10).log10()
    log = log.clamp(min=log.max() - 8)
    return (log + 4) / 4
    # END SOLUTION


# %% tags=["check"]
quiet = torch.tensor([[1e-12, 1e-11]])  # a clip of one bin and two frames
mixed = torch.tensor([[100.0, 1e-3], [1e-30, 1e-12]])  # two bins, two frames
scaled = whisper_scale(mixed)
assert scaled.isfinite().all(), "not all values are finite"
loudest = (
    f"power 100 must become (log10(100) + 4) / 4 = 1.5, but it became {scaled[0, 0]:.2f}"
)
assert abs(scaled[0, 0] - 1.5) < 1e-5, loudest
advice = "first raise values to 1e-10, then take the logarithm"
assert abs(whisper_scale(quiet) + 1.5).max() < 1e-5, advice
assert scaled[1, 0] > -1, "the limit is 8 below the maximum, in log10: 80 dB are not 80"
advice = "the limit comes from the maximum of the clip, not of a frame"
assert abs(scaled[1, 1] + 0.5) < 1e-5, advice
assert abs(scaled[1, 0] + 0.5) < 1e-5, f"1e-30 must become -0.5, not {scaled[1, 0]:.2f}"
print("ok")


# %% tags=["wrong"] expects="must become (log10(100) + 4) / 4"
def whisper_scale(mel):
    log = mel.clamp(min=1e-10).log()  # the natural logarithm
    return (log.clamp(min=log.max() - 8) + 4) / 4


# %% tags=["wrong"] expects="not of a frame"
def whisper_scale(mel):
    log = mel.clamp(min=1e-10).log10()
    return (torch.maximum(log, log.amax(dim=0) - 8) + 4) / 4


# %% tags=["wrong"] expects="80 dB are not 80"
def whisper_scale(mel):
    log = mel.clamp(min=1e-10).log10()
    return (log.clamp(min=log.max() - 80) + 4) / 4


# %% tags=["wrong"] expects="first raise values to 1e-10"
def whisper_scale(mel):
    log = mel.log10().clamp(min=1e-10)
    return (log.clamp(min=log.max() - 8) + 4) / 4


# %% [markdown]
# ## 1.6 All together
# Your functions in a row, and the library's own.


# %%
def my_log_mel(audio):
    power = torch.fft.rfft(frames_of(audio) * hann).abs() ** 2  # (frames, bins)
    return whisper_scale(filters.float() @ power.T)  # (80, frames)


padded = F.pad(audio, (0, -len(audio) % (2 * HOP)))  # to a whole number of states
mine, theirs = my_log_mel(padded), log_mel_spectrogram(padded, 80)
print("shapes", tuple(mine.shape), tuple(theirs.shape))
print(f"largest difference {(mine - theirs).abs().max():.1e}")

# %%
seconds = len(padded) / SAMPLE_RATE
fig, axes = plt.subplots(4, 1, figsize=(9, 7), height_ratios=[1, 1.5, 1, 1.5])
axes[0].plot(torch.arange(len(padded)) / SAMPLE_RATE, padded, lw=0.5, color=BLUE)
axes[0].set(ylabel="sample", xlim=(0, seconds), title=f"“{row.sentence}”")
all_power = torch.fft.rfft(frames_of(padded) * hann).abs() ** 2
decibels = 10 * all_power.T.clamp(min=1e-10).log10()
extent = (0, seconds, 0, 8)
look = {"origin": "lower", "aspect": "auto", "cmap": MAGMA}
shown = axes[1].imshow(decibels, extent=extent, vmin=decibels.max() - 60, **look)
axes[1].set(ylabel="frequency (kHz)", title="power of 201 Fourier bins")
fig.colorbar(shown, ax=axes[1], label="dB", pad=0.01)
for i in range(0, 80, 4):
    axes[2].plot(hertz / 1000, filters[i] / filters[i].max(), lw=0.8, color=GREEN)
axes[2].set(
    xlabel="frequency (kHz)",
    ylabel="weight",
    xlim=(0, 8),
    title="every fourth mel bin, scaled to 1",
)
shown = axes[3].imshow(mine, extent=(0, seconds, 0, 80), **look)
axes[3].set(xlabel="time (s)", ylabel="mel bin", title="log-mel: what the encoder reads")
fig.colorbar(shown, ax=axes[3], label="Whisper's scale", pad=0.01)
plt.show()

# %% [markdown]
# ## 1.7 What is left out?
# **Predict, then run.** Move the whole clip by 5 ms. By how many percent does the
# waveform change (length of the difference / length of the waveform)? And the log-mel?

# %% tags=["guess"]
waveform_change, mel_change = 5, 5  # ← your guess


# %%
def change_in_percent(a, b):
    return f"{100 * (a - b).norm() / a.norm():.0f} %"


later = padded.roll(SAMPLE_RATE * 5 // 1000)
reveal("waveform", waveform_change, change_in_percent(padded, later))
reveal("log-mel", mel_change, change_in_percent(theirs, log_mel_spectrogram(later, 80)))

# %% [markdown]
# The power of a wave does not say *when* its peaks come (its phase). So the log-mel
# changes much less than the waveform. The encoder does not have to learn that both clips
# are the same sentence.
#
# What else is lost? Listen. This cell makes a sound from the log-mel only: it undoes the
# logarithm and the mel bins, starts with random phases, and improves them until they fit
# together (the Griffin-Lim method). Everything that you still understand is in the
# picture.

# %%
power_again = torch.linalg.pinv(mel_filters(80)) @ 10 ** (4 * theirs - 4)  # (bins, frames)
strength = F.pad(power_again.clamp(min=0).sqrt(), (0, 1))
chance = torch.Generator().manual_seed(0)
phase = 2j * math.pi * torch.rand(strength.shape, generator=chance)
spectrum = strength * torch.exp(phase)
for _ in range(60):
    sound = torch.istft(spectrum, N_FFT, HOP, window=hann, length=len(padded))
    again = torch.stft(sound, N_FFT, HOP, window=hann, return_complex=True)
    spectrum = strength * again / again.abs().clamp(min=1e-8)
play(sound)

# %% [markdown]
# ## 1.8 Break it: samples at the wrong rate
# A file with 48,000 samples per second becomes 16,000 per second. Why not take every
# third sample? Here is a tone that rises from 0 to 20 kHz. A tone above 8 kHz has less
# than two samples per period at the new rate.

# %%
time = torch.arange(2 * 48_000) / 48_000
tone = torch.sin(2 * math.pi * 5_000 * time**2)  # frequency: 10,000 Hz per second
every_third, resampled = tone[::3], resample(tone, 48_000, 16_000)

fig, axes = plt.subplots(1, 2, figsize=(9, 2.6), sharey=True)
for ax, samples, title in zip(
    axes, (every_third, resampled), ("every third sample", "resample")
):
    tone_power = torch.fft.rfft(frames_of(samples) * hann).abs().T ** 2
    decibels = 10 * tone_power.clamp(min=1e-10).log10()
    ax.imshow(decibels, extent=(0, 2, 0, 8), vmin=decibels.max() - 60, **look)
    ax.set(xlabel="time (s)", title=title)
axes[0].set(ylabel="frequency (kHz)")
plt.show()

# %%
play(every_third)

# %%
play(resampled)

# %% [markdown]
# On the left the tone falls at 0.8 s and rises again at 1.6 s: it is *folded* (aliasing).
# The model would hear a tone that nobody made. `resample` first removes everything above
# the new limit.
#
# A second mistake: the samples are right, but the header of the file says 8,000 per
# second. Listen, and predict what happens to the number of states.

# %%
slow = resample(audio, 8_000, 16_000)  # what load_audio would do with this header
print("states with the right rate:", n_states(len(audio)))
print("states with the wrong rate:", n_states(len(slow)))
play(slow)

# %% [markdown]
# ## Recap
# * A clip is 16,000 numbers per second. The log-mel has 80 numbers every 10 ms: the power
#   in 80 frequency bins, as a logarithm. The encoder makes one state of two frames.
# * Left out: phases, everything above 8 kHz, and the fine structure of high frequencies.
#   Kept: what makes speech sounds different for people.
# * A wrong sample rate or a careless change of it gives no error. It gives another sound.
#
# **Read next:** `resample` and `log_mel_spectrogram` in `whisper_encoder.py`.
#
# **Open question:** the limit of 80 dB below the maximum is one number for the whole
# clip. What happens to the quiet part of a clip with a loud bang in it? Change `padded`
# and look.
