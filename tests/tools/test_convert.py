"""Weights and trained models are the same after conversion, and broken ones are refused."""

import json
import sys
import weakref
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import llast
import toys
from data import AUDIO_ID
from formats import as_original, write_bin, write_meta, write_openai
from llama import Llama, LlamaConfig, rotary_angles, rotate
from llast import LLaST, LLaSTConfig
from tools import convert
from tools.convert import export, read_peft
from translate import SearchOptions, beam_search
from whisper_encoder import WhisperEncoder

EOS = 2


@pytest.fixture
def bases(tmp_path):
    toys.whisper_folder(tmp_path / "whisper", max_source_positions=50)
    toys.llama_folder(tmp_path / "llama")
    return tmp_path


def trained_model(bases: Path, **changes) -> LLaST:
    config = LLaSTConfig(
        str(bases / "whisper"), str(bases / "llama"), template="tinyllama", window="clip",
        encoder_rank=2, encoder_alpha=3.0, llm_rank=4, llm_alpha=2.0, dropout=0.0,
        directions=("fr-en", "en-zh-CN"),
    )  # fmt: skip
    model = LLaST.fresh(replace(config, **changes))
    chance = torch.Generator().manual_seed(0)
    for tensor in model.trained().values():
        tensor.normal_(std=0.2, generator=chance)
    return model.eval()


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    return convert.main()


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


MEL = toys.made_up("mel", (2, toys.WHISPER["num_mel_bins"], 100), 1.0)
IDS = torch.tensor([[1, 66, 5, 5, 17, 300, 1000], [1, 8, 33, 3, 60, 61, 62]])


def new_transformers_whisper(**sizes):
    """Random weights of transformers' own model, with a decoder."""
    import transformers

    torch.manual_seed(0)
    config = transformers.WhisperConfig(
        **toys.WHISPER | sizes, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=96,
        vocab_size=70, max_target_positions=9, pad_token_id=0, eos_token_id=2, bos_token_id=1,
        decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


# ------------------------------------------------------------------------------- formats of weights

SMALL = dict(encoder_layers=1, max_source_positions=8, encoder_ffn_dim=96)  # 4 times d_model
WHISPER_SIZES = {"80 mels": SMALL, "128 mels": SMALL | {"num_mel_bins": 128}}
ONE_LAYER = dict(num_hidden_layers=1, intermediate_size=104, vocab_size=68)
LLAMA_SIZES = {
    "MHA": ONE_LAYER | {"num_key_value_heads": 6},
    "GQA": ONE_LAYER | {"num_key_value_heads": 2},
    "tied": ONE_LAYER | {"tie_word_embeddings": True},
}


WHISPER_FORMATS = {
    "bin, 1": lambda *args: write_bin(*args, shards=1),
    "bin, 2": lambda *args: write_bin(*args, shards=2),
    "openai": write_openai,
}
LLAMA_FORMATS = {
    "bin, 1": lambda *args: write_bin(*args, shards=1),
    "bin, 2": lambda *args: write_bin(*args, shards=2),
    "meta, 1": lambda *args: write_meta(*args, shards=1),
    "meta, 2": lambda *args: write_meta(*args, shards=2),
}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


def read(folder: Path) -> tuple[dict, dict]:
    return load_file(folder / "model.safetensors"), config_of(folder)


def write_source(folder: Path, format: str, weights: dict, config: dict, kind=Llama) -> Path:
    folder.mkdir(parents=True)
    formats = LLAMA_FORMATS if kind is Llama else WHISPER_FORMATS
    return formats[format](weights, folder, config)


def formats_and_sizes(formats, sizes):
    """Meta's files have no tied embeddings."""
    return [(a, b) for a in formats for b in sizes if not (a.startswith("meta") and b == "tied")]


@pytest.mark.parametrize(("format", "size"), formats_and_sizes(WHISPER_FORMATS, WHISPER_SIZES))
def test_a_whisper_is_the_same_from_every_format(tmp_path, format, size):
    weights, config = read(toys.whisper_folder(tmp_path / "original", **WHISPER_SIZES[size]))
    source = write_source(tmp_path / "source", format, weights, config, WhisperEncoder)
    convert.convert(source, tmp_path / "out", WhisperEncoder)
    encoder = WhisperEncoder.from_pretrained(tmp_path / "out")
    assert encoder.config == WhisperEncoder.from_pretrained(tmp_path / "original").config
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, weights[f"model.encoder.{name}"]), name


