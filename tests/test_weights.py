"""Every layout of public weights: the same model comes out, or nothing does."""

import json
import re
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llama import Llama, LlamaConfig, rotary_angles, rotate
from toys import llama_folder, made_up, whisper_folder
from whisper_encoder import WhisperEncoder

SMALL = dict(encoder_layers=1, max_source_positions=8)
WHISPER_SIZES = {"80 mels": SMALL, "128 mels": SMALL | {"num_mel_bins": 128}}
ONE_LAYER = dict(num_hidden_layers=1, intermediate_size=104, vocab_size=68)
LLAMA_SIZES = {
    "MHA": ONE_LAYER | {"num_key_value_heads": 6},
    "GQA": ONE_LAYER | {"num_key_value_heads": 2},
    "tied": ONE_LAYER | {"tie_word_embeddings": True},
}

# ------------------------------------------------------------------------------ writing each layout


def split(weights: dict) -> list[dict]:
    names = sorted(weights)
    half = len(names) // 2
    return [{name: weights[name] for name in part} for part in (names[:half], names[half:])]


def hf(weights: dict, folder: Path, config: dict, shards: int, kind: str):
    """A Hugging Face folder: model.safetensors or pytorch_model.bin, whole or in shards."""
    (folder / "config.json").write_text(json.dumps(config))
    save = save_file if kind == "safetensors" else torch.save
    stem = "model" if kind == "safetensors" else "pytorch_model"
    if shards == 1:
        save(weights, folder / f"{stem}.{kind}")
        return
    where = {}
    for i, part in enumerate(split(weights)):
        save(part, folder / f"{stem}-{i}.{kind}")
        where |= dict.fromkeys(part, f"{stem}-{i}.{kind}")
    (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": where}))


def openai(weights: dict, folder: Path, config: dict):
    """OpenAI's file, its names written down here a second time."""
    theirs = {
        r"model\.": "",
        r"layers\.(\d+)\.": r"blocks.\1.",
        r"self_attn_layer_norm": "attn_ln",
        r"self_attn\.q_proj": "attn.query",
        r"self_attn\.k_proj": "attn.key",
        r"self_attn\.v_proj": "attn.value",
        r"self_attn\.out_proj": "attn.out",
        r"fc1": "mlp.0",
        r"fc2": "mlp.2",
        r"final_layer_norm": "mlp_ln",
        r"encoder\.layer_norm": "encoder.ln_post",
        r"encoder\.embed_positions\.weight": "encoder.positional_embedding",
    }
    state = {}
    for name, tensor in weights.items():
        for ours, other in theirs.items():
            name = re.sub(ours, other, name)
        state[name] = tensor
    state.pop("proj_out.weight", None)
    dims = dict(
        n_mels=config["num_mel_bins"], n_audio_ctx=config["max_source_positions"],
        n_audio_state=config["d_model"], n_audio_head=config["encoder_attention_heads"],
        n_audio_layer=config["encoder_layers"], n_vocab=7, n_text_ctx=3, n_text_state=24,
        n_text_head=3, n_text_layer=1,
    )  # fmt: skip
    torch.save({"dims": dims, "model_state_dict": state}, folder / "small.pt")


META = {  # name in a layer: Meta's name, and how its files are cut
    "self_attn.q_proj": ("attention.wq", 0), "self_attn.k_proj": ("attention.wk", 0),
    "self_attn.v_proj": ("attention.wv", 0), "self_attn.o_proj": ("attention.wo", 1),
    "mlp.gate_proj": ("feed_forward.w1", 0), "mlp.up_proj": ("feed_forward.w3", 0),
    "mlp.down_proj": ("feed_forward.w2", 1), "input_layernorm": ("attention_norm", None),
    "post_attention_layernorm": ("ffn_norm", None), "model.embed_tokens": ("tok_embeddings", 1),
    "model.norm": ("norm", None), "lm_head": ("output", 0),
}  # fmt: skip


def to_meta(name: str, tensor, Dh: int):
    """Name, tensor with Meta's pairing of rotary dimensions, and the dimension to cut."""
    layer, last = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.*?)(?:\.weight)?", name).groups()
    if last not in META:
        return name, tensor, None
    theirs, dim = META[last]
    if last in ("self_attn.q_proj", "self_attn.k_proj") and len(tensor) % Dh == 0:
        halves = tensor.reshape(-1, 2, Dh // 2, tensor.shape[-1])
        tensor = halves.transpose(1, 2).reshape(tensor.shape)
    return f"{layer or ''}{theirs}.weight", tensor, dim


def meta(weights: dict, folder: Path, config: dict, shards: int):
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


HF_LAYOUTS = {
    f"{kind}, {shards}": (lambda w, f, c, s=shards, k=kind: hf(w, f, c, s, k))
    for kind in ("safetensors", "bin")
    for shards in (1, 2)
}
WHISPER_LAYOUTS = HF_LAYOUTS | {"openai": openai}
LLAMA_LAYOUTS = HF_LAYOUTS | {
    "meta, 1": lambda w, f, c: meta(w, f, c, 1),
    "meta, 2": lambda w, f, c: meta(w, f, c, 2),
}


def source(folder: Path) -> tuple[dict, dict]:
    return load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())


