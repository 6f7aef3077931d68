"""tools/plan.py: its parameters, memory and arithmetic are those of the model that is built."""

import re
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import toys
import train
from data import AUDIO_ID, IGNORE, Batch
from llast import LLaST, LLaSTConfig
from lora import merge_lora
from tools import plan
from tools.cost import encoder_flops
from translate import SearchOptions, beam_search

# Published by the paper's configurations: facts of the system, not of this code.
COUNTS = {
    "llast-2b": {"projector": 11_016_192, "LLM LoRA": 403_701_760},
    "llast-8b": {"projector": 38_809_600, "LLM LoRA": 1_279_262_720},
    "llast-14b": {"projector": 58_997_760, "LLM LoRA": 2_002_780_160},
}


def planned(capsys, *flags) -> str:
    assert plan.main([*flags]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("preset", COUNTS)
def test_the_papers_systems_have_their_number_of_parameters(capsys, preset):
    lines = planned(capsys, preset).splitlines()
    table = {line[:14].strip(): line[14:].split() for line in lines[2:8]}
    assert table["encoder"] == ["0", "636,784,640"]
    assert table["encoder LoRA"] == ["94,371,840", "0"]
    for part, n in COUNTS[preset].items():
        assert table[part] == [f"{n:,}", "0"]


def test_the_papers_mix_has_its_number_of_rows(capsys):
    out = planned(capsys, "llast-2b")
    assert "an epoch    2,065,970 rows" in out


def test_the_plan_prints_the_commands_that_get_the_models_and_the_corpus(capsys):
    out = planned(capsys, "llast-8b")
    assert "hf download openai/whisper-large-v2 config.json model.safetensors --local-dir" in out
    assert "hf download NousResearch/Llama-2-7b-chat-hf --exclude '*.bin' --local-dir" in out
    assert "prepare.py covost2 --common-voice CV --covost COVOST --lang paper --out" in out


@pytest.mark.parametrize("preset", sorted(train.PRESETS.keys() - {"tiny"}))
def test_the_readme_states_the_memory_that_the_plan_prints(capsys, preset):
    out = planned(capsys, preset)
    [total] = re.findall(r"^    all +([\d.]+)$", out, re.M)
    readme = (Path(plan.__file__).parent / "README.md").read_text()
    [claimed] = re.findall(rf"^\| `{preset}` \|.*\| ([\d.]+) GB \| `python", readme, re.M)
    assert float(claimed) == pytest.approx(float(total), abs=0.051)


README = (Path(plan.__file__).parent / "README.md").read_text()


@pytest.mark.parametrize(
    ("flags", "sizes"),
    re.findall(r"^\| `(llast-\S+(?: --llm[^`]*)?)` \| ([\d. |]+) \|$", README, re.M),
)
def test_the_readme_states_memory_and_sent_bytes_of_eight_gpus(capsys, flags, sizes):
    out = planned(capsys, *flags.split(), "--gpus", "8")
    [memory] = re.findall(r"^    all +(\S+) +(\S+)$", out, re.M)
    [sent] = re.findall(r"^    a GPU sends in each step +(\S+) +(\S+)$", out, re.M)
    planned_sizes = [float(size) for size in memory + sent]
    assert [float(size) for size in sizes.split("|")] == pytest.approx(planned_sizes, abs=0.051)


def test_one_gpu_sends_nothing_and_eight_share_the_work(capsys):
    one, eight = planned(capsys, "llast-8b"), planned(capsys, "llast-8b", "--gpus", "8")
    assert "sends" not in one and "in 51,650 steps" in one and "time        34.6 h" in one
    assert "in 6,457 steps" in eight and "time        4.3 h" in eight
    assert plan.main(["llast-8b", "--gpus", "0"]) == 2


def test_missing_weights_are_an_error_with_the_download_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "--preset", "llast-8b"])
    assert train.main() == 2
    assert "whisper-large-v2 does not exist; get it with" in capsys.readouterr().err


def test_the_embedded_default_is_planned_on_its_own_corpus(capsys):
    out = planned(capsys, "tiny", "--lang", "fr")
    assert "training rows in" in out and "fr-en              1,360       1,360" in out
    assert "main memory: decoded clips     0.17" in out  # 44.4 minutes of float32 at 16 kHz
    assert "main memory: decoded clips     2.00" in planned(capsys, "llast-8b")
    out = planned(capsys, "tiny", "--lang", "fr,de", "--clips", "300")
    assert "fr-en                300         300" in out and "de-en                300" in out


