"""Convert weights to Hugging Face folders, and a trained LLaST to and from other programs."""

import argparse
import json
import re
import shutil
import sys
from itertools import chain
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, whatever the folder is

from data import TEMPLATES, parse_directions
from llast import LLaST, LLaSTConfig, check_bases, fingerprints_of
from lora import LoRALinear, lora_layers, merge_lora
from whisper_encoder import WINDOWS, read_json, stored_tensors, weight_files

PEFT_PREFIX = "base_model.model."
NOT_BUILT = {  # switches of adapter_config.json that change the computation, with their off state
    "peft_type": "LORA", "bias": "none", "use_rslora": False, "use_dora": False,
    "fan_in_fan_out": False, "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {},
}  # fmt: skip


def save_peft(module: nn.Module, folder, prefix: str = ""):
    """Write a module's LoRA as an adapter folder for peft; `prefix` is the module's place there."""
    folder = Path(folder)
    tensors, layers = {}, lora_layers(module)
    if not layers:
        raise ValueError(f"no LoRA to write to {folder}")
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
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def read_peft(folder, prefix: str = "") -> tuple[float, dict[str, Tensor]]:
    """Alpha, and A and B of every layer (named as here), of an adapter folder of peft."""
    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no LoRA of peft: it has no {name}")
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        stored = load_file(folder / "adapter_model.safetensors")
    except (ValueError, SafetensorError) as error:
        raise ValueError(f"the LoRA in {folder} cannot be read, is it whole? {error}") from error
    asked = {k: config[k] for k, off in NOT_BUILT.items() if (config.get(k) or off) != off}
    if asked:
        raise ValueError(f"{folder}/adapter_config.json asks for {asked}, which is not built here")
    tensors = {}
    for name, tensor in stored.items():
        if not name.startswith(PEFT_PREFIX + prefix):
            raise ValueError(f"{folder}: {name} does not begin with {PEFT_PREFIX + prefix}")
        name = name.removeprefix(PEFT_PREFIX + prefix).removesuffix(".weight")
        tensors[name.removesuffix(".default")] = tensor  # a raw state dict names its adapter
    return config["lora_alpha"], tensors


LORAS = {  # folder of a LoRA: its module here, and that module's place in the base
    "encoder-lora": ("speech_encoder", "encoder."),
    "llm-lora": ("llm", ""),
}


def export(model: LLaST, out: Path):
    """Write what others can load: both LoRAs for peft, the projector, merged bases, and use.json.

    out/whisper and out/llama are Hugging Face folders; out/encoder-lora belongs on transformers'
    WhisperModel, out/llm-lora on its LlamaForCausalLM.
    """
    bases = {"whisper": Path(model.config.encoder), "llama": Path(model.config.llm)}
    for base in bases.values():
        if not (base / "config.json").is_file():
            raise ValueError(f"{base} is not in Hugging Face's layout; export knows no other")
    out.mkdir(parents=True)
    for name, (module, place) in LORAS.items():
        if lora_layers(model.get_submodule(module)):
            save_peft(model.get_submodule(module), out / name, place)
    save_file(model.projector.state_dict(), out / "projector.safetensors")
    how = {name: getattr(model.config, name) for name in ("template", "window", "directions")}
    how["fingerprints"] = fingerprints_of(model.config)
    (out / "use.json").write_text(json.dumps(how, indent=2) + "\n")
    merge_lora(model)
    merged = {
        f"{place}{name}.weight": layer.weight
        for module, place in LORAS.values()
        for name, layer in model.get_submodule(module).named_modules()
        if isinstance(layer, LoRALinear)
    }
    for name, base in bases.items():
        (out / name).mkdir()
        for file in base.iterdir():
            if file.suffix in (".json", ".model", ".txt") and ".index." not in file.name:
                shutil.copy(file, out / name)
        tensors = {}
        for key, tensor in chain.from_iterable(map(stored_tensors, weight_files(base))):
            # Whisper files may have `model.` in front; each stays in the precision it came in, and
            # gets memory of its own, which tied tensors of a .bin file share.
            known = key if key in merged else key.removeprefix("model.")
            tensors[key] = merged.pop(known, tensor).to(tensor.dtype, copy=True).contiguous()
        save_file(tensors, out / name / "model.safetensors", {"format": "pt"})
    for file in out.rglob("*.safetensors"):
        shutil.copymode(out / "use.json", file)
    if merged:
        raise ValueError(f"merged weights that the bases' files do not have: {sorted(merged)[:8]}")


