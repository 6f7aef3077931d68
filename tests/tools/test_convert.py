"""What was trained goes to transformers and peft and back, and comes in from the original."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import llast
import toys
from data import AUDIO_ID
from llast import LLaST, LLaSTConfig
from tools import convert
from tools.convert import export, read_peft
from translate import beam_search

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
    model = LLaST.fresh(config)
    chance = torch.Generator().manual_seed(0)
    for tensor in model.trained().values():
        tensor.normal_(std=0.2, generator=chance)
    return model.eval()


def command(monkeypatch, *words) -> int:
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, words)])
    return convert.main()


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * theirs.abs().max().item())


# --------------------------------------------------------------------------- transformers and peft


@pytest.fixture
def published(tmp_path):
    """Random weights as transformers itself saves them, Whisper's decoder included."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = toys.WHISPER | {"max_source_positions": 50}
    whisper = transformers.WhisperForConditionalGeneration(
        transformers.WhisperConfig(
            **sizes, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=40,
            vocab_size=70, max_target_positions=9, pad_token_id=0, eos_token_id=2, bos_token_id=1,
            decoder_start_token_id=1,
        )
    )  # fmt: skip
    whisper.save_pretrained(tmp_path / "whisper")
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**toys.LLAMA))
    llama.save_pretrained(tmp_path / "llama")
    tokenizer = (toys.TINY / "llama" / "tokenizer.model").read_bytes()
    (tmp_path / "llama" / "tokenizer.model").write_bytes(tokenizer)
    return tmp_path


MEL = toys.made_up("mel", (2, toys.WHISPER["num_mel_bins"], 100), 1.0)
IDS = torch.tensor([[1, 66, 5, 5, 17, 300, 1000], [1, 8, 33, 3, 60, 61, 62]])


@torch.no_grad()
def test_the_merged_folders_compute_the_same_in_transformers(published):
    transformers = pytest.importorskip("transformers")
    model = trained_model(published)
    states, logits = model.speech_encoder(MEL), model.llm(IDS)
    prompts = list(model.llm.embed(IDS))
    answers = beam_search(model.llm, prompts, [EOS], beams=1, max_new_tokens=8)
    export(model, published / "out")
    assert_close(model.speech_encoder(MEL), states)  # merged by now
    assert_close(model.llm(IDS), logits)

    whisper, about = transformers.WhisperForConditionalGeneration.from_pretrained(
        published / "out" / "whisper", output_loading_info=True
    )
    assert not any(about.values()), about
    assert_close(whisper.eval().model.encoder(MEL).last_hidden_state, states)
    before = load_file(published / "whisper" / "model.safetensors")
    after = load_file(published / "out" / "whisper" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(".encoder.layers." in name for name in changed)

    llama, about = transformers.LlamaForCausalLM.from_pretrained(
        published / "out" / "llama", output_loading_info=True
    )
    assert not any(about.values()), about
    assert_close(llama.eval()(IDS).logits, logits)
    generated = llama.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, do_sample=False,
        eos_token_id=EOS, pad_token_id=EOS,
    )  # fmt: skip
    for row, [best] in zip(generated[:, IDS.shape[1] :].tolist(), answers, strict=True):
        assert (row[: row.index(EOS)] if EOS in row else row) == best.ids


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


# ------------------------------------------------------------------------------------ out and back


def test_exported_and_imported_again_nothing_has_changed(bases, monkeypatch, capsys):
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


@pytest.mark.parametrize("merged", ["whisper", "llama"])
def test_an_import_onto_merged_bases_is_refused(bases, monkeypatch, capsys, merged):
    export(trained_model(bases), bases / "out")
    at = {name: bases / name for name in ("whisper", "llama")} | {merged: bases / "out" / merged}
    words = ["import", bases / "out", "--encoder", at["whisper"], "--llm", at["llama"]]
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    assert "was trained on another" in capsys.readouterr().err
    assert not (bases / "back").exists()


def test_the_merged_folders_are_a_llast_without_lora(bases):
    model = trained_model(bases)
    ids = torch.tensor([1, 300, AUDIO_ID, 301])
    speech = model.encode_speech([torch.sin(torch.arange(4000) / 9.0)])[0]
    expected = model.llm.hidden(model.splice(ids, speech)[None])[0]
    export(model, bases / "out")
    config = replace(
        model.config, encoder=str(bases / "out" / "whisper"), llm=str(bases / "out" / "llama"),
        encoder_rank=0, llm_rank=0,
    )  # fmt: skip
    merged = LLaST.fresh(config).eval()
    merged.projector.load_state_dict(load_file(bases / "out" / "projector.safetensors"))
    speech = merged.encode_speech([torch.sin(torch.arange(4000) / 9.0)])[0]
    assert_close(merged.llm.hidden(merged.splice(ids, speech)[None])[0], expected)


