"""Take the encoder out of a downloaded whisper-base. This makes tiny/whisper/.

    hf download openai/whisper-base config.json model.safetensors --local-dir weights/whisper-base
    python tiny/take_encoder.py weights/whisper-base

The new file has the tensors of the encoder, with their published names, in float16. The script
prints its SHA-256. Compare it with the one in tiny/README.md.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

TINY = Path(__file__).parent
sys.path.insert(0, str(TINY.parent))
from whisper_encoder import WhisperEncoder, read_json  # noqa: E402

FIELDS = (  # of config.json; the others describe the decoder
    "model_type", "num_mel_bins", "d_model", "encoder_layers", "encoder_attention_heads",
    "encoder_ffn_dim", "max_source_positions", "activation_function", "scale_embedding",
)  # fmt: skip


def take_encoder(source: Path, out: Path) -> str:
    """Write config.json and model.safetensors to `out`. Return the SHA-256 of the latter."""
    encoder = WhisperEncoder.from_pretrained(source, torch.float16)
    published = read_json(source / "config.json")
    config = {name: published[name] for name in FIELDS} | {"torch_dtype": "float16"}
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    tensors = {f"model.encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    file = out / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors makes files that only the owner can read
    return hashlib.sha256(file.read_bytes()).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of the downloaded openai/whisper-base")
    parser.add_argument("--out", type=Path, default=TINY / "whisper", help="folder to write")
    args = parser.parse_args()
    print(take_encoder(args.source, args.out))
