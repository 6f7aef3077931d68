"""The cost of a run: FLOPs by formula; time, memory and energy by measurement."""

import ctypes
import sys
import time
from pathlib import Path

import torch
from torch import nn

try:
    import resource
except ImportError:  # Windows does not have it; there the memory is unknown
    resource = None

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from llama import LlamaConfig
from llast import LLaST
from translate import Translation
from whisper_encoder import WhisperConfig

# Multiplications and additions of a forward pass, without LoRA: a merged LoRA costs nothing.
# Wc and Lc are the configurations of the encoder and of the LLM.


def encoder_flops(Wc: WhisperConfig, S: int, n: int) -> tuple[int, int, int]:
    """FLOPs of the convolutions, the linear layers and attention. -> three numbers

    The encoder computes S states. Its last layer returns only the first n of them.
    """
    Da, all_but_last = Wc.d_model, Wc.encoder_layers - 1
    convolutions = 12 * S * Wc.num_mel_bins * Da + 6 * S * Da * Da
    keys_and_values, others = 2 * Da * Da, 2 * Da * Da + 2 * Da * Wc.encoder_ffn_dim
    linears = 2 * (Wc.encoder_layers * S * keys_and_values + (all_but_last * S + n) * others)
    return convolutions, linears, 4 * (all_but_last * S + n) * S * Da


def projector_flops(Wc: WhisperConfig, Lc: LlamaConfig, S: int) -> int:
    D = Lc.hidden_size
    return 2 * S * (Wc.d_model * D + 2 * D * D)


def llm_flops(Lc: LlamaConfig, T: int, n_mlp: int, past: int = 0) -> tuple[int, int]:
    """FLOPs of linear layers and attention for T positions after `past` others, without the head.

    The last MLP computes only n_mlp of the T positions.
    """
    D, layers, q = Lc.hidden_size, Lc.num_hidden_layers, Lc.num_attention_heads * Lc.head_dim
    kv = Lc.num_key_value_heads * Lc.head_dim
    linears = 2 * T * layers * (2 * D * q + 2 * D * kv)
    linears += 2 * ((layers - 1) * T + n_mlp) * 3 * D * Lc.intermediate_size
    pairs = T * past + T * (T + 1) // 2  # (query, key): each position and all before it
    return linears, 4 * layers * q * pairs


class Meter:
    """Measures time, memory and energy of its `with` blocks, and counts their FLOPs.

    The model's LoRA must be merged. Hooks apply the formulas to the shapes of the tensors that each
    part of the model gets, with their padding. The hooks are removed at the end of a block. The
    costs of several blocks are added.
    """

    def __init__(self, model: LLaST):
        self.model, self.hooks = model, []
        self.seconds, self.flops, self.peak = 0.0, 0, 0
        self.joules = None if gpu_joules() is None else 0.0
        self.on_gpu = model.device.type == "cuda"

    def __enter__(self):
        Wc, Lc = self.model.speech_encoder.config, self.model.llm.config

        def of_encoder(mel, lengths, n):
            return len(mel) * sum(encoder_flops(Wc, mel.shape[2] // 2, n))

        def of_layers(x, cos, sin, past, can_attend, selection):
            (B, T, _), n = x.shape, past[2] if past else 0
            return B * sum(llm_flops(Lc, T, T if selection is None else len(selection[0]) // B, n))

        self.count(self.model.speech_encoder, of_encoder)
        self.count(self.model.projector, lambda x: projector_flops(Wc, Lc, x.numel() // Wc.d_model))
        self.count(self.model.llm.model.layers[-1], of_layers)  # the formula is for all layers
        self.count(self.model.llm.lm_head, lambda x: 2 * x.numel() * Lc.vocab_size)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        self.joules_before, self.start_time = gpu_joules(), time.perf_counter()
        return self

    def count(self, module: nn.Module, formula):
        def hook(_, args):
            self.flops += formula(*args)

        self.hooks.append(module.register_forward_pre_hook(hook))

    def __exit__(self, *_):
        while self.hooks:
            self.hooks.pop().remove()
        if self.on_gpu:
            torch.cuda.synchronize()
            self.peak = max(self.peak, torch.cuda.max_memory_allocated())
        elif resource:  # the peak since the process started
            unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
            self.peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        self.seconds += time.perf_counter() - self.start_time
        if self.joules is not None:
            self.joules += gpu_joules() - self.joules_before

    def figures(self, results: list[Translation], audio_seconds: float) -> dict[str, float | None]:
        """Costs of the results in s, TFLOP, GB and J. A cost that cannot be measured is None."""
        used = [result for result in results if not result.error]
        return {
            "clips": len(used),
            "audio_seconds": round(audio_seconds, 2),
            "seconds": round(self.seconds, 3),
            "real_time_factor": round(self.seconds / audio_seconds, 4) if audio_seconds else None,
            "tokens_per_second": round(sum(r.tokens for r in used) / self.seconds, 1),
            "tflop": round(self.flops / 1e12, 6),
            "peak_gb": round(self.peak / 1e9, 3) if self.peak else None,
            "joules": None if self.joules is None else round(self.joules, 1),
        }


def gpu_joules() -> float | None:
    """Energy that the GPU used since its driver was loaded. None if the GPU does not count it."""
    if not torch.cuda.is_available():
        return None
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties().uuid}".encode()
    device, millijoules = ctypes.c_void_p(), ctypes.c_ulonglong()
    failed = (
        nvml.nvmlInit_v2()
        or nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(device))
        or nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(millijoules))
    )
    return None if failed else millijoules.value / 1000