def whisper_in(layout: str, folder: Path, weights: dict, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    # OpenAI's feed-forward is four times as wide as the model, and the file does not say so.
    WHISPER_LAYOUTS[layout](weights, folder, config)
    return folder / "small.pt" if layout == "openai" else folder


def llama_in(layout: str, folder: Path, weights: dict, config: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    LLAMA_LAYOUTS[layout](weights, folder, config)
    return folder


def whisper_source(folder: Path, size: str):
    return source(whisper_folder(folder, encoder_ffn_dim=96, **WHISPER_SIZES[size]))


def layouts_and_sizes(layouts, sizes):
    """Meta's files know no tied embeddings."""
    return [(a, b) for a in layouts for b in sizes if not (a.startswith("meta") and b == "tied")]


# ------------------------------------------------------------------------ the same model comes out


@pytest.mark.parametrize(("layout", "size"), layouts_and_sizes(WHISPER_LAYOUTS, WHISPER_SIZES))
def test_a_whisper_is_the_same_from_every_layout(tmp_path, layout, size):
    weights, config = whisper_source(tmp_path / "source", size)
    encoder = WhisperEncoder.from_pretrained(whisper_in(layout, tmp_path / "here", weights, config))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[f"model.encoder.{name}"]), name
    assert encoder.config.num_mel_bins == config["num_mel_bins"]


@pytest.mark.parametrize(("layout", "size"), layouts_and_sizes(LLAMA_LAYOUTS, LLAMA_SIZES))
def test_a_llama_is_the_same_from_every_layout(tmp_path, layout, size):
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES[size]))
    llama = Llama.from_pretrained(llama_in(layout, tmp_path / "here", weights, config))
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    assert llama.state_dict().keys() == weights.keys()
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert llama.config == Llama.from_pretrained(tmp_path / "source").config


@torch.no_grad()
@pytest.mark.parametrize(("layout", "size"), layouts_and_sizes(WHISPER_LAYOUTS, WHISPER_SIZES))
def test_transformers_computes_the_same_states(tmp_path, layout, size):
    transformers = pytest.importorskip("transformers")
    weights, config = whisper_source(tmp_path / "source", size)
    path = whisper_in(layout, tmp_path / "here", weights, config)
    shape = transformers.WhisperConfig(**config)
    theirs = transformers.models.whisper.modeling_whisper.WhisperEncoder(shape).eval()
    names = {k.removeprefix("model.encoder."): v for k, v in weights.items() if ".encoder." in k}
    theirs.load_state_dict(names)
    mel = made_up("mel", (2, config["num_mel_bins"], 2 * config["max_source_positions"]), 1.0)
    expected = theirs(mel).last_hidden_state
    found = WhisperEncoder.from_pretrained(path)(mel)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


