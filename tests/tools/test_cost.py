"""tools/cost.py: the meter counts the arithmetic, the time and the energy of a run."""

import ctypes
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import toys
from llast import LLaST
from lora import merge_lora
from tools import cost, evaluate
from tools.evaluate import cascade
from translate import SearchOptions, translate


@pytest.mark.parametrize("window", ["clip", "30s"])
def test_the_meter_counts_what_the_model_computes(clips, tmp_path, window):
    # Wide: the counter takes causal attention for the whole square, so it has to be a small part.
    toys.whisper_folder(tmp_path / "whisper", d_model=240, encoder_ffn_dim=400)
    toys.llama_folder(tmp_path / "llama", hidden_size=360, intermediate_size=520, head_dim=60)
    toys.save_model(tmp_path, tmp_path / "trained")
    model = LLaST.from_pretrained(tmp_path / "trained")
    model.config = replace(model.config, window=window)
    merge_lora(model)
    meter, counter = cost.Meter(model), FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter, meter:  # no other attention is counted on a CPU
        cascade(model, toys.good(clips), "fr", "en", SearchOptions(3, max_new_tokens=6))
    assert meter.flops == pytest.approx(counter.get_total_flops(), rel=0.03)
    before = meter.flops
    translate(model, toys.good(clips))
    assert meter.flops == before  # only what is inside counts
    with meter:
        translate(model, toys.good(clips)[:1], search=SearchOptions(2, max_new_tokens=1))
    assert meter.flops > before


def test_a_meter_counts_only_inside_its_block_however_often_it_is_used(model, clips):
    def flops_of(meter):
        before = meter.flops
        with meter:
            translate(model, toys.good(clips)[:1], search=SearchOptions(1, max_new_tokens=2))
        return meter.flops - before

    merge_lora(model)
    first, second = cost.Meter(model), cost.Meter(model)  # a notebook cell that runs twice
    assert flops_of(first) == flops_of(second) == flops_of(second) > 0
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(KeyboardInterrupt), first:
        raise KeyboardInterrupt
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_joules_are_those_of_the_gpus_counter_or_unknown(model, monkeypatch):
    class Driver:
        failed, millijoules = 0, 5_000

        def nvmlInit_v2(self):
            return 0

        def nvmlDeviceGetHandleByUUID(self, uuid, device):
            assert uuid == b"GPU-1234"
            return 0

        def nvmlDeviceGetTotalEnergyConsumption(self, device, count):
            Driver.millijoules += 2_000
            count._obj.value = Driver.millijoules
            return self.failed

    assert torch.cuda.is_available() or cost.gpu_joules() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    about = SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: about)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Driver())
    meter = cost.Meter(model)
    with meter:
        pass
    assert meter.joules == 2.0
    monkeypatch.setattr(Driver, "failed", 3)
    assert cost.gpu_joules() is None and cost.Meter(model).joules is None


@pytest.fixture
def command(run_main):
    return partial(run_main, evaluate)


def test_stats_are_printed_to_stderr(command, quick, clips, monkeypatch):
    code, lines, err = command(*quick, "--stats", *toys.good(clips))
    assert code == 0 and len(lines) == len(toys.good(clips))
    costs = dict(line.rsplit(maxsplit=1) for line in err.splitlines())
    assert (costs["clips"], costs["audio seconds"]) == ("4", "1.8")
    assert torch.cuda.is_available() or costs["joules"] == "unknown"
    _, _, err = command(*quick, "--stats", "--json", *toys.good(clips), clips / "empty.wav")
    figures = json.loads(err)
    assert [*costs] == [name.replace("_", " ") for name in figures]
    assert figures["clips"] == 4 and figures["audio_seconds"] == pytest.approx(1.8)
    # Both are rounded, the seconds to the third digit.
    assert figures["real_time_factor"] == pytest.approx(figures["seconds"] / 1.8, abs=4e-4)
    assert figures["tflop"] > 0 and figures["tokens_per_second"] > 0 and figures["peak_gb"] > 0
    monkeypatch.setattr(cost, "resource", None)  # as on Windows
    _, _, err = command(*quick, "--stats", clips / "good0.wav")
    assert dict(line.rsplit(maxsplit=1) for line in err.splitlines())["peak gb"] == "unknown"