def test_only_clips_with_a_transcript_count_as_transcribed(tmp_path, capsys):
    clips = train.TINY / "corpus" / "fr" / "clips"
    (tmp_path / "fr").mkdir()
    (tmp_path / "fr" / "clips").symlink_to(clips)
    names = sorted(path.name for path in clips.iterdir())[:4]
    rows = [(name, "oui" * (i == 0), "yes", "train") for i, name in enumerate(names)]
    toys.write_corpus(tmp_path, rows)
    out = planned(capsys, "tiny", "--lang", "fr", "--data", str(tmp_path))
    assert "fr-en                  4           1" in out
    toys.write_corpus(tmp_path, [])
    assert plan.main(["tiny", "--lang", "fr", "--data", str(tmp_path)]) == 2
    assert "the fr-en corpus in" in capsys.readouterr().err


# --------------------------------------------------------------------- against a real training step

SIZES = dict(hidden_size=64, intermediate_size=176, num_hidden_layers=3, num_attention_heads=8,
             num_key_value_heads=2, head_dim=8)  # fmt: skip
WIDE = dict(d_model=48, encoder_layers=3, encoder_attention_heads=6, encoder_ffn_dim=192)
B, S, P = 2, 40, 40 + plan.TEXT


def settings_for(folder, **changes) -> train.Preset:
    about = asdict(train.PRESETS["tiny"]) | changes
    return train.Preset(**about | {"encoder": folder / "whisper", "llm": folder / "llama"})


@pytest.fixture
def built(tmp_path):
    """A model in bfloat16 and a batch of B clips, each of S states and P positions."""

    def build(times=1, **changes):
        settings = settings_for(tmp_path, **changes)
        if not settings.llm.exists():
            wider = {"d_model": times * 48, "encoder_ffn_dim": times * 192}
            toys.whisper_folder(settings.encoder, **WIDE | wider)
            wider = {"hidden_size": times * 64, "intermediate_size": times * 176}
            toys.llama_folder(settings.llm, **SIZES | wider | {"head_dim": times * 8})
        model = LLaST.fresh(train.model_config(settings), torch.bfloat16)
        model.speech_encoder.recompute = settings.recompute == "all"
        model.llm.recompute = settings.recompute != "none"
        prompt = [1, AUDIO_ID] + [5] * (plan.TEXT - plan.ANSWER - 1)
        answer = [7] * plan.ANSWER
        batch = Batch(
            [],
            [torch.sin(torch.arange(320 * S) / 7.0) for _ in range(B)],
            torch.tensor([prompt + answer] * B),
            torch.tensor([[IGNORE] * len(prompt) + answer] * B),
            torch.tensor([len(prompt) + len(answer)] * B),
            [1] * B,
        )
        return settings, model.train(), batch

    return build


def kept_bytes(model, batch) -> int:
    """What the backward pass keeps of the forward pass, weights left out."""
    known = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage  # held, so that no other gets its address
        return tensor

    # On a CPU, llama.py computes attention in float32. The plan is for a GPU.
    attend = F.scaled_dot_product_attention

    def in_bfloat16(q, k, v, **options):
        return attend(q.bfloat16(), k.bfloat16(), v.bfloat16(), **options)

    with (
        pytest.MonkeyPatch.context() as patch,
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
    ):
        patch.setattr(F, "scaled_dot_product_attention", in_bfloat16)
        loss = model(batch).sum()
    assert loss.isfinite()
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("dropout", [0.0, 0.05])
def test_planned_activations_are_what_the_backward_pass_keeps(built, dropout):
    settings, model, batch = built(dropout=dropout, encoder_rank=4, llm_rank=6)
    W, L = model.speech_encoder.config, model.llm.config
    planned = plan.activation_bytes(settings, W, L, B, S, P)
    planned -= B * plan.ANSWER * 6 * L.vocab_size  # logits: 6 of 10 bytes are soon gone again
    if dropout:  # a CPU's mask takes two bytes for each input of a LoRA, a GPU's takes one
        in_encoder = W.encoder_layers * (5 * W.d_model + W.encoder_ffn_dim)
        in_llm = L.num_hidden_layers * (6 * L.hidden_size + L.intermediate_size)
        in_last_mlp = 2 * L.hidden_size + L.intermediate_size  # works only on answers
        planned += B * (S * in_encoder + P * in_llm - (P - plan.ANSWER) * in_last_mlp)
    assert kept_bytes(model, batch) == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize("recompute", ["llm", "all"])
