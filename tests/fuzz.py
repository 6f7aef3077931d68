"""Run the commands on broken and hostile input files, and report every bad reaction.

    python tests/fuzz.py --seconds 600 --seed 1

A case is a small valid set of inputs in which one file was changed. A command runs on it in a child
process with limits on memory and time. The first cases are written by hand, the others are random
until the time is up. The same seed gives the same cases. Each finding is printed once, and the exit
code is 1 if there is any:

    traceback  an exception left main(), or the process died
    hang       more than 20 s
    memory     more than 1.5 GB of memory, or not enough with 4 GB of addresses
    outside    a file outside the output folder was written or changed
    code       code in the file was run
    silent     exit code 0, no message, and another result than that of the valid files
"""

import argparse
import contextlib
import importlib
import io
import json
import math
import os
import pickle
import random
import re
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import soundfile
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
sys.dont_write_bytecode = True

import formats
import toys
from data import write_table
from llast import LLaST
from tools.convert import export

PROGRAMS = {
    name.split(".")[-1]: importlib.import_module(name)
    for name in ("translate", "train", "tools.prepare", "tools.convert", "tools.plan",
                 "tools.evaluate")
}  # fmt: skip
torch.set_num_threads(1)  # a forked child does not have the threads of the parent, and waits
SECONDS, ADDRESSES, RESIDENT = 20, 4 << 30, 1500 << 20  # limits of a case; bytes


# ----------------------------------------------------------------------------- one case in a child


def report_side_effects(file: int, allowed: tuple[str, ...]):
    """Write a line to `file` for each write outside `allowed`, and for each program that starts."""
    moves = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.symlink")
    starts = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")
    busy = []  # not empty while the hook itself works

    def hook(event, values):
        if busy or event not in (*moves, *starts, "open", "pickle.find_class"):
            return
        busy.append(event)
        if event in moves or event == "open" and values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            folder = "."
            if event in ("os.remove", "os.mkdir", "os.rmdir") and values[-1] >= 0:
                folder = os.readlink(f"/proc/self/fd/{values[-1]}")
            for path in values[: 2 if event == "os.rename" else 1]:
                path = os.fsdecode(path) if isinstance(path, (str, bytes)) else os.devnull
                path = os.path.abspath(os.path.join(folder, path))
                if not path.startswith(allowed):
                    os.write(file, f"outside\t{path}\n".encode(errors="replace"))
        elif event in starts or values[0] in ("os", "posix", "builtins"):
            os.write(file, f"code\t{event} {values!r:.120}\n".encode(errors="replace"))
        busy.pop()

    sys.addaudithook(hook)


def limit_and_run(folder: Path, program: str, words: list[str]) -> dict:
    """In the child: run main() of a program with limits. -> what became of it"""
    os.chdir(folder)
    for number, name in ((0, os.devnull), (1, f"{folder}.out"), (2, f"{folder}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    effects = os.open(f"{folder}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESSES, ADDRESSES))
    resource.setrlimit(resource.RLIMIT_FSIZE, (512 << 20, 512 << 20))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    report_side_effects(effects, ("/dev/", "/proc/", f"{folder}/out", f"{folder}/model/scored."))
    sys.argv = [f"{program}.py", *words]
    result = {}
    try:
        result["code"] = PROGRAMS[program].main() or 0
    except SystemExit as error:
        result["code"] = error.code if isinstance(error.code, int) else 1
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [f for f in frames if Path(f.filename).parent in (ROOT, ROOT / "tools")]
        last = (ours or frames)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        result |= {
            "code": 1,
            "error": f"{type(error).__name__} at {place}",
            "text": f"{error!s:.200}",
        }
    sys.stdout.flush(), sys.stderr.flush()
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return result | {"resident": 1024 * max(usage.ru_maxrss for usage in used)}


def run_in_child(folder: Path, program: str, words: list[str]) -> dict:
    """Run a command with `folder` as its working directory. -> what became of it, and its output"""
    answer, to_parent = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()  # so that its own children can be ended with it
        with contextlib.suppress(BaseException):
            os.write(to_parent, json.dumps(limit_and_run(folder, program, words)).encode())
        os._exit(0)
    os.close(to_parent)
    ready, _, _ = select.select([answer], [], [], SECONDS)
    text = os.read(answer, 1 << 16) if ready else b""
    os.close(answer)
    result = {"hang": not ready} | (json.loads(text) if text else {})
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    for name in ("out", "err", "log"):
        file = Path(f"{folder}.{name}")
        result[name] = file.read_text(errors="replace")[:20_000] if file.exists() else ""
        file.unlink(missing_ok=True)
    return result