def read_exported(folder: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """From a folder as `export` writes it: the trained tensors, and alpha of each LoRA."""
    projector = stored_tensors(folder / "projector.safetensors")
    tensors, alphas = {f"projector.{name}": tensor for name, tensor in projector}, {}
    for name, (module, place) in LORAS.items():
        if (folder / name).is_dir():
            alphas[module], lora = read_peft(folder / name, place)
            tensors |= {f"{module}.{key}": tensor for key, tensor in lora.items()}
    return tensors, alphas


def read_original(path: Path) -> dict[str, Tensor]:
    """The trained tensors of a checkpoint of the original (a file, or DeepSpeed's folder).

    LoRA on Whisper's decoder is left out by name: it has never been part of the computation.
    """
    if path.is_dir():
        path = path / "mp_rank_00_model_states.pt"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there; name a checkpoint, or a folder from export")
    stored = dict(stored_tensors(path))
    stored = stored.get("module") or stored.get("state_dict") or stored
    tensors = {}
    for name, tensor in stored.items():
        if not name.startswith("speech_encoder.base_model.model.decoder."):
            name = name.replace("speech_encoder.base_model.model.encoder.", "speech_encoder.", 1)
            name = name.replace("llm.base_model.model.", "llm.", 1)
            tensors[name.replace(".default.weight", "")] = tensor
    return tensors


def import_trained(args: argparse.Namespace) -> LLaST:
    """A LLaST from what was trained elsewhere, every tensor of it in its place."""
    if (args.source / "projector.safetensors").is_file():
        tensors, alphas = read_exported(args.source)
        how = read_json(args.source / "use.json")
    else:
        tensors, alphas = read_original(args.source), {}
        how = {"template": "llama2", "window": "30s", "directions": ["paper"], "fingerprints": {}}
    asked = {"template": args.template, "window": args.window}
    how |= {name: value for name, value in asked.items() if value}
    directions = parse_directions(args.lang or ",".join(how["directions"]))
    how["directions"] = tuple("-".join(pair) for pair in directions)
    shape = {}
    for name, (module, _) in LORAS.items():
        part = name.removesuffix("-lora")
        As = [v for k, v in tensors.items() if k.startswith(module) and k.endswith("lora_A")]
        rank = shape[f"{part}_rank"] = len(As[0]) if As else 0
        # The original's files do not hold alpha; in its configurations it is half of the rank.
        shape[f"{part}_alpha"] = alphas.get(module, rank / 2)
    fingerprints = how.pop("fingerprints")
    config = LLaSTConfig(str(args.encoder), str(args.llm), dropout=0.0, **how, **shape)
    check_bases(config, fingerprints, args.source)  # merged ones would have their LoRA twice
    model = LLaST.fresh(config)
    model.fill_trained(tensors, args.source)
    return model


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Take a trained LLaST to other programs, or back.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    out = verbs.add_parser("export", help="merged Hugging Face folders, and adapters for peft")
    out.add_argument("model", type=Path, help="folder that train.py wrote")
    back = verbs.add_parser("import", help="the original's checkpoints, or a folder from export")
    back.add_argument("source", type=Path, help="checkpoint of the original, or exported folder")
    back.add_argument("--encoder", type=Path, required=True, help="the Whisper it was trained on")
    back.add_argument("--llm", type=Path, required=True, help="the Llama it was trained on")
    known = "; an exported folder knows"
    back.add_argument("--template", choices=TEMPLATES, help=f"its prompt [llama2{known}]")
    back.add_argument("--window", choices=WINDOWS, help=f"what its encoder was given [30s{known}]")
    back.add_argument("--lang", help=f"what it can translate, as fr or fr,en-de [paper{known}]")
    out.add_argument("--encoder", type=Path, help="where the encoder is now, if it has moved")
    out.add_argument("--llm", type=Path, help="where the LLM is now, if it has moved")
    for verb in (out, back):
        verb.add_argument("--out", type=Path, required=True, help="folder to write; must not exist")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    try:
        if args.out.exists():
            raise ValueError(f"{args.out} is there already; name another folder with --out")
        try:
            if args.verb == "export":
                export(LLaST.from_pretrained(args.model, args.encoder, args.llm), args.out)
            else:
                import_trained(args).save_pretrained(args.out)
        except BaseException:  # half of it could pass for the whole
            shutil.rmtree(args.out, ignore_errors=True)
            raise
    except (ValueError, OSError, SafetensorError) as error:
        print(f"convert.py: {error}", file=sys.stderr)
        return 2
    print(f"written to {args.out}: {', '.join(sorted(p.name for p in args.out.iterdir()))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
