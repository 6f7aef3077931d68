"""Resampling to 16 kHz: time before and now, against soxr, and the peak memory of a long file.

    python benchmarks/audio.py          needs: pip install -r benchmarks/requirements.txt

"Before" is the first version of resample: a window and a filter are copied for each output sample.
Times are CPU times of one thread. Writes audio.json and the table in README.md.
"""

import json
import math
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.measure import write_below  # noqa: E402
from whisper_encoder import KAISER_BETA, ROLLOFF, ZEROS, load_audio, resample  # noqa: E402

RATES = (8_000, 22_050, 44_100, 48_000)
SECONDS, REPEATS = 5, 7
MINUTES = 20  # of 44.1 kHz stereo


def old_table(from_step: int, to_step: int) -> torch.Tensor:
    cutoff = ROLLOFF * min(1, to_step / from_step)
    half = math.ceil(ZEROS / cutoff)
    phase = torch.arange(to_step, dtype=torch.float64)[:, None] / to_step
    t = cutoff * (torch.arange(-half, half + 1) - phase)
    width = (1 - (t / ZEROS) ** 2).clamp(min=0).sqrt()
    kaiser = torch.special.i0(KAISER_BETA * width) / torch.special.i0(torch.tensor(KAISER_BETA))
    return (cutoff * torch.sinc(t) * kaiser).float()


def old_resample(audio, from_step: int, to_step: int, table) -> torch.Tensor:
    half = table.shape[1] // 2
    windows = torch.nn.functional.pad(audio, (half, half)).unfold(0, table.shape[1], 1)
    n_out, pieces = math.ceil(len(audio) * to_step / from_step), []
    for start in range(0, n_out, 16_000):
        j = torch.arange(start, min(start + 16_000, n_out)) * from_step
        pieces.append((windows[j // to_step] * table[j % to_step]).sum(dim=1))
    return torch.cat(pieces)


def cpu_seconds(work) -> float:
    """Median CPU time of one call. The first call, which fills caches, does not count."""
    work()
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def measure_rate(rate: int) -> dict:
    audio = torch.rand(SECONDS * rate, generator=torch.Generator().manual_seed(rate)) - 0.5
    divisor = math.gcd(rate, 16_000)
    steps = rate // divisor, 16_000 // divisor
    table = old_table(*steps)
    difference = (resample(audio, rate, 16_000) - old_resample(audio, *steps, table)).abs().max()
    return {
        "rate": rate,
        "before": cpu_seconds(lambda: old_resample(audio, *steps, table)),
        "now": cpu_seconds(lambda: resample(audio, rate, 16_000)),
        "soxr": cpu_seconds(lambda: soxr.resample(audio.numpy(), rate, 16_000)),
        "difference": float(difference),
    }


def peak_of_load(path: str):
    """Print the bytes by which load_audio raises the peak memory of this process."""
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    load_audio(path)
    print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start))


def measure_memory() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.wav"
        minute = np.random.default_rng(0).normal(size=(60 * 44_100, 2)) * 0.1
        with soundfile.SoundFile(path, "w", 44_100, 2) as file:
            for _ in range(MINUTES):
                file.write(minute)
        command = [sys.executable, __file__, path]
        peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return {"peak": peak, "samples": MINUTES * 60 * 44_100 * 2 * 4}


def main():
    torch.set_num_threads(1)
    rates, memory = [measure_rate(rate) for rate in RATES], measure_memory()
    machine = f"{platform.machine()}, 1 thread, torch {torch.__version__}, soxr {soxr.__version__}"
    results = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "rates": rates} | memory
    (HERE / "audio.json").write_text(json.dumps(results, indent=1) + "\n")
    lines = [
        f"{results['date']}, {machine}: CPU time of a clip of {SECONDS} s, median of {REPEATS}. "
        f"load_audio of {MINUTES} minutes of 44.1 kHz stereo needs at most "
        f"{memory['peak'] / 1e6:,.0f} MB, {memory['peak'] / memory['samples']:.1f} times its "
        "samples as float32.",
        "",
        "| from, Hz | before, ms | now, ms | before : now | soxr, ms | now : soxr "
        "| largest difference |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rates:
        lines.append(
            f"| {r['rate']:,} | {1e3 * r['before']:.1f} | {1e3 * r['now']:.2f} "
            f"| {r['before'] / r['now']:.0f} | {1e3 * r['soxr']:.2f} "
            f"| {r['now'] / r['soxr']:.1f} | {r['difference']:.1e} |"
        )
    write_below("audio", lines)


if __name__ == "__main__":
    peak_of_load(sys.argv[1]) if sys.argv[1:] else main()