@torch.no_grad()
@pytest.mark.parametrize(("layout", "size"), layouts_and_sizes(LLAMA_LAYOUTS, LLAMA_SIZES))
def test_transformers_computes_the_same_logits(tmp_path, layout, size):
    transformers = pytest.importorskip("transformers")
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES[size]))
    path = llama_in(layout, tmp_path / "here", weights, config)
    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "source").eval()
    ids = torch.arange(1, 40)[None]
    expected = theirs(ids).logits
    found = Llama.from_pretrained(path)(ids)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max())


def test_the_rows_of_meta_score_as_metas_own_rotation():
    """Rotated as Meta does, neighbour with neighbour, or put in our order and rotated as here."""
    Dh, T = 8, 5
    weight, x = made_up("q", (Dh, 12)), made_up("x", (T, 12), 1.0)
    llama_order = weight.reshape(1, Dh // 2, 2, 12).transpose(1, 2).reshape(Dh, 12)
    pair = torch.view_as_complex((x @ weight.T).reshape(T, Dh // 2, 2))
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, Dh, 2) / Dh)
    turned = torch.view_as_real(pair * torch.polar(torch.ones_like(angle), angle)).flatten(1)
    cos, sin = rotary_angles(torch.arange(T)[None], Dh, 10_000.0)
    ours = rotate((x @ llama_order.T)[None, None], cos, sin)[0, 0]
    torch.testing.assert_close(ours @ ours.T, turned @ turned.T, rtol=1e-4, atol=1e-4)


def test_precision_is_as_asked(tmp_path):
    folder = llama_folder(tmp_path / "llama", **ONE_LAYER)
    llama = Llama.from_pretrained(folder, torch.bfloat16)
    assert {p.dtype for p in llama.parameters()} == {torch.bfloat16}
    whisper = WhisperEncoder.from_pretrained(
        whisper_folder(tmp_path / "whisper", **SMALL), torch.bfloat16
    )
    assert {p.dtype for p in whisper.parameters()} == {torch.bfloat16}


# ----------------------------------------------------------------------------------------- refusals

FAULTS = {
    "missing": lambda weights, name: weights.pop(name),
    "extra": lambda weights, name: weights.update({f"{name}_extra": torch.ones(3)}),
    "wrong shape": lambda weights, name: weights.update({name: weights[name][:-1].clone()}),
    "renamed": lambda weights, name: weights.update({f"{name}_new": weights.pop(name)}),
}


def refusal(fault: str, name: str, load) -> str:
    with pytest.raises(ValueError) as error:
        load()
    if fault in ("missing", "renamed"):
        assert f"1 missing: {name}" in str(error.value)
    if fault == "wrong shape":
        assert f"1 of another shape: {name} (" in str(error.value)
    if fault in ("extra", "renamed"):
        assert "1 unexpected: " in str(error.value)


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("layout", WHISPER_LAYOUTS)
def test_one_faulty_tensor_of_a_whisper_is_refused_by_name(tmp_path, layout, fault):
    weights, config = whisper_source(tmp_path / "source", "80 mels")
    for i, full in enumerate(name for name in weights if ".encoder." in name):
        broken = dict(weights)
        FAULTS[fault](broken, full)
        path = whisper_in(layout, tmp_path / str(i), broken, config)
        refusal(
            fault,
            full.removeprefix("model.encoder."),
            lambda path=path: WhisperEncoder.from_pretrained(path),
        )


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("layout", "size"), layouts_and_sizes(LLAMA_LAYOUTS, ("GQA", "tied")))
def test_one_faulty_tensor_of_a_llama_is_refused_by_name(tmp_path, layout, size, fault):
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES[size]))
    for i, name in enumerate(weights):
        broken = dict(weights)
        FAULTS[fault](broken, name)
        path = llama_in(layout, tmp_path / str(i), broken, config)
        others_depend = name == "model.embed_tokens.weight" and (size == "tied" or "meta" in layout)
        uneven = layout == "meta, 2" and fault == "wrong shape"
        if others_depend or uneven:
            with pytest.raises(ValueError):  # the error is about the head, or about the two files
                Llama.from_pretrained(path)
        else:
            refusal(fault, name, lambda path=path: Llama.from_pretrained(path))