def state_of(root: Path, output: Path) -> dict:
    """Size and time of every file below `root`, without those below `output`."""
    state = {}
    for base, folders, files in os.walk(root):
        folders[:] = [name for name in folders if Path(base) / name != output]
        for name in files:
            info = os.lstat(os.path.join(base, name))
            state[os.path.join(base, name)] = info.st_size, info.st_mtime_ns
    return state


# -------------------------------------------------------------------------------- the valid inputs


def write_inputs(box: Path):
    """Write a small valid example of everything that the commands read."""
    whisper = toys.whisper_folder(box / "whisper", encoder_ffn_dim=96)
    llama = toys.llama_folder(box / "llama", intermediate_size=104)
    (llama / "added_tokens.json").write_text("{}")
    toys.save_model(box, box / "model")
    (box / "model" / "run.json").write_text('{"data": "corpus", "preset": "tiny", "seed": 0}')
    model = LLaST.from_pretrained(box / "model")
    torch.save({"module": formats.as_original(model)}, box / "epoch_1.pth")
    export(model, box / "exported")
    for base in (whisper, llama):
        shutil.rmtree(box / "exported" / base.name)
        weights = load_file(base / "model.safetensors")
        config = json.loads((base / "config.json").read_text())
        (box / f"{base.name}-bin").mkdir()
        formats.write_bin(weights, box / f"{base.name}-bin", config, shards=2)
        if base == whisper:
            formats.write_openai(weights, box, config)  # small.pt
        else:
            (box / "meta").mkdir()
            formats.write_meta(weights, box / "meta", config, shards=2)
    time_axis = torch.arange(16_000) / 16_000
    chirp = (0.3 * torch.sin(2 * math.pi * (200 + 300 * time_axis) * time_axis)).numpy()
    (box / "audio").mkdir()
    for name, subtype in AUDIO.items():
        soundfile.write(box / "audio" / name, chirp, 16_000, subtype=subtype,
                        format="OGG" if name.endswith("opus") else None)  # fmt: skip
    (box / "list.txt").write_text("audio/a.wav\naudio/a.flac\n")
    write_corpora(box, chirp)


def write_corpora(box: Path, chirp):
    """The same eight clips as a prepared corpus and in each layout that prepare.py reads."""
    names = [f"c{i}.wav" for i in range(8)]
    splits = ["train"] * 4 + ["dev"] * 2 + ["test"] * 2
    rows = [
        (name, f"La clé numéro {i}.", f"Key number {i}.", split)
        for i, (name, split) in enumerate(zip(names, splits, strict=True))
    ]
    toys.write_corpus(box / "corpus", rows)
    clips = box / "corpus" / "fr" / "clips"
    for i, name in enumerate(names):
        soundfile.write(clips / name, chirp[: 4000 + 500 * i], 16_000)
    table = [(name, translation, text, "fr", split) for name, text, translation, split in rows]
    write_table(box / "table.tsv", ("path", "translation", "sentence", "lang", "split"), table)
    (box / "cv").mkdir()
    shutil.copytree(clips, box / "cv" / "clips")
    write_table(box / "cv" / "validated.tsv", ("path", "sentence"), [row[:2] for row in rows])
    covost = [(name, translation, split) for name, _, translation, split in rows]
    write_table(box / "cv" / "covost_v2.fr_en.tsv", ("path", "translation", "split"), covost)
    for column, language in ((1, "fr_fr"), (2, "en_us")):
        for split in ("train", "dev", "test"):
            folder = box / "fleurs" / language / "audio" / split
            folder.mkdir(parents=True)
            lines = []
            for i, row in enumerate(rows):
                if row[3] == split:
                    shutil.copy(clips / row[0], folder)
                    lines.append(f"{i}\t{row[0]}\t{row[column]}\tx\tx\t16000\tMALE\n")
            (box / "fleurs" / language / f"{split}.tsv").write_text("".join(lines))