def test_what_is_there_is_not_written_over(bases, monkeypatch, capsys):
    trained_model(bases).save_pretrained(bases / "run")
    assert command(monkeypatch, "export", bases / "run", "--out", bases / "llama") == 2
    assert "llama is there already; name another folder" in capsys.readouterr().err


def test_what_fails_half_way_leaves_nothing(bases, monkeypatch, capsys):
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
        assert not (bases / "out").exists()


@pytest.mark.parametrize("name", ["llm-lora/adapter_model", "projector", "encoder-lora/adapter"])
def test_a_damaged_file_of_an_export_is_refused(bases, monkeypatch, capsys, name):
    export(trained_model(bases), bases / "out")
    ending = "_config.json" if name.endswith("adapter") else ".safetensors"
    (bases / "out" / f"{name}{ending}").write_bytes(b"{")
    words = ["import", bases / "out", "--encoder", bases / "whisper", "--llm", bases / "llama"]
    assert command(monkeypatch, *words, "--out", bases / "back") == 2
    told = capsys.readouterr().err
    assert told.startswith("convert.py: ") and "cannot be read" in told


@pytest.mark.parametrize(
    "change", [{"use_dora": True}, {"bias": "all"}, {"rank_pattern": {"q_proj": 3}}]
)
def test_an_adapter_of_another_kind_is_refused_by_name(bases, change):
    export(trained_model(bases), bases / "out")
    file = bases / "out" / "llm-lora" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=f"asks for .*{next(iter(change))}.*not built here"):
        read_peft(bases / "out" / "llm-lora")


def test_an_adapter_of_another_model_is_refused(bases):
    export(trained_model(bases), bases / "out")
    with pytest.raises(ValueError, match="does not begin with base_model.model.encoder."):
        read_peft(bases / "out" / "llm-lora", "encoder.")


# ---------------------------------------------------------------------- checkpoints of the original


def as_original(model: LLaST) -> dict[str, torch.Tensor]:
    """The names that the original's state_dict has, written down from its code."""
    tensors = {}
    for name, tensor in model.trained().items():
        if name.startswith("speech_encoder."):
            name = name.replace("speech_encoder.", "speech_encoder.base_model.model.encoder.")
        elif name.startswith("llm."):
            name = name.replace("llm.", "llm.base_model.model.")
        if name.endswith(("lora_A", "lora_B")):
            name += ".default.weight"
        tensors[name] = tensor.clone()
    dead = "speech_encoder.base_model.model.decoder.layers.0.encoder_attn.q_proj.lora_A"
    tensors[f"{dead}.default.weight"] = torch.ones(2, 24)
    return tensors


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
def test_a_checkpoint_of_the_original_lands_completely(bases, monkeypatch, nesting):
    model = trained_model(bases)
    source = write_original(bases / "theirs", as_original(model), nesting)
    assert command(monkeypatch, *import_words(bases, source)) == 0
    imported = LLaST.from_pretrained(bases / "imported")
    for name, tensor in model.trained().items():
        assert torch.equal(imported.trained()[name], tensor), name
    about = imported.config
    assert (about.encoder_rank, about.llm_rank, about.window) == (2, 4, "30s")
    assert (about.encoder_alpha, about.llm_alpha) == (1.0, 2.0)  # half of the rank


def test_any_tensor_missing_extra_or_of_another_shape_is_refused(bases, monkeypatch, capsys):
    whole = as_original(trained_model(bases))
    names = [name for name in whole if ".decoder." not in name]
    for i, name in enumerate(names[::5]):
        for change in ({name: None}, {f"{name}.more": torch.ones(1)}, {name: whole[name][:-1]}):
            tensors = {k: v for k, v in (whole | change).items() if v is not None}
            source = write_original(bases / f"theirs{i}", tensors, "")
            assert command(monkeypatch, *import_words(bases, source)) == 2
            told = capsys.readouterr().err
            assert any(word in told for word in ("missing", "unexpected", "of another shape")), told
    assert not (bases / "imported").exists()


def test_a_checkpoint_for_another_llm_is_refused(bases, monkeypatch, capsys):
    source = write_original(bases / "theirs", as_original(trained_model(bases)), "state_dict")
    toys.llama_folder(bases / "other", hidden_size=48, head_dim=8)
    words = [bases / "other" if word == bases / "llama" else word for word in
             import_words(bases, source)]  # fmt: skip
    assert command(monkeypatch, *words) == 2
    assert "of another shape: llm.model.layers.0" in capsys.readouterr().err
    save_file({"a": torch.ones(1)}, bases / "nothing.safetensors")
    assert command(monkeypatch, *import_words(bases, bases / "nothing.safetensors")) == 2
    assert "missing: projector." in capsys.readouterr().err
    assert command(monkeypatch, *import_words(bases, bases / "nowhere.pth")) == 2
    assert "is not there; name a checkpoint" in capsys.readouterr().err
