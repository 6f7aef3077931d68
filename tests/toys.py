"""Tiny checkpoints with made-up weights, in the folder layout of real ones."""

import json
import shutil
import threading
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import soundfile
import torch
from safetensors.torch import load_file, save_file

from data import read_table, write_table
from llama import Llama, LlamaConfig
from llast import LLaST, LLaSTConfig
from whisper_encoder import WhisperConfig, WhisperEncoder

TINY = Path(__file__).parents[1] / "tiny"

# All sizes differ, so that no shape is right by coincidence.
WHISPER = dict(
    num_mel_bins=80, d_model=24, encoder_layers=2, encoder_attention_heads=3, encoder_ffn_dim=40,
    max_source_positions=1500,
)  # fmt: skip
LLAMA = dict(
    hidden_size=36, intermediate_size=52, num_hidden_layers=2, num_attention_heads=6,
    num_key_value_heads=3, head_dim=6, vocab_size=1300, rms_norm_eps=1e-5, rope_theta=10000.0,
    tie_word_embeddings=False, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def llama_config(**changes) -> LlamaConfig:
    sizes = LLAMA | changes
    return LlamaConfig(**{k: v for k, v in sizes.items() if k in LlamaConfig.__dataclass_fields__})


def made_up(name: str, shape, scale: float = 0.3) -> torch.Tensor:
    """Numbers that depend only on the name, the same with every library and version."""
    n = torch.Size(shape).numel()
    step = 1 + zlib.crc32(name.encode()) % 9973 / 1000
    wave = torch.sin(torch.arange(1, n + 1, dtype=torch.float64) ** 2 * step).reshape(shape)
    return (wave * scale + (1 if "norm" in name and name.endswith("weight") else 0)).float()


def fill(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Give a module made-up weights and return them by name."""
    weights = {name: made_up(name, p.shape) for name, p in module.state_dict().items()}
    module.load_state_dict(weights)
    return weights


def whisper_folder(folder: Path, **changes) -> Path:
    """A Whisper folder like the public ones: names start with `model.`, and it has a decoder."""
    folder.mkdir(parents=True)
    config = WHISPER | changes
    encoder = WhisperEncoder(WhisperConfig(**config))
    weights = {f"model.encoder.{name}": tensor for name, tensor in fill(encoder).items()}
    weights["model.decoder.layer_norm.weight"] = torch.ones(config["d_model"])
    weights["proj_out.weight"] = torch.ones(7, config["d_model"])
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "whisper"}))
    return folder


def llama_folder(folder: Path, **changes) -> Path:
    """A Llama folder with the tokenizer of the embedded model."""
    folder.mkdir(parents=True)
    config = LLAMA | changes
    llama = Llama(llama_config(**changes))
    weights = fill(llama)
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    shutil.copy(TINY / "llama" / "tokenizer.model", folder)
    return folder


def save_model(made: Path, folder: Path, directions=("fr-en",)):
    config = LLaSTConfig(
        encoder=str(made / "whisper"), llm=str(made / "llama"), template="llama2", window="clip",
        encoder_rank=2, encoder_alpha=4.0, llm_rank=2, llm_alpha=4.0, dropout=0.5,
        directions=directions,
    )  # fmt: skip
    model = LLaST.fresh(config)
    chance = torch.Generator().manual_seed(1)
    for tensor in model.trained().values():
        tensor.normal_(std=0.3, generator=chance)
    model.save_pretrained(folder)


def good(clips: Path) -> list[Path]:
    return sorted(clips.glob("good*.wav"), reverse=True)  # not in the order of their lengths


def shard(folder: Path, save=save_file, stem: str = "model", suffix: str = "safetensors") -> Path:
    """Divide the model.safetensors of a folder into two files and their index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    half = len(names) // 2
    file_of = {}
    for i, part in enumerate((names[:half], names[half:])):
        save(
            {name: weights[name] for name in part}, folder / f"{stem}-0000{i + 1}-of-00002.{suffix}"
        )
        file_of |= dict.fromkeys(part, f"{stem}-0000{i + 1}-of-00002.{suffix}")
    index = json.dumps({"weight_map": file_of})
    (folder / f"{stem}.{suffix}.index.json").write_text(index)
    return folder


# Ways to make one tensor of a weight file wrong, by the words of the error.
FAULTS = {
    "missing": lambda weights, name: weights.pop(name),
    "unexpected": lambda weights, name: weights.update({f"{name}_extra": torch.ones(3)}),
    "other shape or type": lambda weights, name: weights.update({name: weights[name][:-1].clone()}),
}
INTEGERS = {
    "(other shape or type)": lambda weights, name: weights.update(
        {name: weights[name].view(torch.int32)}
    ),
}


def resident() -> int:
    """Bytes of memory of this process, without those of mapped files. Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) * 1024


@contextmanager
def peak_memory():
    """Measure a block. The value is a function: bytes at the peak above those at the start."""
    peak, stop = [start := resident()], threading.Event()

    def watch():
        while not stop.is_set():
            peak.append(resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield lambda: max(peak) - start
    finally:
        stop.set()
        watcher.join()


def tone(hertz: float, rate: int, seconds: float = 0.2) -> np.ndarray:
    return np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path: Path, samples, rate: int = 16000, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.asarray(samples, dtype=np.float32), rate, **options)
    return path


def write_corpus(root: Path, rows: list[tuple], direction: str = "fr-en") -> Path:
    """Write the table of a corpus: path, sentence, translation, split and perhaps seconds."""
    columns = ("path", "sentence", "translation", "split", "seconds")[: len(rows[0]) if rows else 4]
    table = root / direction.split("-")[0] / f"{direction}.tsv"
    (table.parent / "clips").mkdir(parents=True, exist_ok=True)
    write_table(table, columns, rows)
    return table


def small_corpus(root: Path, languages, sizes) -> Path:
    """The first clips of included corpora, and two toy models. sizes: clips of train, dev, test."""
    for language in languages:
        folder = root / language
        folder.mkdir(parents=True)
        (folder / "clips").symlink_to(TINY / "corpus" / language / "clips")
        table = TINY / "corpus" / language / f"{language}-en.tsv"
        columns = "path", "sentence", "translation", "split", "seconds"
        lines = [[row[name] for name in columns] for _, row in read_table(table, columns)]
        kept = [
            line
            for split, n in zip(("train", "dev", "test"), sizes, strict=True)
            for line in [line for line in lines if line[3] == split][:n]
        ]
        write_corpus(root, kept, f"{language}-en")
    whisper_folder(root / "whisper", encoder_layers=1)
    llama_folder(root / "llama", num_hidden_layers=1)
    return root


def run_results(out: Path) -> tuple:
    """What a run of train.py wrote, without times: log, weights and test translations."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    times = ("seconds", "clips_per_second")
    log = [{k: v for k, v in line.items() if k not in times} for line in lines]
    weights = {name: t.tolist() for name, t in load_file(out / "llast.safetensors").items()}
    return log, weights, (out / "test.fr-en.tsv").read_text()