AUDIO = {
    "a.wav": "PCM_16", "f.wav": "FLOAT", "u.wav": "ULAW", "g.wav": "MS_ADPCM", "a.flac": "PCM_16",
    "a.ogg": "VORBIS", "a.opus": "OPUS", "a.mp3": "MPEG_LAYER_III", "a.aiff": "PCM_16",
    "a.w64": "PCM_16", "a.caf": "ALAC_16", "a.au": "PCM_16",
}  # fmt: skip

BASES = "--encoder whisper --llm llama"
SHORT = "--model model --beams 2 --max-new-tokens 4"
COMMANDS = {
    "translate": f"translate {SHORT} audio/a.wav",
    "one file": f"translate {SHORT} FILE",
    "list": f"translate {SHORT} list.txt",
    "test": f"evaluate {SHORT} --test fr",
    "train": f"train {BASES} --data corpus --lang fr --epochs 1 --out out/run",
    "plan": f"plan tiny {BASES} --data corpus --lang fr",
    "export": "convert export model --out out/exported",
    "import": f"convert import exported {BASES} --out out/model",
    "original": f"convert import epoch_1.pth {BASES} --out out/model",
    "openai": "convert whisper small.pt --out out/whisper",
    "whisper-bin": "convert whisper whisper-bin --out out/whisper",
    "llama-bin": "convert llama llama-bin --out out/llama",
    "meta": "convert llama meta --out out/llama",
    "table": "prepare table --table table.tsv --audio corpus/fr/clips --lang fr --out out/corpus",
    "covost2": "prepare covost2 --common-voice cv --covost cv --lang fr --out out/corpus",
    "fleurs": "prepare fleurs --fleurs fleurs --lang fr --out out/corpus",
}
CONFIGS = ["whisper/config.json", "llama/config.json"]
WEIGHTS = ["whisper/model.safetensors", "llama/model.safetensors"]
ADAPTERS = ["exported/encoder-lora", "exported/llm-lora"]
SHARDS = "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"

# name: (kind of change, files to change, command, must the command notice every change?)
TARGETS = {
    "table-test": ("table", ["corpus/fr/fr-en.tsv"], "test", False),
    "table-train": ("table", ["corpus/fr/fr-en.tsv"], "train", False),
    "table-own": ("table", ["table.tsv"], "table", False),
    "table-covost2": ("table", ["cv/validated.tsv", "cv/covost_v2.fr_en.tsv"], "covost2", False),
    "table-fleurs": ("table", ["fleurs/fr_fr/train.tsv", "fleurs/en_us/test.tsv"], "fleurs", False),
    "list": ("table", ["list.txt"], "list", False),
    "config": ("json", CONFIGS, "original", False),
    "config-plan": ("json", CONFIGS, "plan", False),
    "added-tokens": ("json", ["llama/added_tokens.json"], "original", False),
    "base": ("bytes", [*WEIGHTS, "llama/tokenizer.model", *CONFIGS], "translate", True),
    "base-export": ("safetensors", WEIGHTS, "export", False),
    "safetensors": ("safetensors", WEIGHTS, "original", False),
    "trained": ("safetensors", ["model/llast.safetensors"], "translate", True),
    "tokenizer": ("bytes", ["llama/tokenizer.model"], "original", False),
    "audio": ("bytes", [f"audio/{name}" for name in AUDIO], "one file", False),
    "clip": ("bytes", ["corpus/fr/clips/c1.wav"], "train", False),
    "llast-json": ("json", ["model/llast.json"], "translate", True),
    "run-json": ("json", ["model/run.json"], "test", False),
    "adapter-json": ("json", [f"{x}/adapter_config.json" for x in ADAPTERS], "import", False),
    "adapter": ("safetensors", [f"{x}/adapter_model.safetensors" for x in ADAPTERS], "import",
                False),
    "projector": ("safetensors", ["exported/projector.safetensors"], "import", False),
    "use-json": ("json", ["exported/use.json"], "import", False),
    "original": ("bytes", ["epoch_1.pth"], "original", False),
    "openai": ("bytes", ["small.pt"], "openai", False),
    "whisper-bin": ("bytes", [f"whisper-bin/{SHARDS[0]}"], "whisper-bin", False),
    "llama-bin": ("bytes", [f"llama-bin/{SHARDS[0]}"], "llama-bin", False),
    "bin-index": ("json", [f"llama-bin/{SHARDS[1]}", "llama-bin/config.json"], "llama-bin", False),
    "meta": ("bytes", ["meta/consolidated.00.pth"], "meta", False),
    "params-json": ("json", ["meta/params.json"], "meta", False),
}  # fmt: skip