@pytest.mark.parametrize(("format", "size"), formats_and_sizes(LLAMA_FORMATS, LLAMA_SIZES))
def test_a_llama_is_the_same_from_every_format(tmp_path, format, size):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES[size]))
    source = write_source(tmp_path / "source", format, weights, config)
    (tmp_path / "tokenizer.model").write_bytes(b"a file of sentencepiece")
    convert.convert(source, tmp_path / "out", Llama)
    assert Llama.from_pretrained(tmp_path / "out").config == (
        Llama.from_pretrained(tmp_path / "original").config
    )
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == weights.keys()
    assert all(torch.equal(written[name], weights[name]) for name in weights)
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == b"a file of sentencepiece"


@torch.no_grad()
@pytest.mark.parametrize("format", WHISPER_FORMATS)
def test_transformers_reads_a_converted_whisper(tmp_path, format):
    transformers = pytest.importorskip("transformers")
    theirs = new_transformers_whisper(**SMALL)
    theirs.save_pretrained(tmp_path / "original")
    weights, config = read(tmp_path / "original")
    source = write_source(tmp_path / "source", format, weights, config, WhisperEncoder)
    convert.convert(source, tmp_path / "out", WhisperEncoder)
    changed = config_of(tmp_path / "out") | {"pad_token_id": 0}  # the toy has no id 50257
    (tmp_path / "out" / "config.json").write_text(json.dumps(changed))
    ours, faults = transformers.WhisperForConditionalGeneration.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(faults.values()), faults
    mel, ids = MEL[..., :16], torch.tensor([[1, 5], [1, 6]])
    expected = theirs.eval()(mel, decoder_input_ids=ids).logits
    assert_close(ours.eval()(mel, decoder_input_ids=ids).logits, expected)
    states = WhisperEncoder.from_pretrained(tmp_path / "out")(mel)
    assert_close(states, theirs.model.encoder(mel).last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize(("format", "size"), formats_and_sizes(LLAMA_FORMATS, LLAMA_SIZES))
def test_transformers_reads_a_converted_llama(tmp_path, format, size):
    transformers = pytest.importorskip("transformers")
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES[size]))
    source = write_source(tmp_path / "source", format, weights, config)
    convert.convert(source, tmp_path / "out", Llama)
    theirs, faults = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(faults.values()), faults
    ids = torch.arange(1, 40)[None]
    expected = Llama.from_pretrained(tmp_path / "original")(ids)
    assert_close(theirs.eval()(ids).logits, expected)


