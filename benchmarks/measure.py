"""What the benchmarks share: measuring a machine, time and memory, and writing tables."""

import ctypes
import gc
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Machine:
    """What the device can do at best, as measured here, and by its data sheet if that is known."""

    flops: float  # of a large matrix product, a second
    bytes: float  # that a large copy reads and writes, a second
    sheet_flops: float | None
    sheet_bytes: float | None

    def least(self, phases: list["Phase"]) -> float | None:
        """Seconds that the phases need, one after the other, if nothing else took any time."""
        needed = [p.times * max(p.flops / self.flops, p.bytes / self.bytes) for p in phases]
        return sum(needed) if needed else None


SHEETS = {  # dense bf16 FLOP/s and bytes/s
    "H100 80GB HBM3": (989e12, 3.35e12), "H200": (989e12, 4.8e12),
    "A100-SXM4-80GB": (312e12, 2.04e12),
}  # fmt: skip


def measure_machine(device, dtype) -> Machine:
    cuda = device.type == "cuda"
    n = 8192 if cuda else 2048
    a = torch.randn(n, n, device=device).to(dtype)
    source = torch.ones(1 << (30 if cuda else 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a @ a, target.copy_(source)
    product = min(seconds_of(lambda: a @ a, device) for _ in range(5))
    copy = min(seconds_of(lambda: target.copy_(source), device) for _ in range(5))
    name = torch.cuda.get_device_name() if cuda else ""
    sheet = next((SHEETS[key] for key in SHEETS if key in name), (None, None))
    return Machine(2 * n**3 / product, 2 * len(source) / copy, *sheet)


@dataclass(frozen=True)
class Phase:
    """A part of our work that ends before the next begins: its arithmetic, the bytes it reads."""

    flops: float
    bytes: float
    times: int = 1


def peak_of(work, device) -> int:
    """Bytes that a piece of work needs on top of what is there before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again
    before = memory_line("VmRSS")
    work()
    return memory_line("VmHWM") - before


def memory_line(name: str) -> int:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def seconds_of(work, device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()  # what came before must not be counted
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def made_on(device, dtype: torch.dtype, kind, *args, **options) -> nn.Module:
    """A module with random weights, made on the device and in the type that it needs."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return kind(*args, **options)
    finally:
        torch.set_default_dtype(usual)


def noise(seconds: float, seed: int) -> Tensor:
    """A clip that is never silent."""
    chance = torch.Generator().manual_seed(seed)
    return 0.1 * torch.randn(round(16_000 * seconds), generator=chance)


def bytes_of(module: nn.Module, without: str = "nothing") -> int:
    named = module.named_parameters()
    return sum(p.numel() * p.element_size() for name, p in named if without not in name)


def write_below(mark: str, lines: list[str]):
    """Put lines into README.md between <!-- mark --> and <!-- end of mark -->."""
    page = Path(__file__).parent / "README.md"
    above, begin, rest = page.read_text().partition(f"<!-- {mark} -->\n")
    _, end, below = rest.partition(f"<!-- end of {mark} -->")
    if not begin or not end:
        raise SystemExit(f"{page} has no place for {mark}")
    page.write_text(above + begin + "\n".join(lines) + "\n" + end + below)