# --------------------------------------------------------------------------------- random changes

# A function takes the bytes of a file and a random generator, and returns the changed bytes and
# what was changed.

VALUES = [
    None, True, False, -1, 0, 1, 3, 7, 2**31, 2**63, 10**9, 10**30, 0.5, -0.0, 1e308, math.inf,
    -math.inf, math.nan, "", "x", "16", "../../x", "/dev/zero", "\x00", "\ud800", "a" * 5000, [],
    {}, [1], [[]], {"a": 1}, [None], ["fr-en", "fr-en"], ["xx"], 1300,
]  # fmt: skip
CELLS = [
    "", " ", ".", "..", "/", "../../outside/canary.txt", "/etc/passwd", "a\x00b", '"', '"a', "\\",
    "\\\\", "\\\t", "\\\n", "\r", "c0.wav", "c0.wav/", "./c0.wav", "clips", "-", "a" * 300,
    "a/" * 200, "é" * 200, "\u2028", "\ufeff", "NaN", "REMOVE", "train", "test", "dev",
    "train_covost", "x" * 70_000, "\U0001f600", "a\u0301", "<s>", "</s> <audio>", "{instruction}",
    "%s", " c1.wav", "\u200b",
]  # fmt: skip


def paths_in(tree, path=()) -> Iterator[tuple]:
    """The path of every value inside a JSON value: its keys and positions."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from paths_in(value, (*path, key))


def with_value(data: bytes, path: tuple, *value) -> bytes:
    """JSON with another value at the path, or with none."""
    tree = parent = json.loads(data)
    for key in path[:-1]:
        parent = parent[key]
    if value:
        parent[path[-1]] = value[0]
    else:
        del parent[path[-1]]
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def change_json(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    tree = json.loads(data)
    if not tree or not isinstance(tree, (dict, list)) or rng.random() < 0.03:
        return json.dumps(rng.choice(VALUES)).encode(), "another value as the whole file"
    if rng.random() < 0.07 and isinstance(tree, dict):
        return json.dumps(tree | {"unknown": 1}).encode(), "an unknown key"
    path = rng.choice(list(paths_in(tree)))
    name = ".".join(map(str, path))
    if rng.random() < 0.15:
        return with_value(data, path), f"without {name}"
    value = rng.choice(VALUES)
    return with_value(data, path, value), f"{name} = {value!r:.40}"


def change_bytes(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    data = bytearray(data or b"x")
    at = rng.randrange(min(len(data), 256) if rng.random() < 0.5 else len(data))
    kind = rng.choice(("bit", "bit", "cut", "number", "insert", "delete", "block"))
    if kind == "bit":
        data[at] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del data[at:]
    elif kind == "number":
        width = rng.choice((1, 2, 4, 8))
        value = rng.choice((0, 1, 0x7F, 0x80, 0xFF, 2**31 - 1, 2**32 - 1, 2**63 - 1, 2**64 - 1))
        order = rng.choice(("little", "big"))
        data[at : at + width] = (value % (1 << 8 * width)).to_bytes(width, order)
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randrange(1, 40))
    elif kind == "delete":
        del data[at : at + rng.randrange(1, 64)]
    else:
        size = rng.randrange(1, 2000)
        data[at : at + size] = bytes(size) if rng.random() < 0.5 else data[:size]
    return bytes(data), f"{kind} at {at}"


def change_table(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    try:
        lines = [line.split("\t") for line in data.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        return change_bytes(data, rng)
    chance, row = rng.random(), rng.choice(lines)
    i, end, code = rng.randrange(len(row)), "\n", "utf-8"
    if chance < 0.2:
        return change_bytes(data, rng)
    if chance < 0.65:
        row[i] = rng.choice(CELLS)
        change = f"a cell = {row[i]!r:.30}"
    elif chance < 0.72:
        row.insert(i, rng.choice(CELLS))
        change = "one more cell"
    elif chance < 0.79:
        row.pop(i)
        change = "one cell less"
    elif chance < 0.86:
        lines.append(list(row))
        change = "a row twice"
    elif chance < 0.92:
        rng.shuffle(lines)
        change = "rows in another order"
    else:
        end, code = rng.choice((("\r\n", "utf-8"), ("\r", "utf-8"), ("\n", "utf-16")))
        change = f"lines end with {end!r} in {code}"
    return end.join("\t".join(row) for row in lines).encode(code, "surrogatepass"), change


def split_safetensors(data: bytes) -> tuple[dict, bytes]:
    """Header and numbers of a safetensors file."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join_safetensors(header, body: bytes, size: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + body


