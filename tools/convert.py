"""Convert weights to Hugging Face folders, and a trained LLaST to and from other programs.

    whisper, llama   other files of weights -> a Hugging Face folder with safetensors
    export           a trained LLaST -> merged folders for transformers, adapters for peft
    import           a checkpoint of the original LLaST, or an exported folder -> a trained LLaST

Each command writes a new folder. After an error, the folder does not exist.
"""

import argparse
import json
import os
import pickle
import re
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from data import TEMPLATES, parse_directions
from llama import Llama, LlamaConfig, check_fields
from llast import LLaST, LLaSTConfig, check_bases
from lora import LoRALinear, lora_layers, merge_lora
from whisper_encoder import (
    WINDOWS,
    WhisperConfig,
    WhisperEncoder,
    read_json,
    read_tensors,
    weight_files,
)

# -------------------------------------------------------------------------------- reading pickles


def read_pickle(file: Path) -> dict:
    """The dictionary that torch.save wrote to a file. Nothing in the file is run.

    Tensors are mapped: their numbers are read from the disk only when they are used.
    """
    try:
        is_zip = zipfile.is_zipfile(file)  # torch before 1.6 wrote no zip files
        compressed = is_zip and any(e.compress_type for e in zipfile.ZipFile(file).infolist())
        stored = {} if compressed else torch.load(file, "cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:  # torch's message suggests to run the code
        raise ValueError(
            f"{file} contains Python objects other than tensors; it was not loaded, because such "
            f"a file can run code"
        ) from error
    except Exception as error:  # torch.load fails in many ways on other files
        raise ValueError(f"{file} cannot be read as weights: {error!r}; get it again") from error
    if compressed:  # a small file could then unpack to more than the memory
        raise ValueError(
            f"{file} is compressed; it was not loaded: files of weights are not compressed"
        )
    if not isinstance(stored, dict):
        raise ValueError(f"{file} must hold a dictionary of tensors, not {kind_of(stored)}")
    return stored


def check_pickled_tensors(weights: dict, file: Path) -> dict[str, Tensor]:
    """Return the same dictionary. A value that is not a named tensor of numbers is an error."""
    for name, tensor in weights.items():
        if not isinstance(name, str):
            raise ValueError(f"{file} must name its tensors by text, not by {kind_of(name)}")
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{file}: {name} must be a tensor, not {kind_of(tensor)}")
        on_disk = tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not on_disk or not tensor.is_floating_point():
            raise ValueError(f"{file}: {name} is not a dense tensor of floating-point numbers")
    # Tied tensors are stored once but counted twice here, so up to twice the file's size is valid.
    if sum(tensor.nbytes for tensor in weights.values()) > 2 * file.stat().st_size:
        raise ValueError(f"{file} describes tensors that are larger than the file; get it again")
    return weights


def kind_of(value) -> str:
    """The type of a value from a file, for a message. The value itself could be very long."""
    return f"a value of type {type(value).__name__}"


# --------------------------------------------------------------------- writing Hugging Face folders

SHARD_BYTES = 2 << 30  # largest size of a file; one file at a time is in memory


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary folder. At the end it is renamed to `out`; after an error it is removed."""
    if out.exists():
        raise ValueError(f"{out} already exists; choose another folder with --out")
    partial = out.with_name(f".{out.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        yield partial
        # safetensors makes files that only the owner can read. Give them normal permissions.
        other = next(partial.rglob("*.json"))
        for file in partial.rglob("*.safetensors"):
            shutil.copymode(other, file)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def split_into_shards(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Copies of the tensors, in dictionaries of at most SHARD_BYTES (or one larger tensor)."""
    shard, n_bytes = {}, 0
    for name, tensor in tensors:
        if shard and n_bytes + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard.clear()  # the caller holds the same dictionary, so this frees its memory
            n_bytes = 0
        # In a pickle, tied tensors share memory, which safetensors does not allow.
        shard[name] = tensor.clone(memory_format=torch.contiguous_format)
        n_bytes += tensor.nbytes
    yield shard


def save_weights(tensors: Iterable[tuple[str, Tensor]], folder: Path):
    """Write model.safetensors, or shards and their index if the tensors need more than one file."""
    shard_of, n_bytes = {}, 0
    for n, shard in enumerate(split_into_shards(tensors), start=1):
        save_file(shard, folder / f"{n}.safetensors", {"format": "pt"})
        shard_of |= dict.fromkeys(shard, n)
        n_bytes += sum(tensor.nbytes for tensor in shard.values())
    names = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
    names = names if n > 1 else ["model.safetensors"]
    for i, name in enumerate(names, start=1):
        (folder / f"{i}.safetensors").rename(folder / name)
    if n > 1:  # transformers reads this index
        index = {name: names[i - 1] for name, i in shard_of.items()}
        index = {"metadata": {"total_size": n_bytes}, "weight_map": index}
        write_json(index, folder / "model.safetensors.index.json")


def write_json(value: dict, file: Path):
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def copy_other_files(source: Path, out: Path):
    """Copy what a Hugging Face folder has besides weights: configuration, tokenizer, licence."""
    for file in source.iterdir():
        if file.suffix in (".json", ".model", ".txt", ".jinja") and ".index." not in file.name:
            shutil.copy(file, out)


# ---------------------------------------------------------------------- Whisper and Llama of others


def convert(source: Path, out: Path, model: type[WhisperEncoder] | type[Llama]):
    """Write the weights of `source` as a Hugging Face folder, and load that once as a check."""
    config_class, read = {
        WhisperEncoder: (WhisperConfig, read_openai),
        Llama: (LlamaConfig, read_meta),
    }[model]
    with new_folder(out) as partial:
        if (source / "config.json").is_file():
            config, tensors = read_json(source / "config.json"), read_bin_folder(source)
        else:
            config, tensors = read(source)
        if source.is_dir():
            copy_other_files(source, partial)
        tokenizer = source.parent / "tokenizer.model"  # Meta's downloads have it there
        if model is Llama and tokenizer.is_file() and not (partial / tokenizer.name).exists():
            shutil.copy(tokenizer, partial)
        write_json(config, partial / "config.json")
        try:
            config_class.from_json(partial / "config.json")
            save_weights(tensors, partial)
            model.from_pretrained(partial, torch.bfloat16)  # half the memory of float32
        except ValueError as error:
            raise ValueError(str(error).replace(str(partial), str(source))) from error


def read_bin_folder(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of a Hugging Face folder with pytorch_model.bin, whole or in shards."""
    index = folder / "pytorch_model.bin.index.json"
    names = ["pytorch_model.bin"]
    if index.is_file():
        file_of = read_json(index).get("weight_map")
        if not isinstance(file_of, dict) or not all(isinstance(n, str) for n in file_of.values()):
            raise ValueError(f"{index}: weight_map must map names of tensors to names of files")
        names = sorted(set(file_of.values()))
    absent = [name for name in names if not (folder / Path(name).name).is_file()]
    if absent:
        raise FileNotFoundError(
            f"{folder} has config.json, but not {absent}. A folder with safetensors needs no "
            f"conversion"
        )
    files = [folder / Path(name).name for name in names]
    return chain.from_iterable(
        check_pickled_tensors(read_pickle(file), file).items() for file in files
    )


OPENAI_NAMES = (  # parts of OpenAI's names -> the same parts of Hugging Face's names
    (".blocks.", ".layers."),
    (".cross_attn.", ".encoder_attn."),
    (".cross_attn_ln.", ".encoder_attn_layer_norm."),
    (".attn.", ".self_attn."),
    (".attn_ln.", ".self_attn_layer_norm."),
    (".query.", ".q_proj."),
    (".key.", ".k_proj."),
    (".value.", ".v_proj."),
    (".out.", ".out_proj."),
    (".mlp.0.", ".fc1."),
    (".mlp.2.", ".fc2."),
    (".mlp_ln.", ".final_layer_norm."),
    ("encoder.ln_post.", "encoder.layer_norm."),
    ("decoder.ln.", "decoder.layer_norm."),
    (".token_embedding.", ".embed_tokens."),
    (".positional_embedding", ".embed_positions.weight"),
)


@dataclass(frozen=True)
class OpenAISizes:
    """The sizes in one of OpenAI's Whisper files, with OpenAI's names."""

    n_mels: int
    n_audio_ctx: int
    n_audio_state: int
    n_audio_head: int
    n_audio_layer: int
    n_vocab: int
    n_text_ctx: int
    n_text_head: int
    n_text_layer: int
    n_text_state: int


def read_openai(file: Path) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
    """config.json, and (name, tensor) pairs, of one of OpenAI's Whisper files such as tiny.pt."""
    if not file.is_file():
        raise FileNotFoundError(
            f"{file} is not a Whisper: name OpenAI's .pt file, or a folder with config.json and "
            f"pytorch_model.bin"
        )
    stored = read_pickle(file)
    if stored.keys() != {"dims", "model_state_dict"}:
        names = [name for name in stored if isinstance(name, str)]
        raise ValueError(
            f"{file} is not one of OpenAI's Whisper files: it must hold dims and "
            f"model_state_dict, but it holds {names[:5]}"
        )
    dims, weights = stored["dims"], stored["model_state_dict"]
    if not isinstance(dims, dict) or not isinstance(weights, dict):
        raise ValueError(f"{file}: dims and model_state_dict must be dictionaries")
    check_pickled_tensors(weights, file)
    sizes = check_fields(OpenAISizes, dims, file)
    end = 50257 if sizes.n_vocab >= 51865 else 50256  # <|endoftext|>; English-only has one less
    config = {
        "model_type": "whisper",
        "architectures": ["WhisperForConditionalGeneration"],
        "num_mel_bins": sizes.n_mels,
        "d_model": sizes.n_audio_state,
        "encoder_layers": sizes.n_audio_layer,
        "encoder_attention_heads": sizes.n_audio_head,
        "encoder_ffn_dim": 4 * sizes.n_audio_state,
        "decoder_layers": sizes.n_text_layer,
        "decoder_attention_heads": sizes.n_text_head,
        "decoder_ffn_dim": 4 * sizes.n_text_state,
        "vocab_size": sizes.n_vocab,
        "max_source_positions": sizes.n_audio_ctx,
        "max_target_positions": sizes.n_text_ctx,
        "bos_token_id": end,
        "eos_token_id": end,
        "pad_token_id": end,
        "decoder_start_token_id": end + 1,
    }

    def rename(name: str) -> str:
        for theirs, ours in OPENAI_NAMES:
            name = name.replace(theirs, ours)
        return f"model.{name}"

    return config, ((rename(name), tensor) for name, tensor in weights.items())


META_NAMES = {  # Meta's name: Hugging Face's name, and the dimension that Meta's files divide
    "tok_embeddings": ("model.embed_tokens", 1),
    "attention.wq": ("self_attn.q_proj", 0),
    "attention.wk": ("self_attn.k_proj", 0),
    "attention.wv": ("self_attn.v_proj", 0),
    "attention.wo": ("self_attn.o_proj", 1),
    "feed_forward.w1": ("mlp.gate_proj", 0),
    "feed_forward.w2": ("mlp.down_proj", 1),
    "feed_forward.w3": ("mlp.up_proj", 0),
    "attention_norm": ("input_layernorm", None),  # the same in every file
    "ffn_norm": ("post_attention_layernorm", None),
    "norm": ("model.norm", None),
    "output": ("lm_head", 0),
}


@dataclass(frozen=True)
class MetaParams:
    """The part of Meta's params.json that shapes the computation."""

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    multiple_of: int
    ffn_dim_multiplier: float
    norm_eps: float
    rope_theta: float


def read_meta(folder: Path) -> tuple[dict, Iterator[tuple[str, Tensor]]]:
    """config.json, and (name, tensor) pairs, of a folder of Meta's own Llama files."""
    params, parts = read_params(folder / "params.json"), read_parts(folder)
    ffn_width = int(params.ffn_dim_multiplier * int(8 * params.dim / 3))
    config = LlamaConfig(
        hidden_size=params.dim,
        intermediate_size=-(-ffn_width // params.multiple_of) * params.multiple_of,  # rounded up
        num_hidden_layers=params.n_layers,
        num_attention_heads=params.n_heads,
        num_key_value_heads=params.n_kv_heads,
        head_dim=params.dim // params.n_heads,
        vocab_size=len(parts[0]["tok_embeddings.weight"]),  # params.json says -1
        rms_norm_eps=params.norm_eps,
        rope_theta=params.rope_theta,
        tie_word_embeddings=False,
    )
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    names = [name for name in sorted(parts[0]) if name != "rope.freqs"]  # follow from rope_theta
    return kind | asdict(config), (join_parts(name, parts, config.head_dim) for name in names)


def read_params(file: Path) -> MetaParams:
    if not file.is_file():
        raise FileNotFoundError(
            f"{file.parent} is not a Llama: it has neither params.json nor config.json; name the "
            "folder with the weights"
        )
    params = read_json(file)
    if params.get("use_scaled_rope"):
        raise ValueError(
            f"{file} is a Llama 3, which is not converted; download its Hugging Face folder "
            "(config.json, tokenizer.json, *.safetensors): it is read as it is"
        )
    # Values that the oldest files leave out or set to null.
    old = {"n_kv_heads": params.get("n_heads"), "ffn_dim_multiplier": 1.0, "rope_theta": 10_000.0}
    params = {name: value for name, value in params.items() if value is not None}
    return check_fields(MetaParams, old | params, file)


def read_parts(folder: Path) -> list[dict[str, Tensor]]:
    """Meta's files: each has a part of every tensor, and all parts have the same shape."""
    files = sorted(folder.glob("consolidated.*.pth"))
    names = [file.name for file in files]
    if not names or names != [f"consolidated.{i:02}.pth" for i in range(len(names))]:
        raise FileNotFoundError(
            f"{folder} must have consolidated.00.pth, consolidated.01.pth and so on; found {names}"
        )
    parts = [check_pickled_tensors(read_pickle(file), file) for file in files]
    faults = [
        name
        for name in sorted(set().union(*parts))
        if len({part[name].shape if name in part else None for part in parts}) > 1
    ]
    embeddings = parts[0].get("tok_embeddings.weight")
    if embeddings is None or embeddings.dim() != 2:
        faults.append("no matrix tok_embeddings.weight")
    if faults:
        raise ValueError(
            f"the files {names} in {folder} do not belong together, download them again: "
            f"{', '.join(faults[:8])}"
        )
    return parts


def join_parts(name: str, parts: list[dict[str, Tensor]], Dh: int) -> tuple[str, Tensor]:
    """One tensor, joined from its part in every file, and its name in a Hugging Face folder."""
    layer, last = re.fullmatch(r"(layers\.\d+\.)?(.*?)(?:\.weight)?", name, re.DOTALL).groups()
    ours, dim = META_NAMES.get(last, ("", None))
    if not ours or parts[0][name].dim() != (1 if dim is None else 2):
        return name, parts[0][name]  # the check after writing reports it
    pieces = [part[name] for part in parts]
    tensor = pieces[0] if dim is None or len(pieces) == 1 else torch.cat(pieces, dim)
    if last in ("attention.wq", "attention.wk") and len(tensor) % Dh == 0:
        # Meta rotates dimensions i and i + 1 together, llama.py i and i + Dh/2: see `rotate`.
        pairs = tensor.reshape(-1, Dh // 2, 2, tensor.shape[-1])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    return f"{'model.' + layer if layer else ''}{ours}.weight", tensor


# ------------------------------------------------------------------------------------------- export

PEFT_PREFIX = "base_model.model."
NOT_BUILT = {  # options of adapter_config.json that lora.py does not have, and "off" for each
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


def save_peft(module: nn.Module, folder, prefix: str = ""):
    """Write the LoRA of a module as an adapter folder. `prefix` is the module's name in peft."""
    folder = Path(folder)
    tensors, layers = {}, lora_layers(module)
    if not layers:
        raise ValueError(f"the module has no LoRA, so {folder} was not written")
    folder.mkdir(parents=True, exist_ok=True)
    for name, layer in module.named_modules():
        if isinstance(layer, LoRALinear):
            for part in ("lora_A", "lora_B"):
                tensor = getattr(layer, part).detach().cpu().contiguous()
                tensors[f"{PEFT_PREFIX}{prefix}{name}.{part}.weight"] = tensor
    lasts = sorted({name.split(".")[-3] for name in tensors})
    rank = len(layers[0].lora_A)
    config = NOT_BUILT | {
        "r": rank,
        "lora_alpha": layers[0].scale * rank,
        "lora_dropout": layers[0].dropout,
        "target_modules": rf"{re.escape(prefix)}.*\.({'|'.join(lasts)})",
        "inference_mode": True,
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    write_json(config, folder / "adapter_config.json")


LORAS = {  # folder of a LoRA: its module in LLaST, and the prefix of names in the base model
    "encoder-lora": ("speech_encoder", "encoder."),
    "llm-lora": ("llm", ""),
}


def export(model: LLaST, out: Path):
    """Write a folder that other programs can load. Afterwards the LoRAs of `model` are merged.

    whisper, llama          base models with merged LoRA, for transformers
    encoder-lora, llm-lora  LoRAs for peft, on WhisperModel and LlamaForCausalLM of transformers
    projector.safetensors   weights of the projector
    use.json                template, window, directions, tasks, fingerprints of the base models
    """
    settings = {
        name: getattr(model.config, name) for name in ("template", "window", "directions", "tasks")
    }
    settings["fingerprints"] = model.fingerprints
    with new_folder(out) as partial:
        write_json(settings, partial / "use.json")
        save_file(model.projector.state_dict(), partial / "projector.safetensors")
        for name, (module, place) in LORAS.items():
            if lora_layers(model.get_submodule(module)):
                save_peft(model.get_submodule(module), partial / name, place)
        merge_lora(model)
        merged = {
            f"{place}{name}.weight": layer.weight
            for module, place in LORAS.values()
            for name, layer in model.get_submodule(module).named_modules()
            if isinstance(layer, LoRALinear)
        }
        for name, base in (("whisper", model.config.encoder), ("llama", model.config.llm)):
            (partial / name).mkdir()
            copy_other_files(Path(base), partial / name)
            save_weights(merge_into(Path(base), merged), partial / name)
        if merged:
            raise ValueError(
                f"{sorted(merged)[:8]} have LoRA, but are not in the files of the base models; use "
                "the base models of the training"
            )


def merge_into(base: Path, merged: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) pairs of a base model. Weights in `merged` replace its own and are removed."""
    for file in weight_files(base):
        for name, tensor in read_tensors(file).items():
            ours = name if name in merged else name.removeprefix("model.")  # some Whisper files
            yield name, merged.pop(ours, tensor).to(tensor.dtype)  # keep the precision of the file


# ------------------------------------------------------------------------------------------- import


@dataclass(frozen=True)
class PeftSettings:
    """The options of adapter_config.json that may have any value. For others see NOT_BUILT."""

    r: int  # R
    lora_alpha: float


def rank_of(tensors: dict[str, Tensor]) -> int:
    """R of a LoRA: the number of rows of its matrices A. Without tensors it is 0."""
    As = [tensor for name, tensor in tensors.items() if name.endswith("lora_A")]
    return max((A.shape[0] for A in As if A.dim()), default=0)


def read_peft(folder, prefix: str = "") -> tuple[float, dict[str, Tensor]]:
    """Read an adapter folder of peft. -> alpha; A and B of every layer, named as in lora.py"""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a LoRA of peft: it has no {name}")
    config = read_json(folder / "adapter_config.json")
    settings = check_fields(PeftSettings, config, folder / "adapter_config.json")
    others = {k: config[k] for k, off in NOT_BUILT.items() if (config.get(k) or off) != off}
    if others:
        raise ValueError(f"{folder}/adapter_config.json has {others}, which is not supported here")
    tensors = {}
    for name, tensor in read_tensors(folder / "adapter_model.safetensors").items():
        if not name.startswith(PEFT_PREFIX + prefix):
            raise ValueError(f"{folder}: {name} does not begin with {PEFT_PREFIX + prefix}")
        name = name.removeprefix(PEFT_PREFIX + prefix).removesuffix(".weight")
        tensors[name.removesuffix(".default")] = tensor  # the name of the adapter, in some files
    if (rank := rank_of(tensors)) != settings.r:
        raise ValueError(
            f"{folder}: adapter_config.json has r = {settings.r}, but the tensors have {rank}"
        )
    return settings.lora_alpha, tensors


def read_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Read a folder of `export`. -> the trained tensors; alpha of the LoRA in each module"""
    projector = read_tensors(folder / "projector.safetensors")
    tensors, alphas = {f"projector.{name}": tensor for name, tensor in projector.items()}, {}
    for name, (module, place) in LORAS.items():
        if (folder / name).is_dir():
            alphas[module], lora = read_peft(folder / name, place)
            tensors |= {f"{module}.{key}": tensor for key, tensor in lora.items()}
    return tensors, alphas


def read_use(file: Path) -> dict:
    """The settings in the use.json of an exported folder, each of them checked."""
    use = read_json(file)
    fingerprints = use.get("fingerprints")
    is_valid = {
        "template": use.get("template") in list(TEMPLATES),
        "window": use.get("window") in WINDOWS,
        "directions": is_list_of_texts(use.get("directions")),
        "tasks": use.get("tasks") in (["st"], ["st", "asr"]),
        "fingerprints": isinstance(fingerprints, dict)
        and is_list_of_texts([fingerprints.get("encoder"), fingerprints.get("llm")]),
    }
    for name, valid in is_valid.items():
        if not valid:
            raise ValueError(
                f"{file} has no valid {name}, found {use.get(name)!r:.40}; export the model again"
            )
    return {name: use[name] for name in is_valid}


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def read_original(path: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint of the original (a file, or DeepSpeed's folder).

    A LoRA of Whisper's decoder is left out, because the original does not use the decoder.
    """
    if path.is_dir():
        path = path / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; name a checkpoint, or an exported folder")
    if path.suffix == ".safetensors":
        stored = read_tensors(path)
    else:
        stored = read_pickle(path)
        for key in ("module", "state_dict"):  # DeepSpeed's name, and xtuner's
            if isinstance(stored.get(key), dict):
                stored = stored[key]
        check_pickled_tensors(stored, path)
    tensors = {}
    for name, tensor in stored.items():
        if not name.startswith("speech_encoder.base_model.model.decoder."):
            name = name.replace("speech_encoder.base_model.model.encoder.", "speech_encoder.", 1)
            name = name.replace("llm.base_model.model.", "llm.", 1)
            tensors[name.replace(".default.weight", "")] = tensor
    return tensors


def import_trained(args: argparse.Namespace) -> LLaST:
    """A LLaST with the trained tensors of an exported folder or of the original."""
    if (args.source / "projector.safetensors").is_file():
        tensors, alphas = read_exported(args.source)
        use = read_use(args.source / "use.json")
    else:
        tensors, alphas = read_original(args.source), {}
        use = {"template": "llama2", "window": "30s", "directions": ["paper"],
               "tasks": ["st", "asr"], "fingerprints": {}}  # fmt: skip
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{args.source}: {name} has numbers that are NaN or infinite")
    lora = {}
    for part, module in (("encoder", "speech_encoder"), ("llm", "llm")):
        rank = rank_of({name: v for name, v in tensors.items() if name.startswith(f"{module}.")})
        # The original does not store alpha; in its configurations it is half of the rank.
        lora |= {f"{part}_rank": rank, f"{part}_alpha": float(alphas.get(module, rank / 2))}
    directions = parse_directions(args.lang or ",".join(use["directions"]))
    config = LLaSTConfig(
        encoder=str(args.encoder),
        llm=str(args.llm),
        template=args.template or use["template"],
        window=args.window or use["window"],
        dropout=0.0,
        directions=tuple("-".join(pair) for pair in directions),
        tasks=tuple(use["tasks"]),
        **lora,
    )
    # Merged base models already have the LoRA in them. Their fingerprints differ: it is an error.
    check_bases(config, use["fingerprints"], args.source)
    model = LLaST.fresh(config)
    model.fill_trained(tensors, args.source)
    return model


# ------------------------------------------------------------------------------------- command line


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("whisper", help="Whisper weights -> Hugging Face folder")
    add.add_argument(
        "source", type=Path, help="OpenAI's .pt file, or folder with pytorch_model.bin"
    )
    add = commands.add_parser("llama", help="Llama weights -> Hugging Face folder")
    add.add_argument("source", type=Path, help="Meta's folder, or folder with pytorch_model.bin")
    add = commands.add_parser("export", help="trained LLaST -> folders for transformers and peft")
    add.add_argument("source", type=Path, help="folder that train.py wrote")
    add.add_argument("--encoder", type=Path, help="where the encoder is now, if it has moved")
    add.add_argument("--llm", type=Path, help="where the LLM is now, if it has moved")
    add = commands.add_parser("import", help="checkpoint of the original -> trained LLaST")
    add.add_argument("source", type=Path, help="checkpoint of the original, or exported folder")
    add.add_argument("--encoder", type=Path, required=True, help="the Whisper it was trained on")
    add.add_argument("--llm", type=Path, required=True, help="the Llama it was trained on")
    stored = "; an exported folder has its own"
    add.add_argument("--template", choices=TEMPLATES, help=f"its prompt [llama2{stored}]")
    add.add_argument("--window", choices=WINDOWS, help=f"the encoder's input [30s{stored}]")
    add.add_argument("--lang", help=f"its directions, such as fr,en-de [paper{stored}]")
    for command in commands.choices.values():
        command.add_argument("--out", type=Path, required=True, help="folder to write; must be new")
    return parser


def run(args: argparse.Namespace):
    if args.command == "whisper":
        convert(args.source, args.out, WhisperEncoder)
    elif args.command == "llama":
        convert(args.source, args.out, Llama)
    elif args.command == "export":
        export(LLaST.from_pretrained(args.source, args.encoder, args.llm), args.out)
    else:
        with new_folder(args.out) as partial:
            import_trained(args).save_pretrained(partial)


def main() -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
    args = build_parser().parse_args()
    try:
        run(args)
    except (ValueError, OSError, SafetensorError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
