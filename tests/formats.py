"""Weights in the files of other programs, for the tests of tools/convert.py."""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from llast import LLaST
from toys import shard


def write_bin(weights: dict, folder: Path, config: dict, shards: int) -> Path:
    """A Hugging Face folder with pytorch_model.bin, whole or in two shards."""
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        torch.save(weights, folder / "pytorch_model.bin")
        return folder
    save_file(weights, folder / "model.safetensors")
    return shard(folder, torch.save, "pytorch_model", "bin")


def write_openai(weights: dict, folder: Path, config: dict) -> Path:
    """OpenAI's file. Its names are written here a second time."""
    theirs = {
        r"model\.": "",
        r"layers\.(\d+)\.": r"blocks.\1.",
        r"encoder_attn_layer_norm": "cross_attn_ln",
        r"encoder_attn\.": "cross_attn.",
        r"self_attn_layer_norm": "attn_ln",
        r"self_attn\.": "attn.",
        r"q_proj": "query",
        r"k_proj": "key",
        r"v_proj": "value",
        r"out_proj": "out",
        r"fc1": "mlp.0",
        r"fc2": "mlp.2",
        r"final_layer_norm": "mlp_ln",
        r"encoder\.layer_norm": "encoder.ln_post",
        r"decoder\.layer_norm": "decoder.ln",
        r"embed_tokens": "token_embedding",
        r"embed_positions\.weight": "positional_embedding",
    }
    state = {}
    for name, tensor in weights.items():
        for ours, other in theirs.items():
            name = re.sub(ours, other, name)
        state[name] = tensor
    state.pop("proj_out.weight", None)  # the same as token_embedding
    dims = dict(
        n_mels=config["num_mel_bins"], n_audio_ctx=config["max_source_positions"],
        n_audio_state=config["d_model"], n_audio_head=config["encoder_attention_heads"],
        n_audio_layer=config["encoder_layers"], n_vocab=70, n_text_ctx=9, n_text_state=24,
        n_text_head=3, n_text_layer=1,
    )  # fmt: skip
    torch.save({"dims": dims, "model_state_dict": state}, folder / "small.pt")
    return folder / "small.pt"


META = {  # name in a layer: Meta's name, and the dimension that its files divide
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None), "lm_head": ("output", 0),
}  # fmt: skip


def to_meta(name: str, tensor, Dh: int):
    """Meta's name, the tensor in Meta's order of rows, and the dimension that the files divide."""
    layer, last = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*?)(?:\.weight)?", name).groups()
    if last not in META:
        return name, tensor, None
    theirs, dim = META[last]
    if last in ("self_attn.q_proj", "self_attn.k_proj") and len(tensor) % Dh == 0:
        halves = tensor.reshape(-1, 2, Dh // 2, tensor.shape[-1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return f"{layer or ''}{theirs}.weight", tensor, dim


def write_meta(weights: dict, folder: Path, config: dict, shards: int) -> Path:
    """Meta's folder: params.json and one consolidated file or two."""
    parts = [{"rope.freqs": torch.ones(3)} for _ in range(shards)]
    for name, tensor in weights.items():
        theirs, tensor, dim = to_meta(name, tensor, config["head_dim"])
        pieces = [tensor] * shards if dim is None else tensor.tensor_split(shards, dim)
        for part, piece in zip(parts, pieces, strict=True):
            part[theirs] = piece.clone()
    for i, part in enumerate(parts):
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    params = dict(
        dim=config["hidden_size"], n_layers=config["num_hidden_layers"], vocab_size=-1,
        n_heads=config["num_attention_heads"], n_kv_heads=config["num_key_value_heads"],
        norm_eps=config["rms_norm_eps"], multiple_of=104,
    )  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    return folder


def as_original(model: LLaST) -> dict[str, torch.Tensor]:
    """The trained tensors with the names of the original, which are copied from its code."""
    tensors = {}
    for name, tensor in model.trained().items():
        if name.startswith("speech_encoder."):
            name = name.replace("speech_encoder.", "speech_encoder.base_model.model.encoder.")
        elif name.startswith("llm."):
            name = name.replace("llm.", "llm.base_model.model.")
        if name.endswith(("lora_A", "lora_B")):
            name += ".default.weight"
        tensors[name] = tensor.clone()
    unused = "speech_encoder.base_model.model.decoder.layers.0.encoder_attn.q_proj.lora_A"
    tensors[f"{unused}.default.weight"] = torch.ones(2, 24)
    return tensors