def change_safetensors(data: bytes, rng: random.Random) -> tuple[bytes, str]:
    try:
        header, body = split_safetensors(data)
        name = rng.choice([name for name in header if name != "__metadata__"])
        about, chance = header[name], rng.random()
        dtype, shape = about["dtype"], about["shape"]
    except (ValueError, IndexError, TypeError, KeyError):
        return change_bytes(data, rng)
    if chance < 0.25 or not body:
        return change_bytes(data, rng)
    if chance < 0.5:
        at = rng.randrange(len(body))
        body = body[:at] + bytes([body[at] ^ 1 << rng.randrange(8)]) + body[at + 1 :]
        return join_safetensors(header, body), f"a bit of number {at}"
    kind = rng.choice(("dtype", "shape", "data_offsets", "name", "gone", "metadata", "size"))
    if kind == "dtype":
        others = ("I64", "F64", "BOOL", "U8", "F8_E4M3", "C64", "I32", "U32", "X", 5, None)
        about["dtype"] = rng.choice([other for other in others if other != dtype])
    elif kind == "shape":
        others = ([2**62, 4], [-1], [], [0], "x", [1.5], [2**32, 2**32])
        about["shape"] = rng.choice((*others, shape[::-1] if isinstance(shape, list) else None))
    elif kind == "data_offsets":
        others = ([0, 2**63], [5, 1], [0, 0], [-1, 4], [0], "x", [2**64, 2**64])
        about["data_offsets"] = rng.choice(others)
    elif kind == "name":
        header[f"{name}x"] = header.pop(name)
    elif kind == "gone":
        header.pop(name)
    elif kind == "metadata":
        header["__metadata__"] = rng.choice(({"a": 1}, [], "x", {"a": "b" * 100_000}))
    sizes = (0, 1, 2**63, 2**64 - 1, 100_000_001, len(data))
    size = rng.choice(sizes) if kind == "size" else None
    return join_safetensors(header, body, size), f"{kind} of {name}: {header.get(name)!r:.80}"


CHANGES = {
    "table": change_table,
    "json": change_json,
    "bytes": change_bytes,
    "safetensors": change_safetensors,
}


# -------------------------------------------------------------------------- changes written by hand

DEEP = b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}"