def test_recomputing_saves_the_planned_memory(built, recompute):
    settings, plain, batch = built(encoder_rank=4, llm_rank=6)
    _, again, _ = built(encoder_rank=4, llm_rank=6, recompute=recompute)

    def planned(W, L, recompute="none"):
        return plan.activation_bytes(replace(settings, recompute=recompute), W, L, B, S, P)

    W, L = plain.speech_encoder.config, plain.llm.config
    everything = planned(W, L)
    of_encoder = planned(replace(W, encoder_layers=W.encoder_layers + 1), L) - everything
    of_llm = planned(W, replace(L, num_hidden_layers=L.num_hidden_layers + 1)) - everything
    # The layer that is open in the backward pass is not yet there after the forward pass.
    open_layer = of_llm if recompute == "llm" else max(of_encoder, of_llm)
    saved = everything - (planned(W, L, recompute) - open_layer)
    measured = kept_bytes(plain, batch) - kept_bytes(again, batch)
    assert measured == pytest.approx(saved, rel=0.1)


class Live(TorchDispatchMode):
    """The most bytes held at once by tensors that were made inside."""

    def __init__(self, model):
        super().__init__()
        self.weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.held, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.weights:
                    self.held[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.held = {k: held for k, held in self.held.items() if not held[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.held.values()))
        return out


@pytest.mark.parametrize("window, beams", [("30s", 5), ("clip", 5), ("clip", 80)])
def test_translation_needs_the_planned_memory(built, monkeypatch, window, beams):
    """The encoder takes the most, or the prompts, or the steps."""
    monkeypatch.setattr(plan, "CLIPS", B)
    settings, model, batch = built(times=8, beams=beams, window=window)
    merge_lora(model.eval())
    ids = batch.ids[0, : plan.TEXT - plan.ANSWER]
    with torch.no_grad(), Live(model) as live:
        prompts = [model.splice(ids, speech, 1) for speech in model.encode_speech(batch.audio)]
        # Without its inference mode, in which no tensor could be watched.
        beam_search.__wrapped__(model.llm, prompts, [-1], SearchOptions(beams, 1.0, plan.ANSWER))
    W, L = model.speech_encoder.config, model.llm.config
    states = W.max_source_positions if window == "30s" else S
    planned = plan.translation_bytes(settings, W, L, states, P - plan.ANSWER)
    assert live.peak == pytest.approx(planned, rel=0.1)


@pytest.mark.parametrize(
    "recompute, window", [*((part, "clip") for part in ("none", "llm", "all")), ("none", "30s")]
)
def test_planned_arithmetic_is_that_of_a_training_step(built, recompute, window):
    # Wide, so that the LLM's attention, which the counter leaves out on a CPU, is a small part.
    settings, model, batch = built(times=8, recompute=recompute, window=window)
    model.float()  # the same arithmetic, which a CPU without bfloat16 does many times faster
    # The counter knows all of our products but the one that LoRA does in place.
    in_place = {torch.ops.aten.addmm_: lambda y, a, b, **_: 2 * a[0] * a[1] * b[1]}
    counter = FlopCounterMode(display=False, custom_mapping=in_place)
    with counter:
        model(batch).sum().backward()
    W, L = model.speech_encoder.config, model.llm.config
    states = W.max_source_positions if window == "30s" else S
    planned = B * plan.example_flops(settings, W, L, states, S, plan.TEXT, plan.ANSWER)
    again = recompute == "all"
    planned -= (3.5 + again) * B * encoder_flops(W, states, S)[2]  # it leaves this out as well
    assert counter.get_total_flops() == pytest.approx(planned, rel=0.04)


def test_recomputed_gradients_are_the_gradients(built):
    found = []
    for recompute in ("none", "llm", "all"):
        torch.manual_seed(0)
        _, model, batch = built(dropout=0.1, recompute=recompute)
        chance = torch.Generator().manual_seed(1)
        for tensor in model.trained().values():
            tensor.normal_(std=0.1, generator=chance)
        torch.manual_seed(2)  # the same dropout
        model(batch).sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    plain, *others = found
    for again in others:
        assert plain.keys() == again.keys() and plain
        for name in plain:
            assert plain[name].any(), name
            assert torch.equal(plain[name], again[name]), name


@pytest.mark.parametrize("preset", train.PRESETS)
def test_every_preset_is_complete(preset):
    settings = train.PRESETS[preset]
    train.parse_directions(settings.lang)
    assert settings.template in train.TEMPLATES and settings.window in train.WINDOWS
    assert isinstance(train.model_config(settings), LLaSTConfig)
