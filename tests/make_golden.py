"""Write tests/golden.npz: what transformers computes with the made-up weights of toys.py.

    python tests/make_golden.py

The tests compare with the file always, and with transformers itself where it is installed.
"""

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE)]  # as .pytest.ini does

from toys import WHISPER, llama_folder, made_up, whisper_folder  # noqa: E402

GOLDEN = HERE / "golden.npz"
SHORT = dict(max_source_positions=50)  # a window of one second: transformers takes nothing shorter
SMALL = dict(vocab_size=67)
LLAMAS = {
    "every head its own keys": SMALL | dict(num_key_value_heads=6),
    "two heads share keys": SMALL,
    "all heads share keys": SMALL | dict(num_key_value_heads=1),
    "tied": SMALL | dict(tie_word_embeddings=True),
    "wide heads": SMALL | dict(head_dim=10),
    "slow rotation": SMALL | dict(rope_theta=500_000.0),
    "scaled rotation": SMALL
    | dict(
        tie_word_embeddings=True,
        head_dim=10,
        rope_scaling=dict(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "loose norm": SMALL | dict(rms_norm_eps=0.1),
}
FRAMES = np.r_[0:4, 4:500:25, 496:506, 2996:3000]  # both edges of the clip, of the window, and some


def clip() -> torch.Tensor:
    """Five seconds: a rising tone and a hiss that fades out. (N,)"""
    t = torch.arange(5 * 16_000, dtype=torch.float64) / 16_000  # s
    tone = 0.4 * torch.sin(2 * torch.pi * (200 * t + 300 * t**2))
    return (tone + made_up("hiss", t.shape, 0.1) * torch.exp(-t)).float()


def mel() -> torch.Tensor:
    return made_up("mel", (2, WHISPER["num_mel_bins"], 100), 1.0)


def ids() -> torch.Tensor:
    return torch.tensor([[1, 66, 5, 5, 17, 40, 3, 22, 9], [1, 8, 33, 2, 60, 0, 12, 5, 7]])


def their_mel(n_mels: int) -> torch.Tensor:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=n_mels)
    features = extractor(clip().numpy(), sampling_rate=16_000, return_tensors="pt")
    return features.input_features[0]


@torch.no_grad()
def their_states(folder: Path) -> torch.Tensor:
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder

    encoder = WhisperEncoder(WhisperConfig(**WHISPER | SHORT)).eval()
    prefix = "model.encoder."
    weights = load_file(folder / "model.safetensors").items()
    encoder.load_state_dict({k[len(prefix) :]: v for k, v in weights if k.startswith(prefix)})
    return encoder(mel()).last_hidden_state


@torch.no_grad()
def their_logits(folder: Path) -> torch.Tensor:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids()).logits


def main():
    golden = {f"mel {n}": their_mel(n)[:, FRAMES] for n in (80, 128)}
    with tempfile.TemporaryDirectory() as folder:
        golden["states"] = their_states(whisper_folder(Path(folder) / "whisper", **SHORT))
        for name, changes in LLAMAS.items():
            golden[f"llama {name}"] = their_logits(llama_folder(Path(folder) / name, **changes))
    np.savez_compressed(GOLDEN, **{name: tensor.numpy() for name, tensor in golden.items()})


if __name__ == "__main__":
    main()
