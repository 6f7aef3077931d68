"""whisper_encoder.py: reading sound files, the log-mel spectrogram, the encoder."""

import json
import math
import os
import re
import shutil
import subprocess
import threading
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import make_golden
import whisper_encoder
from make_golden import FRAMES, GOLDEN, SHORT
from toys import FAULTS, INTEGERS, WHISPER, fill, made_up, shard, tone, whisper_folder, write
from whisper_encoder import (
    KAISER_BETA,
    MAX_SAMPLES,
    ROLLOFF,
    SAMPLES_PER_STATE,
    ZEROS,
    AudioError,
    WhisperConfig,
    WhisperEncoder,
    audio_seconds,
    clip_to_mel,
    load_audio,
    log_mel_spectrogram,
    n_states,
    resample,
)

M = WHISPER["num_mel_bins"]


RATES = (8000, 22050, 44099, 44100, 48000)


def middle(audio: torch.Tensor) -> np.ndarray:
    """16 kHz samples without the 20 ms at either end, where the filter reads outside the clip."""
    return audio.double().numpy()[320:-320]


def assert_close(ours, theirs, atol):
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=0, atol=atol)


# ----------------------------------------------------------------------------------------- resample


@pytest.mark.parametrize("rate", RATES)
def test_resampling_keeps_level_and_phase_of_tones_below_the_cut_off(rate):
    for hertz in (100, 1000, 3500) if rate < 16000 else (100, 1000, 5000, 7000):
        result = resample(torch.tensor(tone(hertz, rate)).float(), rate, 16000)
        exact = torch.tensor(tone(hertz, 16000))
        np.testing.assert_allclose(middle(result[: len(exact)]), middle(exact), atol=1e-3)


@pytest.mark.parametrize("rate", [rate for rate in RATES if rate > 16000])
def test_tones_above_8_khz_are_removed_and_do_not_alias(rate):
    for hertz in (8100, 9000, 0.49 * rate):
        result = middle(resample(torch.tensor(tone(hertz, rate)).float(), rate, 16000))
        assert 20 * np.log10(np.abs(result).max()) < -60, f"{hertz} Hz"