def test_reordered_rows_of_meta_score_as_with_metas_own_rotation():
    """Meta rotates neighbours together. The reordered rows, rotated by llama.py, score the same."""
    Dh, T = 8, 5
    weight, x = toys.made_up("q", (Dh, 12)), toys.made_up("x", (T, 12), 1.0)
    name, reordered = convert.join_parts(
        "layers.0.attention.wq.weight", [{"layers.0.attention.wq.weight": weight}], Dh
    )
    assert name == "model.layers.0.self_attn.q_proj.weight"
    pair = torch.view_as_complex((x @ weight.T).reshape(T, Dh // 2, 2))
    angle = torch.arange(T)[:, None] * 10_000.0 ** (-torch.arange(0, Dh, 2) / Dh)
    theirs = torch.view_as_real(pair * torch.polar(torch.ones_like(angle), angle)).flatten(1)
    config = LlamaConfig(12, 1, 1, 1, 1, Dh, 1, 1e-5, 10_000.0, False)
    cos, sin = rotary_angles(torch.arange(T)[None], config)
    ours = rotate((x @ reordered.T)[None, None], cos, sin)[0, 0]
    torch.testing.assert_close(ours @ ours.T, theirs @ theirs.T, rtol=1e-4, atol=1e-4)


def test_the_command_converts_and_keeps_the_precision(tmp_path, monkeypatch, capsys):
    weights, config = read(toys.llama_folder(tmp_path / "original", **ONE_LAYER))
    weights = {name: tensor.bfloat16() for name, tensor in weights.items()}
    source = write_source(tmp_path / "source", "meta, 2", weights, config)
    monkeypatch.setattr(convert, "SHARD_BYTES", 10_000)
    assert command(monkeypatch, "llama", source, "--out", tmp_path / "new" / "out") == 0
    assert "config.json, model-00001-of-00005.safetensors, model-00002" in capsys.readouterr().out
    llama = Llama.from_pretrained(tmp_path / "new" / "out", torch.bfloat16)
    for name, tensor in llama.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    written = load_file(tmp_path / "new" / "out" / "model-00001-of-00005.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.bfloat16}
    files = list((tmp_path / "new" / "out").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1  # who reads one may read all


def test_tied_tensors_of_a_bin_file_are_each_written(tmp_path):
    weights, config = read(toys.whisper_folder(tmp_path / "original", **SMALL))
    weights["proj_out.weight"] = weights["model.encoder.layer_norm.weight"]  # one memory for both
    source = write_source(tmp_path / "source", "bin, 1", weights, config, WhisperEncoder)
    convert.convert(source, tmp_path / "out", WhisperEncoder)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(written["proj_out.weight"], weights["proj_out.weight"])


def refusal(source: Path, kind=Llama) -> str:
    """The message with which a source is refused. Nothing is written."""
    out = source.parent / "out"
    with pytest.raises((ValueError, OSError)) as error:
        convert.convert(source, out, kind)
    assert not [file for file in source.parent.iterdir() if "out" in file.name]
    return str(error.value)


@pytest.mark.parametrize("fault", toys.FAULTS)
@pytest.mark.parametrize("format", WHISPER_FORMATS)
def test_one_faulty_tensor_of_a_whisper_is_refused_by_name(tmp_path, format, fault):
    weights, config = read(toys.whisper_folder(tmp_path / "original", **SMALL))
    for i, name in enumerate(name for name in weights if ".encoder." in name):
        faulty = dict(weights)
        toys.FAULTS[fault](faulty, name)
        source = write_source(tmp_path / f"source{i}", format, faulty, config, WhisperEncoder)
        message = refusal(source, WhisperEncoder)
        assert f"{fault}: {name.removeprefix('model.encoder.')}" in message
        assert f"{source}: 1 tensors do not fit" in message


@pytest.mark.parametrize("fault", toys.FAULTS)
@pytest.mark.parametrize("format", LLAMA_FORMATS)
def test_one_faulty_tensor_of_a_llama_is_refused_by_name(tmp_path, format, fault):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    for i, name in enumerate(weights):
        faulty = dict(weights)
        toys.FAULTS[fault](faulty, name)
        message = refusal(write_source(tmp_path / f"source{i}", format, faulty, config))
        # Meta's folder has no vocab_size, and two files of it are compared with each other first.
        if not format.startswith("meta") or ("embed_tokens" not in name and "2" not in format):
            assert f"{fault}: {name}" in message


@pytest.mark.parametrize("fault", toys.FAULTS)
def test_one_file_of_two_with_a_faulty_tensor_is_refused(tmp_path, fault):
    """Norms are the same in both of Meta's files, so a fault in one of them is easy to miss."""
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    for name in ("norm.weight", "layers.0.attention.wq.weight", "output.weight"):
        for part in range(2):
            source = write_source(
                tmp_path / f"{part} of {name}" / "source", "meta, 2", weights, config
            )
            stored = torch.load(source / f"consolidated.0{part}.pth", weights_only=True)
            toys.FAULTS[fault](stored, name)
            torch.save(stored, source / f"consolidated.0{part}.pth")
            message = refusal(source)
            assert name in message and ("do not belong together" in message)


@pytest.mark.parametrize("format", ("bin, 2", "meta, 2"))
def test_a_missing_shard_is_named(tmp_path, format):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    source = write_source(tmp_path / "source", format, weights, config)
    first = sorted(p for p in source.iterdir() if p.suffix in (".bin", ".pth"))[0]
    first.unlink()
    assert first.name in refusal(source)


@pytest.mark.parametrize("format", ("bin, 1", "meta, 1"))
def test_a_pickle_that_was_cut_short_is_named(tmp_path, format):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    source = write_source(tmp_path / "source", format, weights, config)
    file = next(p for p in source.iterdir() if p.suffix in (".bin", ".pth"))
    whole = file.read_bytes()
    for keep in (0, 5, len(whole) // 2, len(whole) - 9):
        file.write_bytes(whole[:keep])
        assert f"{file.name} cannot be read" in refusal(source)


class Command:
    """A hostile pickle: it names a function that is called when the file is opened."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def as_source(value, file: Path) -> Path:
    """Save a value as the weight file of a source, whose format follows from the file's name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, file)
    if file.suffix == ".pt":
        return file
    params = dict(dim=36, n_layers=1, n_heads=6, multiple_of=8, norm_eps=1e-5)
    (file.parent / "params.json").write_text(json.dumps(params))
    if file.suffix == ".bin":
        (file.parent / "config.json").write_text(json.dumps(toys.LLAMA))
    return file.parent


PICKLES = {"pytorch_model.bin": Llama, "small.pt": WhisperEncoder, "consolidated.00.pth": Llama}


@pytest.mark.parametrize("name", PICKLES)
def test_code_in_a_weight_file_is_not_run(tmp_path, name):
    value = {"model.norm.weight": Command(tmp_path / "ran")}
    message = refusal(as_source(value, tmp_path / "source" / name), PICKLES[name])
    assert f"{name} contains Python objects other than tensors" in message
    assert "weights_only" not in message  # torch's advice would run the code
    assert not (tmp_path / "ran").exists()


SPARSE, META_TENSOR = torch.eye(3).to_sparse(), torch.ones(3, device="meta")
HUGE = torch.ones(1).expand(2**20, 2**20)  # one number on the disk


@pytest.mark.parametrize(
    ("value", "message"),
    (
        ([torch.ones(1)], "must hold a dictionary of tensors, not a value of type list"),
        ({"a": 1}, "a must be a tensor, not a value of type int"),
        ({"a": {"b": torch.ones(1)}}, "a must be a tensor, not a value of type dict"),
        ({1: torch.ones(1)}, "must name its tensors by text, not by a value of type int"),
        ({"a": torch.ones(1).int()}, "a is not a dense tensor of floating-point numbers"),
        ({"a": SPARSE}, "a is not a dense tensor of floating-point numbers"),
        ({"a": META_TENSOR}, "a is not a dense tensor of floating-point numbers"),
        ({"a": HUGE}, "describes tensors that are larger than the file"),
    ),
)
@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_of_anything_but_named_tensors_is_refused(tmp_path, name, value, message):
    if name.endswith(".pt") and isinstance(value, dict):
        value = {"dims": {}, "model_state_dict": value}
    message_of = refusal(as_source(value, tmp_path / "source" / name), PICKLES[name])
    assert f"{name}{' ' if message[0] in 'md' else ': '}{message}" in message_of


@pytest.mark.parametrize("name", PICKLES)
def test_a_compressed_pickle_is_refused_before_it_is_read(tmp_path, name):
    source = as_source({}, tmp_path / "source" / name)
    with zipfile.ZipFile(tmp_path / "source" / name, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10_000_000))
    assert f"{name} is compressed; it was not loaded" in refusal(source, PICKLES[name])


@pytest.mark.parametrize("fault", (torch.ones(()), torch.ones(4)), ids=("0-d", "1-d"))
def test_a_matrix_of_meta_without_two_dimensions_is_refused_by_name(tmp_path, fault):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    source = write_source(tmp_path / "source", "meta, 1", weights, config)
    stored = torch.load(source / "consolidated.00.pth", weights_only=True)
    for name in ("tok_embeddings.weight", "layers.0.attention.wo.weight", "norm.weight"):
        if name != "norm.weight" or fault.dim() == 0:
            torch.save(stored | {name: fault}, source / "consolidated.00.pth")
            assert name in refusal(source)


def test_a_source_without_weights_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    assert "neither params.json nor config.json" in refusal(tmp_path / "source")
    assert "name OpenAI's .pt file, or a folder" in refusal(tmp_path / "source", WhisperEncoder)
    (tmp_path / "source" / "config.json").write_text("{}")
    assert "has config.json, but not ['pytorch_model.bin']" in refusal(tmp_path / "source")


def test_another_pt_file_is_not_a_whisper(tmp_path):
    source = as_source({"state_dict": {}}, tmp_path / "other.pt")
    assert "it must hold dims and model_state_dict, but it holds ['state_dict']" in refusal(
        source, WhisperEncoder
    )


def test_metas_scaled_rotation_is_refused(tmp_path):
    source = as_source({}, tmp_path / "source" / "consolidated.00.pth")
    (source / "params.json").write_text(json.dumps({"use_scaled_rope": True}))
    assert "Llama 3, which is not converted; download its Hugging Face folder" in refusal(source)


ODD_VALUES = (None, "x", -1, 0, 10**9, 10**30, 0.5, float("nan"), [], {}, [1], True)


def test_a_wrong_value_in_params_json_is_named(tmp_path):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    source = write_source(tmp_path / "source", "meta, 1", weights, config)
    params = json.loads((source / "params.json").read_text())
    for name in ("dim", "n_layers", "n_heads", "multiple_of", "norm_eps"):
        for value in ODD_VALUES:
            if (name, value) not in (("norm_eps", 0.5), ("norm_eps", 10**9)):
                (source / "params.json").write_text(json.dumps(params | {name: value}))
                assert f"{source}/params.json has no valid {name}" in refusal(source)


def test_heads_of_meta_that_do_not_divide_the_width_are_refused(tmp_path):
    weights, config = read(toys.llama_folder(tmp_path / "original", **LLAMA_SIZES["GQA"]))
    source = write_source(tmp_path / "source", "meta, 1", weights, config)
    params = json.loads((source / "params.json").read_text())
    for n_heads in (5, 12, 36, 100):  # 12 and 36 make an odd width of a head, 100 none
        (source / "params.json").write_text(json.dumps(params | {"n_heads": n_heads}))
        assert str(source) in refusal(source)


def test_a_wrong_size_in_openais_file_is_named(tmp_path):
    weights, config = read(toys.whisper_folder(tmp_path / "original", **SMALL))
    source = write_source(tmp_path / "source", "openai", weights, config, WhisperEncoder)
    stored = torch.load(source, weights_only=True)
    for name in stored["dims"]:
        for value in ODD_VALUES:
            torch.save(stored | {"dims": stored["dims"] | {name: value}}, source)
            assert f"small.pt has no valid {name}" in refusal(source, WhisperEncoder)
    torch.save(stored | {"dims": 3}, source)
    assert "dims and model_state_dict must be dictionaries" in refusal(source, WhisperEncoder)


@pytest.mark.parametrize("index", ({}, {"weight_map": 5}, {"weight_map": {"a": 5}}))
def test_an_index_without_a_map_of_files_is_refused(tmp_path, index):
    weights, config = read(toys.llama_folder(tmp_path / "original", **ONE_LAYER))
    source = write_source(tmp_path / "source", "bin, 2", weights, config)
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert "weight_map must map names of tensors to names of files" in refusal(source)


@pytest.mark.parametrize("format", ("bin, 2", "meta, 2"))
def test_converting_holds_one_shard_in_memory(tmp_path, monkeypatch, format):
    weights, config = read(toys.llama_folder(tmp_path / "original", **ONE_LAYER))
    source = write_source(tmp_path / "source", format, weights, config)
    monkeypatch.setattr(convert, "SHARD_BYTES", 20_000)
    earlier = []

    def save(tensors, *args):
        assert sum(tensor.nbytes for tensor in tensors.values()) <= convert.SHARD_BYTES
        assert all(tensor() is None for tensor in earlier)
        earlier.extend(weakref.ref(tensor) for tensor in tensors.values())
        save_file(tensors, *args)

    monkeypatch.setattr(convert, "save_file", save)
    convert.convert(source, tmp_path / "out", Llama)
    assert len(earlier) == len(weights)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc on this system")
def test_a_pickle_is_mapped_not_read_into_memory(tmp_path):
    torch.save({"a": torch.ones(100_000)}, tmp_path / "a.pth")
    weights = convert.read_pickle(tmp_path / "a.pth")
    assert str(tmp_path / "a.pth") in Path("/proc/self/maps").read_text()
    assert torch.equal(weights["a"], torch.ones(100_000))


# --------------------------------------------------------------------------- transformers and peft


@pytest.fixture
def published(tmp_path):
    """Random weights as transformers itself saves them, Whisper's decoder included."""
    transformers = pytest.importorskip("transformers")
    whisper = new_transformers_whisper(max_source_positions=50)
    whisper.save_pretrained(tmp_path / "whisper")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**toys.LLAMA))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer = (toys.TINY / "llama" / "tokenizer.model").read_bytes()
    (tmp_path / "llama" / "tokenizer.model").write_bytes(tokenizer)
    return tmp_path


@torch.no_grad()
def test_the_merged_folders_compute_the_same_in_transformers(published):
    transformers = pytest.importorskip("transformers")
    model = trained_model(published)
    states, logits = model.speech_encoder(MEL), model.llm(IDS)
    prompts = list(model.llm.embed(IDS))
    answers = beam_search(model.llm, prompts, [EOS], SearchOptions(beams=1, max_new_tokens=8))
    export(model, published / "out")
    assert_close(model.speech_encoder(MEL), states)  # merged by export
    assert_close(model.llm(IDS), logits)

    whisper, faults = transformers.WhisperForConditionalGeneration.from_pretrained(
        published / "out" / "whisper", output_loading_info=True
    )
    assert not any(faults.values()), faults
    assert_close(whisper.eval().model.encoder(MEL).last_hidden_state, states)
    before = load_file(published / "whisper" / "model.safetensors")
    after = load_file(published / "out" / "whisper" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".encoder.layers." in name for name in changed)

    llama, faults = transformers.LlamaForCausalLM.from_pretrained(
        published / "out" / "llama", output_loading_info=True
    )
    assert not any(faults.values()), faults
    assert_close(llama.eval()(IDS).logits, logits)
    generated = llama.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False,
        eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    for row, [best] in zip(generated[:, IDS.shape[1] :].tolist(), answers, strict=True):
        assert (row[: row.index(EOS)] if EOS in row else row) == best.ids


PEFT_WARNS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@PEFT_WARNS
@torch.no_grad()
def test_the_adapters_compute_the_same_in_peft(published):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    model = trained_model(published)
    states, logits = model.speech_encoder(MEL), model.llm(IDS)
    export(model, published / "out")
    whisper = transformers.WhisperModel.from_pretrained(published / "whisper")
    whisper = peft.PeftModel.from_pretrained(whisper, published / "out" / "encoder-lora")
    assert_close(whisper.eval().base_model.model.encoder(MEL).last_hidden_state, states)
    llama = transformers.LlamaForCausalLM.from_pretrained(published / "llama")
    llama = peft.PeftModel.from_pretrained(llama, published / "out" / "llm-lora")
    assert_close(llama.eval()(IDS).logits, logits)


@PEFT_WARNS
@torch.no_grad()
def test_an_adapter_written_by_peft_is_read(published):
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    llama = transformers.LlamaForCausalLM.from_pretrained(published / "llama")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, target_modules=list(llast.LLM_TARGETS), init_lora_weights=False
    )
    theirs = peft.get_peft_model(llama, config).eval()
    theirs.save_pretrained(published / "adapter")
    alpha, lora = read_peft(published / "adapter")
    assert alpha == 6
    model = trained_model(published)
    model.llm.load_state_dict(lora, strict=False)
    for layer in llast.lora_layers(model.llm):
        layer.scale = alpha / 4
    assert_close(model.llm(IDS), theirs(IDS).logits)


# ------------------------------------------------------------------------------- export and import


def test_a_model_is_the_same_after_export_and_import(bases, monkeypatch, capsys):
    model = trained_model(bases)
    model.save_pretrained(bases / "run")
    assert command(monkeypatch, "export", bases / "run", "--out", bases / "out") == 0
    assert "llama, llm-lora, projector.safetensors, use.json, whisper" in capsys.readouterr().out
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    assert command(monkeypatch, *words, "--out", bases / "back") == 0
    back = LLaST.from_pretrained(bases / "back")
    assert back.config == model.config
    for name, tensor in model.trained().items():
        assert torch.equal(back.trained()[name], tensor), name


def test_the_tasks_of_a_model_are_exported_and_imported(bases, monkeypatch):
    export(trained_model(bases, tasks=("st",)), bases / "out")
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    assert command(monkeypatch, *words, "--out", bases / "back") == 0
    assert LLaST.from_pretrained(bases / "back").config.tasks == ("st",)


def test_an_export_keeps_the_tokenizer_and_its_template(bases):
    files = ("chat_template.jinja", "tokenizer_config.json", "generation_config.json", "vocab.txt")
    for name in files:
        (bases / "llama" / name).write_text(f'{{"name": "{name}"}}')
    export(trained_model(bases), bases / "out")
    for name in files:
        assert name in (bases / "out" / "llama" / name).read_text()
    weights = [file.name for file in (bases / "out" / "llama").glob("*.safetensors*")]
    assert weights == ["model.safetensors"]  # and no index of the base model's shards


@pytest.mark.parametrize("merged", ["whisper", "llama"])
def test_an_import_on_merged_base_models_is_refused(bases, monkeypatch, capsys, merged):
    export(trained_model(bases), bases / "out")
    folders = {name: bases / name for name in ("whisper", "llama")}
    folders[merged] = bases / "out" / merged
    words = ["import", bases / "out", "--encoder", folders["whisper"]]
    words += ["--llm", folders["llama"]]
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    assert "was trained on another" in capsys.readouterr().err
    assert not (bases / "back").exists()


def test_the_merged_folders_are_a_llast_without_lora(bases):
    model = trained_model(bases)
    ids = torch.tensor([1, 300, AUDIO_ID, 301])
    speech = model.encode_speech([torch.sin(torch.arange(4000) / 9.0)])[0]
    expected = model.llm.hidden(model.splice(ids, speech, 2)[None])[0]
    export(model, bases / "out")
    config = replace(
        model.config, encoder=str(bases / "out" / "whisper"), llm=str(bases / "out" / "llama"),
        encoder_rank=0, llm_rank=0,
    )  # fmt: skip
    merged = LLaST.fresh(config).eval()
    merged.projector.load_state_dict(load_file(bases / "out" / "projector.safetensors"))
    speech = merged.encode_speech([torch.sin(torch.arange(4000) / 9.0)])[0]
    assert_close(merged.llm.hidden(merged.splice(ids, speech, 2)[None])[0], expected)


def test_an_existing_folder_is_not_overwritten(bases, monkeypatch, capsys):
    trained_model(bases).save_pretrained(bases / "run")
    assert command(monkeypatch, "export", bases / "run", "--out", bases / "llama") == 2
    assert "llama already exists; choose another folder" in capsys.readouterr().err


def test_a_command_that_fails_leaves_no_files(bases, monkeypatch, capsys):
    trained_model(bases).save_pretrained(bases / "run")
    export(trained_model(bases), bases / "whole")
    back = ["import", bases / "whole", "--encoder", bases / "whisper", "--llm", bases / "llama"]

    def fail(tensors, file, *_):
        raise SafetensorError("I/O error: No space left on device")

    for words in (["export", bases / "run"], back):
        with monkeypatch.context() as patch:
            patch.setattr(llast, "save_file", fail)
            patch.setattr(convert, "save_file", fail)
            assert command(patch, *words, "--out", bases / "out") == 2
        assert capsys.readouterr().err == "convert.py: I/O error: No space left on device\n"
        assert not [file for file in bases.iterdir() if "out" in file.name]


@pytest.mark.parametrize("name", ["llm-lora/adapter_model", "projector", "encoder-lora/adapter"])
def test_a_damaged_file_of_an_export_is_refused(bases, monkeypatch, capsys, name):
    export(trained_model(bases), bases / "out")
    ending = "_config.json" if name.endswith("adapter") else ".safetensors"
    (bases / "out" / f"{name}{ending}").write_bytes(b"{")
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    message = capsys.readouterr().err
    assert message.startswith("convert.py: ")
    assert "cannot be read" in message or "is not JSON" in message


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 3}}]
)
def test_an_adapter_of_another_kind_is_refused_by_name(bases, change):
    export(trained_model(bases), bases / "out")
    file = bases / "out" / "llm-lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"has .*{next(iter(change))}.*not supported here"):
        read_peft(bases / "out" / "llm-lora")