@pytest.mark.parametrize("fault", FAULTS)
def test_one_file_of_two_with_a_faulty_tensor_is_refused(tmp_path, fault):
    """Norms stand in both of Meta's files alike, so one of them could be wrong unseen."""
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES["GQA"]))
    folder = llama_in("meta, 2", tmp_path / "here", weights, config)
    for name in ("norm.weight", "layers.0.attention.wq.weight", "output.weight"):
        for part in range(2):
            broken = shutil.copytree(folder, tmp_path / f"{name} {part}")
            stored = torch.load(broken / f"consolidated.0{part}.pth", weights_only=True)
            FAULTS[fault](stored, name)
            torch.save(stored, broken / f"consolidated.0{part}.pth")
            with pytest.raises(ValueError, match="do not belong together") as error:
                Llama.from_pretrained(broken)
            assert name in str(error.value)


@pytest.mark.parametrize("layout", ("safetensors, 2", "bin, 2", "meta, 2"))
def test_a_missing_shard_is_named(tmp_path, layout):
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES["GQA"]))
    folder = llama_in(layout, tmp_path / "here", weights, config)
    first, _ = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth"))
    first.unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(first.name)):
        Llama.from_pretrained(folder)


@pytest.mark.parametrize("layout", ("safetensors, 1", "safetensors, 2", "bin, 1", "meta, 1"))
def test_a_file_that_was_cut_short_is_named(tmp_path, layout):
    weights, config = source(llama_folder(tmp_path / "source", **LLAMA_SIZES["GQA"]))
    folder = llama_in(layout, tmp_path / "here", weights, config)
    file = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".bin", ".pth"))[0]
    whole = file.read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:keep])
        with pytest.raises(ValueError, match=f"{file.name} cannot be read"):
            Llama.from_pretrained(folder)