def resample_slowly(audio, from_rate: int, to_rate: int):
    """One filter and one window for each sample. (N,) -> (ceil(N * to_rate / from_rate),)"""
    divisor = math.gcd(from_rate, to_rate)
    from_step, to_step = from_rate // divisor, to_rate // divisor
    cutoff = ROLLOFF * min(1, to_step / from_step)
    half = math.ceil(ZEROS / cutoff)
    phase = torch.arange(to_step, dtype=torch.float64)[:, None] / to_step
    t = cutoff * (torch.arange(-half, half + 1) - phase)  # (to_step, taps)
    width = (1 - (t / ZEROS) ** 2).clamp(min=0).sqrt()
    kaiser = torch.special.i0(KAISER_BETA * width) / torch.special.i0(torch.tensor(KAISER_BETA))
    table = (cutoff * torch.sinc(t) * kaiser).float()
    windows = torch.nn.functional.pad(audio, (half, half)).unfold(0, table.shape[1], 1)
    j = torch.arange(math.ceil(len(audio) * to_step / from_step)) * from_step
    return (windows[j // to_step] * table[j % to_step]).sum(dim=1)


@pytest.mark.parametrize("rate", (*RATES, 11025, 12000, 32000, 96000))
def test_resampling_equals_one_filter_for_each_output_sample(rate):
    audio = torch.rand(20_001, generator=torch.Generator().manual_seed(rate)) - 0.5
    assert_close(resample(audio, rate, 16000), resample_slowly(audio, rate, 16000), 2e-7)


def test_resampling_to_the_same_rate_changes_nothing():
    audio = torch.rand(100)
    assert torch.equal(resample(audio, 16000, 16000), audio)


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("n", [1, 2, 999, 48001])
def test_a_resampled_clip_has_the_same_duration_rounded_up(rate, n):
    assert len(resample(torch.zeros(n), rate, 16000)) == math.ceil(n * 16000 / rate)


def test_a_long_clip_is_resampled_without_a_seam():
    long = tone(440, 22050, seconds=2.5)
    result = middle(resample(torch.tensor(long).float(), 22050, 16000))
    np.testing.assert_allclose(result, middle(torch.tensor(tone(440, 16000, 2.5))), atol=1e-3)


# --------------------------------------------------------------------------------------- load_audio


@pytest.mark.parametrize(
    ("name", "rate", "channels", "tolerance"),
    [
        ("a.wav", 16000, 1, 1e-3),
        ("a.wav", 8000, 2, 1e-3),
        ("a.flac", 44100, 2, 1e-3),
        ("a.flac", 48000, 6, 1e-3),
        ("a.ogg", 22050, 1, 0.05),  # lossy
        ("a.ogg", 48000, 2, 0.05),
        ("a.mp3", 44100, 2, 0.05),
        ("a.mp3", 16000, 1, 0.05),
    ],
)
def test_any_format_rate_and_channel_count_becomes_16_khz_mono(
    tmp_path, name, rate, channels, tolerance
):
    levels = np.linspace(0.1, 0.6, channels)  # channels differ, so that their mean shows
    file = write(tmp_path / name, tone(440, rate, 0.5)[:, None] * levels, rate)
    audio = load_audio(file)
    assert audio.dtype == torch.float32 and audio.shape == (8000,)
    expected = tone(440, 16000, 0.5) * levels.mean()
    np.testing.assert_allclose(middle(audio), expected[320:-320], atol=tolerance)


@pytest.mark.parametrize("subtype", ("GSM610", "G721_32"))
def test_telephone_formats_without_seeking_are_read(tmp_path, subtype):
    sound = tone(440, 16000, 0.5) / 2  # at full scale the codec overflows
    file = write(tmp_path / "voicemail.wav", sound, subtype=subtype)
    assert not soundfile.SoundFile(file).seekable()
    result = middle(load_audio(file)[:8000])
    np.testing.assert_allclose(result, sound[320:-320], atol=0.1)


def test_an_unusable_clip_is_an_error_with_its_name_and_the_reason(tmp_path):
    noise = np.random.default_rng(0).normal(size=16000) * 0.1
    (tmp_path / "empty.wav").touch()
    (tmp_path / "bare.raw").write_bytes(bytes(999))
    (tmp_path / "text.mp3").write_text("Not a sound. " * 99)
    (tmp_path / "random.wav").write_bytes(np.random.default_rng(0).bytes(999))
    write(tmp_path / "silent.wav", [])
    write(tmp_path / "loud.wav", [0.1, -9000, 0.1], subtype="FLOAT")
    write(tmp_path / "nan.wav", [0.1, np.nan, 0.1], subtype="FLOAT")
    write(tmp_path / "infinite.wav", [0.1, np.inf, 0.1], subtype="FLOAT")
    write(tmp_path / "slow.wav", noise, 999)
    write(tmp_path / "fast.wav", noise, 400_001)
    write(tmp_path / "opposite.wav", np.stack([noise, -noise], axis=1))
    size_0 = bytearray(write(tmp_path / "size 0.wav", noise).read_bytes())
    at = size_0.index(b"data")
    size_0[at + 4 : at + 8] = bytes(4)
    (tmp_path / "size 0.wav").write_bytes(size_0)
    for name, reason in {
        "missing.wav": "no such file",
        "empty.wav": "the file is empty",
        "random.wav": "not a format that libsndfile can read",
        "bare.raw": "not a format",
        "loud.wav": "must be from -1 to 1, but the largest is 9000",
        "text.mp3": "not a format",
        "x" * 300 + ".wav": "no such file",
        "silent.wav": "the clip has no samples",
        "nan.wav": "the largest is nan",
        "infinite.wav": "the largest is inf",
        "slow.wav": "the sample rate is 999 Hz; it must be 1000 to 400000 Hz",
        "fast.wav": "the sample rate is 400001 Hz",
        "opposite.wav": "its channels cancel each other",
        "size 0.wav": "the clip has no samples, or its header says so",
    }.items():
        with pytest.raises(AudioError, match=f"{name}: .*({reason})"):
            load_audio(tmp_path / name)


@pytest.mark.parametrize("format", ("WAV", "WAVEX", "RF64", "AIFF", "AU", "W64", "CAF", "FLAC"))
def test_a_file_that_is_shorter_than_its_header_states_is_an_error(tmp_path, format):
    noise = np.random.default_rng(0).normal(size=(16000, 2)) * 0.1
    data = write(tmp_path / "whole", noise, format=format).read_bytes()
    assert audio_seconds(tmp_path / "whole") == 1.0 and len(load_audio(tmp_path / "whole")) == 16000
    (tmp_path / "cut").write_bytes(data[: len(data) * 3 // 4])
    with pytest.raises(AudioError, match="cut|damaged|not a format"):
        load_audio(tmp_path / "cut")


def test_a_wav_file_with_an_unknown_size_is_read(tmp_path):
    data = bytearray(write(tmp_path / "a.wav", tone(440, 16000)).read_bytes())
    at = data.index(b"data")
    data[4:8] = data[at + 4 : at + 8] = b"\xff" * 4  # as ffmpeg writes it into a pipe
    (tmp_path / "pipe.wav").write_bytes(data)
    assert torch.equal(load_audio(tmp_path / "pipe.wav"), load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("read", (load_audio, audio_seconds))
def test_files_are_read_in_a_thread_where_ctrl_c_cannot_be_lost(tmp_path, monkeypatch, read):
    threads, open_bytes = [], whisper_encoder.open_bytes

    def watched(data):
        threads.append(threading.current_thread())
        return open_bytes(data)

    monkeypatch.setattr(whisper_encoder, "open_bytes", watched)
    read(write(tmp_path / "a.wav", tone(440, 16000)))
    assert threads and threading.main_thread() not in threads


def test_file_names_need_not_be_utf8(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.wav"))
    shutil.copy(write(tmp_path / "a.wav", tone(440, 16000)), path)
    assert torch.equal(load_audio(path), load_audio(tmp_path / "a.wav"))


@pytest.mark.parametrize("existing, wanted", (("NFC", "NFD"), ("NFD", "NFC")))
def test_a_name_in_another_unicode_form_is_reported(tmp_path, existing, wanted):
    write(tmp_path / unicodedata.normalize(existing, "été.wav"), tone(440, 16000))
    with pytest.raises(
        AudioError, match="no such file; the same name in the other Unicode form exists"
    ):
        load_audio(tmp_path / unicodedata.normalize(wanted, "été.wav"))


# ---------------------------------------------------------------------------------------------- mp3


def without_xing_frame(mp3: bytes) -> bytes:
    """An mp3 that does not state its length, as programs write it that cannot seek."""
    return mp3[mp3.index(mp3[:2], 2) :]


@pytest.fixture(scope="module")
def mp3s(tmp_path_factory):
    """Bytes of an mp3 of 2 s and of the same file without its Xing frame."""
    folder = tmp_path_factory.mktemp("mp3")
    sound = np.random.default_rng(0).normal(size=32000) * 0.1
    how = dict(rate=16000, bitrate_mode="VARIABLE", compression_level=0.9)
    stated = write(folder / "a.mp3", sound, **how).read_bytes()
    return {"stated": stated, "not stated": without_xing_frame(stated)}


def test_an_mp3_that_does_not_state_its_length_is_read_to_its_end(tmp_path, mp3s):
    file = tmp_path / "a.mp3"
    file.write_bytes(mp3s["not stated"])
    estimate = soundfile.info(file).frames
    assert estimate < 32000, "libsndfile's estimate is right, so nothing is tested"
    audio, seconds = load_audio(file), audio_seconds(file)
    assert 2.0 <= seconds < 2.2 and len(audio) == math.ceil(seconds * 16000)
    file.write_bytes(mp3s["stated"])
    stated = load_audio(file)
    assert len(stated) == 32000 and audio_seconds(file) == 2.0
    delays = range(len(audio) - 32000)  # an mp3 without the frame keeps the encoder's delay
    assert any(torch.equal(audio[delay:][:32000], stated) for delay in delays)


TAG = b"ID3\3\0\0\0\x10\0\0"  # its size, 7 bits per byte, is 0x10 << 14
TAGS = {
    "picture": (TAG + b"APIC\0\3\xff\xf6\0\0" + b"\xff\xfb\x90\0" * (0x3FFF6 // 4) + bytes(2), b""),
    "old tag": (b"", b"TAG" + b"x" * 125),
    "other bytes": (b"\0" * 5000, b""),
    "APE": (b"", b"APETAGEX" + bytes(200)),
}


@pytest.mark.parametrize("tag", TAGS)
@pytest.mark.parametrize("kind", ("stated", "not stated"))
def test_tags_around_an_mp3_change_nothing(tmp_path, mp3s, kind, tag):
    before, after = TAGS[tag]
    (tmp_path / "a.mp3").write_bytes(mp3s[kind])
    (tmp_path / "b.mp3").write_bytes(before + mp3s[kind] + after)
    assert torch.equal(load_audio(tmp_path / "a.mp3"), load_audio(tmp_path / "b.mp3"))


@pytest.mark.parametrize("second", ("stated", "not stated"))
@pytest.mark.parametrize("between", (b"", b"TAG" + b"x" * 125, TAG[:6] + bytes(4)))
def test_joined_mp3_files_are_an_error_if_the_first_states_its_length(
    tmp_path, mp3s, second, between
):
    (tmp_path / "a.mp3").write_bytes(mp3s["stated"] + between + mp3s[second])
    with pytest.raises(AudioError, match="it contains several mp3 files"):
        load_audio(tmp_path / "a.mp3")


def test_joined_mp3_files_are_read_if_none_states_its_length(tmp_path, mp3s):
    (tmp_path / "a.mp3").write_bytes(mp3s["not stated"])
    (tmp_path / "b.mp3").write_bytes(mp3s["not stated"] * 2)
    once, twice = audio_seconds(tmp_path / "a.mp3"), audio_seconds(tmp_path / "b.mp3")
    assert twice == pytest.approx(2 * once, abs=0.05)


def test_an_mp3_that_is_shorter_than_it_states_is_an_error(tmp_path, mp3s):
    (tmp_path / "a.mp3").write_bytes(mp3s["stated"][: len(mp3s["stated"]) * 3 // 4])
    with pytest.raises(AudioError, match="cut|damaged"):
        load_audio(tmp_path / "a.mp3")


@pytest.mark.parametrize("subtype", ("VORBIS", "OPUS"))
def test_joined_ogg_files_are_an_error(tmp_path, subtype):
    data = write(tmp_path / "a.ogg", tone(440, 48000), 48000, subtype=subtype).read_bytes()
    (tmp_path / "b.ogg").write_bytes(data + data)
    with pytest.raises(AudioError, match="several Ogg streams"):
        load_audio(tmp_path / "b.ogg")


# ------------------------------------------------------------------------------------------- ffmpeg

needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")


def ffmpeg(*arguments, data: bytes = b"") -> bytes:
    """What ffmpeg writes into a pipe."""
    command = ["ffmpeg", "-v", "error", *map(str, arguments), "-"]
    return subprocess.run(command, input=data, capture_output=True, check=True).stdout


def assert_equals_ffmpeg(file: Path):
    """ffmpeg's default decode: it leaves out the padding that a Xing frame states."""
    with soundfile.SoundFile(file) as opened:
        channels, rate = opened.channels, opened.samplerate
    samples = np.frombuffer(ffmpeg("-i", file, "-f", "f32le"), np.float32)
    expected = torch.from_numpy(samples.reshape(-1, channels).mean(axis=1))
    assert audio_seconds(file) == len(expected) / rate
    audio = load_audio(file)
    expected = resample(expected, rate, 16000)
    assert len(audio) == len(expected)
    assert np.corrcoef(audio, expected)[0, 1] > 0.999


@needs_ffmpeg
@pytest.mark.parametrize("rate", (8000, 11025, 16000, 22050, 44100, 48000))
@pytest.mark.parametrize("how", (("-b:a", "64k", "-ac", 1), ("-q:a", 4, "-ac", 2)))
@pytest.mark.parametrize("tag", (("-id3v2_version", 0), ("-metadata", "title=" + "é" * 999)))
def test_mp3_from_a_pipe_equals_the_decode_of_ffmpeg(tmp_path, rate, how, tag):
    sound = np.random.default_rng(0).normal(size=rate) * 0.1 * (np.arange(rate) > rate // 2)
    source = write(tmp_path / "a.wav", sound + 0.1 * tone(300, rate, 1), rate)
    (tmp_path / "a.mp3").write_bytes(
        ffmpeg("-i", source, *how, "-ar", rate, *tag, "-c:a", "libmp3lame", "-f", "mp3")
    )
    assert_equals_ffmpeg(tmp_path / "a.mp3")


@needs_ffmpeg
@pytest.mark.parametrize("name", ("a.mp3", "a.mp2", "a.opus", "a.aif", "a.au", "a.caf", "a.w64"))
def test_files_equal_the_decode_of_ffmpeg(tmp_path, name):
    source = write(tmp_path / "a.wav", 0.3 * tone(440, 48000, 1), 48000)
    ffmpeg("-i", source, tmp_path / name, "-f", "null")
    assert_equals_ffmpeg(tmp_path / name)


@needs_ffmpeg
def test_an_mp3_inside_a_wav_is_an_error(tmp_path):
    source = write(tmp_path / "a.wav", tone(440, 44100), 44100)
    (tmp_path / "b.wav").write_bytes(ffmpeg("-i", source, "-c:a", "libmp3lame", "-f", "wav"))
    with pytest.raises(AudioError, match=r"\(MPEG_LAYER_III\) that does not say its length"):
        load_audio(tmp_path / "b.wav")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return whisper_folder(tmp_path_factory.mktemp("toys") / "whisper", **SHORT)


@pytest.fixture(scope="module")
def encoder():
    encoder = WhisperEncoder(WhisperConfig(**WHISPER)).requires_grad_(False)
    fill(encoder)
    return encoder


# ------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("n_mels", (80, 128))
def test_log_mel_equals_the_golden_file(n_mels):
    ours = clip_to_mel(make_golden.clip(), n_mels, "30s")
    assert ours.shape == (n_mels, 3000)
    assert_close(ours[:, FRAMES], np.load(GOLDEN)[f"mel {n_mels}"], 1e-4)


@pytest.mark.parametrize("n_mels", (80, 128))
def test_log_mel_equals_transformers(n_mels):
    pytest.importorskip("transformers", reason="the reference is not installed")
    ours = clip_to_mel(make_golden.clip(), n_mels, "30s")
    assert_close(ours, make_golden.their_mel(n_mels), 1e-4)


def test_states_equal_the_golden_file(folder):
    with torch.no_grad():
        ours = WhisperEncoder.from_pretrained(folder)(make_golden.mel())
    assert_close(ours, np.load(GOLDEN)["states"], 5e-5)


def test_states_equal_transformers(folder):
    pytest.importorskip("transformers", reason="the reference is not installed")
    with torch.no_grad():
        ours = WhisperEncoder.from_pretrained(folder)(make_golden.mel())
    assert_close(ours, make_golden.their_states(folder), 5e-5)


def slow_attention(q, k, v, can_attend):
    """The textbook four lines. (B, H, S, Dh) x3 -> (B, H, S, Dh)"""
    score = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])  # (B, H, S, S)
    score = score.masked_fill(~can_attend, float("-inf"))
    weight = score.softmax(dim=-1)  # (B, H, S, S)
    return weight @ v


def test_attention_equals_the_textbook_formula(encoder):
    B, S, Da = 2, 5, WHISPER["d_model"]
    attention = encoder.layers[0].self_attn
    x = made_up("x", (B, S, Da))
    can_attend = (torch.arange(S) < torch.tensor([[5], [3]]))[:, None, None]  # (B, 1, 1, S)

    q, k, v = (
        proj(x).unflatten(-1, (attention.n_heads, -1)).transpose(1, 2)
        for proj in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    y = slow_attention(q, k, v, can_attend).transpose(1, 2).flatten(2)  # (B, S, Da)
    assert_close(attention(x, can_attend), attention.out_proj(y), 1e-6)


# --------------------------------------------------------------------------- clips and their length


@pytest.mark.parametrize(
    "samples, states", ((1, 1), (319, 1), (320, 1), (321, 2), (MAX_SAMPLES, 1500))
)
def test_a_clip_has_one_state_per_20_ms_rounded_up(samples, states):
    assert n_states(samples) == states
    assert clip_to_mel(made_up("clip", (samples,)), M, "clip").shape == (M, 2 * states)


def test_the_30s_window_always_has_30_s():
    assert clip_to_mel(made_up("clip", (1000,)), M, "30s").shape == (M, 3000)


@pytest.mark.parametrize(
    "samples, window, message",
    (
        (0, "clip", "the clip has 0 samples; use 1 to 480,000"),
        (0, "30s", "the clip has 0 samples"),
        (MAX_SAMPLES + 16_000, "clip", "the clip has 496,000 samples"),
        (MAX_SAMPLES + 1, "30s", "use 1 to 480,000"),
        (1000, "10s", r"window is '10s'; use one of \('30s', 'clip'\)"),
    ),
)
def test_an_empty_or_too_long_clip_is_an_error(samples, window, message):
    with pytest.raises(ValueError, match=message):
        clip_to_mel(torch.zeros(samples), M, window)


def test_a_clip_of_10_ms_has_a_state(encoder):
    mel = clip_to_mel(made_up("clip", (160,)), M, "clip")
    states = encoder(mel[None])
    assert states.shape == (1, 1, WHISPER["d_model"])
    assert states.isfinite().all()


def test_the_mel_of_a_batch_equals_the_mel_of_each_clip():
    loud, quiet = made_up("loud", (3200,)), made_up("quiet", (3200,), 1e-3)
    together = log_mel_spectrogram(torch.stack([loud, quiet]), M)
    assert_close(together[0], log_mel_spectrogram(loud, M), 1e-6)
    assert_close(together[1], log_mel_spectrogram(quiet, M), 1e-6)


def test_more_states_than_positions_are_an_error(folder):
    encoder = WhisperEncoder.from_pretrained(folder)
    message = "a clip has 51 states; this encoder takes 50: split the clip"
    with pytest.raises(ValueError, match=message):
        encoder(torch.zeros(1, M, 102))


# ------------------------------------------------------------------------- single and in a batch


def padded(mels):
    """Mels (M, 2S) of different S -> (B, M, 2S) and their lengths (B,) in states."""
    lengths = torch.tensor([mel.shape[1] // 2 for mel in mels])
    rows = torch.nn.utils.rnn.pad_sequence([mel.T for mel in mels], batch_first=True)
    return rows.transpose(1, 2), lengths


@pytest.mark.parametrize("window", ("clip", "30s"))
def test_a_clip_has_the_same_states_alone_and_in_a_batch(encoder, window):
    samples = (160, 7 * SAMPLES_PER_STATE, 20 * SAMPLES_PER_STATE + 1)
    mels = [clip_to_mel(made_up(f"clip {n}", (n,)), M, window) for n in samples]
    together = encoder(*padded(mels))
    for mel, states in zip(mels, together):
        single = encoder(mel[None])[0]
        assert_close(states[: len(single)], single, 1e-5)


def test_padding_after_a_clip_changes_nothing(encoder):
    mel = made_up("mel", (2, M, 24), 1.0)
    lengths = torch.tensor([5, 12])
    other = mel.clone()
    other[0, :, 2 * 5 :] = 100.0
    states, same = encoder(mel, lengths), encoder(other, lengths)
    assert torch.equal(states[0, :5], same[0, :5])
    assert torch.equal(states[1], same[1])


def test_lengths_that_fill_the_batch_equal_no_lengths(encoder):
    mel = made_up("mel", (2, M, 24), 1.0)
    assert torch.equal(encoder(mel, torch.tensor([12, 12])), encoder(mel))


@pytest.mark.parametrize("recompute", (False, True))
def test_the_first_n_states_equal_those_of_the_full_encoder(encoder, recompute, monkeypatch):
    monkeypatch.setattr(encoder, "recompute", recompute)
    mel = made_up("mel", (2, M, 24), 1.0).requires_grad_()
    lengths = torch.tensor([5, 9])
    for lengths_or_none in (lengths, None):
        results = []
        for states in (encoder(mel, lengths_or_none)[:, :5], encoder(mel, lengths_or_none, 5)):
            results.append((states, torch.autograd.grad((states**3).sum(), mel)[0]))
        (states, gradient), (same, again) = results
        assert_close(same, states, 1e-5)
        assert_close(again / gradient.abs().max(), gradient / gradient.abs().max(), 1e-5)
        assert torch.any(gradient[1, :, 2 * 5 :])  # the other states are still attended to


# ------------------------------------------------------------------------------------------ loading


def test_every_tensor_of_the_encoder_is_loaded_and_the_decoder_is_left_out(folder):
    stored = load_file(folder / "model.safetensors")
    assert {"model.decoder.layer_norm.weight", "proj_out.weight"} <= stored.keys()
    loaded = WhisperEncoder.from_pretrained(folder).state_dict()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, stored[f"model.encoder.{name}"])


def test_a_folder_without_the_prefix_loads_too(folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    save_file({k.removeprefix("model."): v for k, v in weights.items()}, tmp_path / "w")
    (tmp_path / "w").rename(tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    WhisperEncoder.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    (
        ({"d_model": None}, r"config.json has no valid d_model \(int\), found None"),
        ({"encoder_attention_heads": 5}, "heads must divide d_model, .*heads=5"),
        (
            {"activation_function": "relu"},
            "activation_function is 'relu'; only 'gelu' is supported",
        ),
        ({"scale_embedding": True}, "scale_embedding is True; only False is supported"),
    ),
)
def test_a_config_that_is_not_built_is_an_error_that_names_the_value(tmp_path, change, message):
    config = {k: v for k, v in (WHISPER | change).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        WhisperConfig.from_json(tmp_path / "config.json")


@pytest.mark.parametrize("name", WhisperConfig.__dataclass_fields__)
def test_a_size_of_another_type_or_size_is_an_error_that_names_it(tmp_path, name):
    path = tmp_path / "config.json"
    for value in ("8", 8.5, True, [8], {}, 0, -8, 10**9, 10**400, float("nan")):
        path.write_text(json.dumps(WHISPER | {name: value}))
        with pytest.raises(ValueError, match=f"config.json has no valid {name} "):
            WhisperConfig.from_json(path)


def test_a_million_layers_are_refused_before_they_are_built(tmp_path):
    folder = whisper_folder(tmp_path / "whisper")
    (folder / "config.json").write_text(json.dumps(WHISPER | {"encoder_layers": 10**6}))
    with pytest.raises(ValueError, match="no valid encoder_layers"):
        WhisperEncoder.from_pretrained(folder)


def test_a_whisper_in_shards_is_the_same(folder, tmp_path):
    whole = WhisperEncoder.from_pretrained(folder)
    sharded = WhisperEncoder.from_pretrained(shard(shutil.copytree(folder, tmp_path / "whisper")))
    for name, tensor in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[name], tensor), name


def test_weights_have_the_precision_that_the_caller_names(folder):
    encoder = WhisperEncoder.from_pretrained(folder, torch.bfloat16)
    assert {p.dtype for p in encoder.parameters()} == {torch.bfloat16}
    mel = torch.zeros(1, encoder.config.num_mel_bins, 8, dtype=torch.bfloat16)
    assert encoder(mel).dtype == torch.bfloat16


@pytest.mark.parametrize("fault", FAULTS | INTEGERS)
def test_one_faulty_tensor_is_an_error_that_names_it(tmp_path, fault):
    broken = whisper_folder(tmp_path / "whisper", encoder_layers=1, max_source_positions=8)
    weights = load_file(broken / "model.safetensors")
    for name in [name for name in weights if ".encoder." in name]:
        faulty = dict(weights)
        (FAULTS | INTEGERS)[fault](faulty, name)
        save_file(faulty, broken / "model.safetensors")
        ours = re.escape(name.removeprefix("model.encoder."))
        with pytest.raises(ValueError, match=f" 1 tensors .*: {fault}: {ours}"):
            WhisperEncoder.from_pretrained(broken)


def test_another_file_of_weights_names_the_command_that_converts_it(tmp_path):
    for path in (tmp_path, tmp_path / "tiny.pt"):
        with pytest.raises(FileNotFoundError, match=f"tools/convert.py whisper.* {path} --out"):
            WhisperEncoder.from_pretrained(path)