def test_a_wrong_value_in_a_json_file_of_an_export_is_named(bases, monkeypatch, capsys):
    export(trained_model(bases), bases / "out")
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    for file, names in (("llm-lora/adapter_config.json", ("r", "lora_alpha")),
                        ("use.json", ("template", "window", "directions", "tasks",
                                      "fingerprints"))):  # fmt: skip
        valid = (bases / "out" / file).read_text()
        for name in names:
            for value in (*ODD_VALUES[:8], {}, [1], True):
                if (name, value) not in (("lora_alpha", 10**9), ("lora_alpha", 0.5)):
                    changed = json.dumps(json.loads(valid) | {name: value})
                    (bases / "out" / file).write_text(changed)
                    assert command(monkeypatch, *words, "--out", bases / "back") == 2
                    assert f"{file} has no valid {name}" in capsys.readouterr().err
        (bases / "out" / file).write_text(valid)
    (bases / "out" / "llm-lora" / "adapter_config.json").write_text("[" * 100_000)
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    assert "adapter_config.json is not JSON" in capsys.readouterr().err


def test_an_adapter_of_another_rank_than_its_configuration_is_refused(bases):
    export(trained_model(bases), bases / "out")
    file = bases / "out" / "llm-lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"r": 8}))
    with pytest.raises(ValueError, match="adapter_config.json has r = 8, but the tensors have 4"):
        read_peft(bases / "out" / "llm-lora")


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("name", ("projector", "llm-lora/adapter_model"))
def test_nan_in_a_trained_tensor_is_refused_by_name(bases, monkeypatch, capsys, name, value):
    export(trained_model(bases), bases / "out")
    tensors = load_file(bases / "out" / f"{name}.safetensors")
    first = next(iter(tensors))
    tensors[first].view(-1)[0] = value
    save_file(tensors, bases / "out" / f"{name}.safetensors")
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    assert "has numbers that are NaN or infinite" in capsys.readouterr().err
    assert not (bases / "back").exists()