class Call:
    """In a pickle: call a function when the file is opened."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def hostile_pickles(box: Path) -> Iterator[tuple[bytes, str]]:
    """Files of weights that are something else."""
    mark = str(box / "outside" / "ran")
    storage = torch.storage.TypedStorage(
        wrap_storage=torch.zeros(4).untyped_storage(), dtype=torch.float32, _internal=True
    )
    calls = {
        "os.system": Call(os.system, f"touch {mark}"),
        "eval": Call(eval, f"open({mark!r}, 'w')"),
        "open": Call(open, mark, "w"),
        "2**40 numbers": Call(
            torch._utils._rebuild_tensor_v2, storage, 0, (2**40,), (0,), False, {}
        ),
    }
    ones, small = torch.ones(2), {"a": torch.zeros(1)}
    sparse = {"projector.model.0.weight": torch.eye(36)[:, :24].to_sparse()}
    values = {
        "ints": {"a": 1}, "a list": [1, 2], "a tensor": ones, "None": None, "text": "x",
        "names of type int": {1: ones}, "a dictionary in it": {"a": small},
        "module = 5": {"module": 5}, "module = tensor": {"module": ones},
        "a sparse tensor": {"module": sparse}, "a tensor without numbers": ones.to("meta"),
        "dims of text": {"dims": {"n_mels": "x"}, "model_state_dict": {}},
        "dims = 3": {"dims": 3, "model_state_dict": 4},
        "a name with a line break": {"layers.0.\n": ones, "tok_embeddings.weight": ones},
    }  # fmt: skip
    for what, value in [(w, {"a": call}) for w, call in calls.items()] + list(values.items()):
        for zipped in (True, False):
            file = io.BytesIO()
            with contextlib.suppress(Exception):  # some values cannot be written in the old way
                torch.save(value, file, _use_new_zipfile_serialization=zipped)
                yield file.getvalue(), f"{'new' if zipped else 'old'} file with {what}"
        with contextlib.suppress(Exception):
            yield pickle.dumps(value), f"bare pickle with {what}"
    yield b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".", "100,000 lists in lists"
    yield b"\x80\x04\x8e" + struct.pack("<Q", 2**31) + b".", "text of 2**31 bytes"
    yield b"\x80\x02]r\xff\xff\xff\x7f.", "memo index 2**31"
    yield b"\x80\x02K\x00K\x01\x86" + b"2\x86" * 60 + b".", "60 doubled tuples"
    yield bytes.fromhex("504b0506") + bytes(18), "a zip without files"
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        with archive.open("archive/data.pkl", "w", force_zip64=True) as entry:
            entry.write(b"\x80\x02}q\x00")
            for _ in range(300):
                entry.write(b"N0" * (5 << 20))
            entry.write(b".")
        archive.writestr("archive/version", "3\n")
    yield file.getvalue(), "a zip bomb"


def hostile_json(data: bytes) -> Iterator[tuple[bytes, str]]:
    yield from (
        (DEEP, "200,000 brackets"), (b"", "empty"), (b"[]", "a list"), (b"null", "null"),
        (b"\xef\xbb\xbf{}", "a byte order mark"), (b"\xff\xfe{\x00}\x00", "UTF-16"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "a number of 5,000 digits"), (b"{}", "an empty object"),
    )  # fmt: skip
    for path in paths_in(json.loads(data)):
        name = ".".join(map(str, path))
        yield with_value(data, path), f"without {name}"
        for value in (None, "x", -1, 10**9, [], {}, math.nan):
            yield with_value(data, path, value), f"{name} = {value!r}"


def hostile_safetensors(data: bytes) -> Iterator[tuple[bytes, str]]:
    header, body = split_safetensors(data)
    start = len(data) - len(body)
    for size in (0, 2**63, 2**64 - 1, len(data), 99_999_999):
        yield join_safetensors(data[8:start], body, size), f"header length {size}"
    yield join_safetensors(DEEP, body), "a header of 200,000 brackets"
    name = next(name for name in header if name != "__metadata__")
    twice = json.dumps(header)[:-1] + f', "{name}": {json.dumps(header[name])}}}'
    yield join_safetensors(twice.encode(), body), "a name twice"
    low, high = header[name]["data_offsets"]
    for value in (math.nan, math.inf):
        changed = body[:low] + struct.pack("<f", value) + body[low + 4 :]
        yield join_safetensors(header, changed), f"one number is {value}"
    zeros = body[:low] + bytes(high - low) + body[high:]
    yield join_safetensors(header, zeros), "a tensor of zeros"
    for dtype in ("I32", "U32"):
        for other in header.keys() - {"__metadata__"}:
            header[other]["dtype"] = dtype
        yield join_safetensors(header, body), f"every dtype is {dtype}"
    for end in (0, 7, 8, start - 1, start, start + 1, len(data) - 1):
        yield data[:end], f"cut at {end}"
    yield data + b"more", "four bytes more"


def hostile_tables(data: bytes) -> Iterator[tuple[bytes, str]]:
    text = data.decode()
    words = text.replace("Key number 1.", "key " * 20_000).replace("clé numéro 1", "clé " * 20_000)
    yield from (
        (b"", "empty"), (b"\n", "one empty line"), (text.replace("\n", "\r").encode(), "only CR"),
        (text.encode("utf-16"), "UTF-16"), (data + b"\xff\n", "a byte that is not UTF-8"),
        (data + b"\x00\x00\n", "NUL"), (data + b"x" * 10_000_000 + b"\n", "a line of 10 MB"),
        (words.encode(), "a text of 20,000 words"), (b"\xef\xbb\xbf" + data, "a byte order mark"),
        (data.replace(b"\n", b"\r\n"), "CRLF"),
    )  # fmt: skip
    for path in ("../../../outside/canary.wav", ".", "c1.wav/", "é" * 200 + ".wav", "loop.wav"):
        yield text.replace("c1.wav", path).encode(), f"the path {path:.30}"


def wav(rate: int, frames: int, channels: int = 1, size: int | None = None) -> bytes:
    """A silent 16-bit file. `size` is the number of bytes that the header states."""
    data = bytes(frames * channels * 2)
    size, cut = len(data) if size is None else size, 2**32
    form = struct.pack(
        "<HHIIHH", 1, channels, rate % cut, rate * channels * 2 % cut, channels * 2 % 2**16, 16
    )
    head = b"WAVEfmt " + struct.pack("<I", 16) + form + b"data" + struct.pack("<I", size % cut)
    return b"RIFF" + struct.pack("<I", (36 + size) % cut) + head + data


def hostile_audio() -> Iterator[tuple[bytes, str]]:
    yield wav(1, 100_000), "28 hours: a rate of 1 Hz"
    for rate in (0, 7, 44_101, 384_000, 1_000_003, 10_000_019, 2**31 - 1, 2**32 - 1):
        yield wav(rate, 16_000), f"a rate of {rate} Hz"
    for channels in (1024, 65_535):
        yield wav(16_000, 100, channels), f"{channels} channels"
    yield wav(16_000, 100, size=0xFFFFFFF0), "a header that states 4 GB"
    yield wav(16_000, 1), "one sample"
    yield wav(16_000, 0), "no sample"
    yield struct.pack("<4sI4s", b"RIFF", 4, b"WAVE"), "only a header"


def cases_by_hand(box: Path) -> Iterator[tuple[str, str, bytes, str]]:
    """(target, file, its changed bytes, what was changed)"""
    for data, what in hostile_pickles(box):
        for target in ("original", "openai", "whisper-bin", "llama-bin", "meta"):
            yield target, TARGETS[target][1][0], data, what
    by_kind = {"json": hostile_json, "safetensors": hostile_safetensors, "table": hostile_tables}
    for target, (kind, files, *_) in TARGETS.items():
        for file in files if kind in by_kind else ():
            for data, what in by_kind[kind]((box / file).read_bytes()):
                yield target, file, data, what
    for data, what in hostile_audio():
        yield "audio", "audio/a.wav", data, what
        yield "clip", "corpus/fr/clips/c1.wav", data, what


# ------------------------------------------------------------------------------------- the fuzzer


class Fuzzer:
    def __init__(self, area: Path, seed: int):
        self.area, self.box, self.seed = area, area / "box", seed
        self.box.mkdir()
        write_inputs(self.box)
        (self.box / "outside").mkdir()
        (self.box / "outside" / "canary.txt").write_text("must stay")
        os.symlink("loop.wav", self.box / "corpus" / "fr" / "clips" / "loop.wav")
        self.findings, self.n_cases = Counter(), 0
        self.valid = {}  # command -> what it prints for the valid inputs

    def run_case(self, target: str, file: str, data: bytes | None) -> tuple[dict, set]:
        """Run a target's command with one file changed. -> result, findings as (kind, text)"""
        _, _, command, must_notice = TARGETS[target]
        folder = self.area / "case"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.box, folder, symlinks=True)
        if data is not None:
            (folder / file).write_bytes(data)
        before = state_of(self.area, folder / "out")
        program, *words = COMMANDS[command].split()
        result = run_in_child(folder, program, [file if w == "FILE" else w for w in words])
        after = state_of(self.area, folder / "out")
        findings = set(self.judge(result))
        for path in before.keys() | after.keys():
            if before.get(path) != after.get(path) and "/model/scored." not in path:
                findings.add(("outside", os.path.relpath(path, self.area)))
        if (self.box / "outside" / "ran").exists():
            (self.box / "outside" / "ran").unlink()
            findings.add(("code", "code in the file was run"))
        if data is None:
            self.valid[command] = result["out"]
        elif must_notice and result.get("code") == 0 and result["out"] != self.valid[command]:
            findings.add(("silent", "another result without a message"))
        self.n_cases += 1
        return result, findings

    def judge(self, result: dict) -> Iterator[tuple[str, str]]:
        """The findings in what became of a command."""
        if result["hang"]:
            yield "hang", f"more than {SECONDS} s"
        elif "code" not in result:
            yield "traceback", "the process died"
        elif "error" in result:
            no_memory = "MemoryError" in result["error"] or "alloc" in result["text"]
            yield "memory" if no_memory else "traceback", result["error"]
        elif "Traceback" in result["err"]:
            yield "traceback", "printed: " + result["err"].strip().splitlines()[-1][:80]
        elif re.search("can't allocate|out of memory", result["err"]):
            yield "memory", "4 GB of addresses were not enough"
        if result.get("resident", 0) > RESIDENT:
            yield "memory", f"more than {RESIDENT >> 20} MiB"
        for line in result["log"].splitlines():
            kind, text = line.split("\t", 1)
            yield kind, text.replace(str(self.area), "")

    def change(self, target: str, file: str, seeds: list[int]) -> tuple[bytes, str]:
        """The valid file after one change for each seed."""
        data, changes = (self.box / file).read_bytes(), []
        for seed in seeds:
            data, what = CHANGES[TARGETS[target][0]](data, random.Random(seed))
            changes.append(what)
        return data, "; ".join(changes)

    def fewest(self, target: str, file: str, seeds: list[int], finding: tuple) -> list[int]:
        """Leave out the changes that the finding does not need."""
        for seed in list(seeds):
            fewer = [other for other in seeds if other != seed]
            if fewer:
                _, findings = self.run_case(target, file, self.change(target, file, fewer)[0])
                seeds = fewer if finding in findings else seeds
        return seeds

    def report(self, target: str, file: str, what: str, result: dict, findings: set):
        for kind, text in sorted(findings):
            self.findings[target, kind, text] += 1
            if self.findings[target, kind, text] == 1:
                message = f" ({result['text']})" if "text" in result else ""
                print(f"{kind}: {target}: {file}: {what} -> {text}{message}", flush=True)

    def check_valid(self, targets: list[str]):
        """Without a change every command must work, or nothing that follows means anything."""
        for target in targets:
            result, findings = self.run_case(target, TARGETS[target][1][0], None)
            if findings or result.get("code") != 0:
                print(f"{target} fails with valid files: {findings} {result}", flush=True)
                self.findings[target, "valid", ""] += 1

    def run(self, seconds: float, targets: list[str], by_hand: bool):
        end = time.monotonic() + seconds
        self.check_valid(targets)
        cases = [case for case in cases_by_hand(self.box) if by_hand and case[0] in targets]
        random.Random(self.seed).shuffle(cases)  # a short run then has some of every kind
        n_by_hand = 0
        for target, file, data, what in cases:
            if time.monotonic() > end - 0.35 * seconds:
                break
            self.report(target, file, what, *self.run_case(target, file, data))
            n_by_hand += 1
        rng = random.Random(f"fuzz {self.seed}")
        while time.monotonic() < end:
            target = rng.choice(targets)
            file = rng.choice(TARGETS[target][1])
            seeds = [rng.getrandbits(32) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
            data, what = self.change(target, file, seeds)
            result, findings = self.run_case(target, file, data)
            new = [f for f in findings if (target, *f) not in self.findings]
            if new and len(seeds) > 1:
                what = self.change(target, file, self.fewest(target, file, seeds, new[0]))[1]
            self.report(target, file, what, result, findings)
        print(
            f"{self.n_cases} cases, {n_by_hand} of {len(cases)} by hand; "
            f"{len(self.findings)} findings"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600, help="time for all cases [600]")
    parser.add_argument("--seed", type=int, default=0, help="of the random cases [0]")
    parser.add_argument("--only", help="targets with commas: " + ",".join(TARGETS))
    parser.add_argument("--random", action="store_true", help="no cases written by hand")
    args = parser.parse_args()
    targets = args.only.split(",") if args.only else list(TARGETS)
    translate = PROGRAMS["translate"]
    search = translate.beam_search
    translate.beam_search = lambda llm, prompts, ends, options: search(
        llm, prompts, ends, replace(options, max_new_tokens=min(4, options.max_new_tokens))
    )  # made-up weights never end an answer, and train.py has no option for its length
    with tempfile.TemporaryDirectory(prefix="fuzz-") as area:
        fuzzer = Fuzzer(Path(area), args.seed)
        fuzzer.run(args.seconds, targets, not args.random)
    return 1 if fuzzer.findings else 0


if __name__ == "__main__":
    sys.exit(main())