class Command:
    """What a hostile pickle does: name a function to call when it is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ("pytorch_model.bin", "small.pt", "consolidated.00.pth"))
def test_code_in_a_weight_file_is_not_run(tmp_path, name):
    folder = llama_folder(tmp_path / "llama", **ONE_LAYER)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Command(tmp_path / "ran")}, folder / name)
    if name.endswith(".pth"):
        (folder / "config.json").unlink()
        (folder / "params.json").write_text("{}")
    loader = WhisperEncoder if name.endswith(".pt") else Llama
    path = folder / name if name.endswith(".pt") else folder
    with pytest.raises(ValueError, match=f"{name} holds more than weights, or none") as told:
        loader.from_pretrained(path)
    assert "weights_only" not in str(told.value)  # torch's advice would run it
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_weights_says_what_was_looked_for(tmp_path):
    folder = llama_folder(tmp_path / "llama", **ONE_LAYER)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no weights: looked for model.safetensors, py"):
        Llama.from_pretrained(folder)
    with pytest.raises(FileNotFoundError, match="is no Llama: no config.json, no params.json"):
        Llama.from_pretrained(tmp_path)
    for path in (tmp_path, tmp_path / "missing.pt"):
        with pytest.raises(
            FileNotFoundError, match="is no Whisper: .* folder with config.json nor"
        ):
            WhisperEncoder.from_pretrained(path)


def test_a_file_that_is_no_json_is_named(tmp_path):
    for make, kind in ((whisper_folder, WhisperEncoder), (llama_folder, Llama)):
        folder = make(tmp_path / kind.__name__)
        (folder / "model.safetensors").rename(folder / "somewhere.safetensors")
        (folder / "model.safetensors.index.json").write_text("<html>")
        with pytest.raises(ValueError, match="model.safetensors.index.json is not JSON"):
            kind.from_pretrained(folder)
        (folder / "config.json").write_text("<html>")
        with pytest.raises(ValueError, match=f"{kind.__name__}/config.json is not JSON"):
            kind.from_pretrained(folder)


def test_another_pt_file_is_no_whisper(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"none of OpenAI's Whisper files: it holds \['state_dict"):
        WhisperEncoder.from_pretrained(tmp_path / "other.pt")


def test_metas_scaled_rotation_is_refused(tmp_path):
    (tmp_path / "params.json").write_text(json.dumps({"use_scaled_rope": True}))
    with pytest.raises(ValueError, match="asks for use_scaled_rope, which is not built here"):
        Llama.from_pretrained(tmp_path)


# ------------------------------------------------------------------------- configurations of others

PUBLISHED = {  # what their config.json says, as far as it shapes the computation
    "TinyLlama-1.1B-Chat": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=22,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=32000, rms_norm_eps=1e-5,
        rope_theta=10000.0, max_position_embeddings=2048), 1_100_048_384),
    "Llama-2-7b": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, vocab_size=32000, rms_norm_eps=1e-5), 6_738_415_616),
    "Llama-2-13b": (dict(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40,
        num_attention_heads=40, num_key_value_heads=40, vocab_size=32000, rms_norm_eps=1e-5),
        13_015_864_320),
    "open_llama_3b": (dict(hidden_size=3200, intermediate_size=8640, num_hidden_layers=26,
        num_attention_heads=32, vocab_size=32000, rms_norm_eps=1e-6), 3_426_473_600),
    "Yi-6B": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=4, vocab_size=64000, rms_norm_eps=1e-5,
        rope_theta=5e6), 6_061_035_520),
    "EuroLLM-1.7B": (dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=24,
        num_attention_heads=16, num_key_value_heads=8, vocab_size=128000, rms_norm_eps=1e-5,
        rope_theta=10000.0, eos_token_id=4), 1_656_850_432),
    "EuroLLM-9B": (dict(hidden_size=4096, intermediate_size=12288, num_hidden_layers=42,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128, vocab_size=128000,
        rms_norm_eps=1e-5, rope_theta=10000.0, eos_token_id=4), 9_152_319_488),
    "TowerInstruct-7B": (dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, vocab_size=32007, rms_norm_eps=1e-5,
        rope_theta=10000.0, eos_token_id=32005), 6_738_472_960),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_geometry_is_built_with_its_number_of_parameters(tmp_path, name):
    config, n = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        llama = Llama(LlamaConfig.from_json(tmp_path / "config.json"))
    assert sum(p.numel() for p in llama.parameters()) == n


# ------------------------------------------------------------------------------------------- memory


def resident() -> int:
    """Bytes of this process that are its own, files that are mapped not counted."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":") for line in lines if line.startswith("Rss"))
    return int(fields["RssAnon"].split()[0]) * 1024


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc on this system")
@pytest.mark.parametrize("layout", ("safetensors, 2", "bin, 2", "meta, 2"))
def test_loading_never_holds_two_copies(tmp_path, layout):
    """From float32 files to bfloat16: the peak stays near the bfloat16 weights alone."""
    sizes = ONE_LAYER | dict(num_hidden_layers=24, hidden_size=384, intermediate_size=1040,
                             head_dim=64, num_key_value_heads=6)  # fmt: skip
    weights, config = source(llama_folder(tmp_path / "source", **sizes))
    folder = llama_in(layout, tmp_path / "here", weights, config)
    size = sum(2 * tensor.numel() for tensor in weights.values())
    largest = max(4 * tensor.numel() for tensor in weights.values())
    del weights
    Llama.from_pretrained(llama_folder(tmp_path / "warm", **ONE_LAYER), torch.bfloat16)
    peak, stop = [before := resident()], threading.Event()

    def watch():
        while not stop.is_set():
            peak.append(resident())
            time.sleep(0.0005)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        llama = Llama.from_pretrained(folder, torch.bfloat16)
    finally:
        stop.set()
        watcher.join()
    assert llama.lm_head.weight.dtype == torch.bfloat16
    assert max(peak) - before < 1.25 * size + 4 * largest