def test_an_adapter_of_another_model_is_refused(bases):
    export(trained_model(bases), bases / "out")
    with pytest.raises(ValueError, match="does not begin with base_model.model.encoder."):
        read_peft(bases / "out" / "llm-lora", "encoder.")


# ---------------------------------------------------------------------- checkpoints of the original


def write_original(folder: Path, tensors: dict, nesting: str) -> Path:
    if nesting == "deepspeed":
        (folder / "epoch_1.pth").mkdir(parents=True)
        torch.save({"module": tensors}, folder / "epoch_1.pth" / "mp_rank_00_model_states.pt")
        return folder / "epoch_1.pth"
    folder.mkdir(exist_ok=True)
    torch.save({"state_dict": tensors} if nesting else tensors, folder / "epoch_1.pth")
    return folder / "epoch_1.pth"


def import_words(bases: Path, source: Path) -> list:
    here = ["--encoder", bases / "whisper", "--llm", bases / "llama", "--out", bases / "imported"]
    return ["import", source, *here, "--template", "tinyllama", "--lang", "fr"]


@pytest.mark.parametrize("nesting", ["deepspeed", "state_dict", ""])
def test_every_tensor_of_an_original_checkpoint_is_imported(bases, monkeypatch, nesting):
    model = trained_model(bases)
    source = write_original(bases / "theirs", as_original(model), nesting)
    assert command(monkeypatch, *import_words(bases, source)) == 0
    imported = LLaST.from_pretrained(bases / "imported")
    for name, tensor in model.trained().items():
        assert torch.equal(imported.trained()[name], tensor), name
    config = imported.config
    assert (config.encoder_rank, config.llm_rank, config.window) == (2, 4, "30s")
    assert (config.encoder_alpha, config.llm_alpha) == (1.0, 2.0)  # half of the rank
    assert config.tasks == ("st", "asr")


def test_a_faulty_tensor_of_an_original_checkpoint_is_refused(bases, monkeypatch, capsys):
    whole = as_original(trained_model(bases))
    names = [name for name in whole if ".decoder." not in name]
    for i, name in enumerate(names[::5]):
        for change in ({name: None}, {f"{name}.more": torch.ones(1)}, {name: whole[name][:-1]}):
            tensors = {k: v for k, v in (whole | change).items() if v is not None}
            source = write_original(bases / f"theirs{i}", tensors, "")
            assert command(monkeypatch, *import_words(bases, source)) == 2
            assert "tensors do not fit the configuration" in capsys.readouterr().err
    assert not (bases / "imported").exists()


def test_a_checkpoint_for_another_llm_is_refused(bases, monkeypatch, capsys):
    source = write_original(bases / "theirs", as_original(trained_model(bases)), "state_dict")
    toys.llama_folder(bases / "other", hidden_size=48, head_dim=8)
    words = [bases / "other" if word == bases / "llama" else word for word in
             import_words(bases, source)]  # fmt: skip
    assert command(monkeypatch, *words) == 2
    assert "other shape or type: llm.model.layers.0" in capsys.readouterr().err
    save_file({"a": torch.ones(1)}, bases / "nothing.safetensors")
    assert command(monkeypatch, *import_words(bases, bases / "nothing.safetensors")) == 2
    assert "missing: projector." in capsys.readouterr().err
    assert command(monkeypatch, *import_words(bases, bases / "nowhere.pth")) == 2
    assert "does not exist; name a checkpoint" in capsys.readouterr().err
