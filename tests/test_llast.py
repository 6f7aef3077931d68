"""llast.py: the speech in the prompt, the loss, what is trained, saving and loading."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import llast
import toys
import train
from data import AUDIO_ID, IGNORE, Batch
from llast import LLaST, LLaSTConfig, fingerprint, pick_device
from lora import merge_lora
from whisper_encoder import WINDOWS


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases")
    toys.whisper_folder(folder / "whisper")
    toys.llama_folder(folder / "llama")
    return folder


def config_for(bases: Path, **changes) -> LLaSTConfig:
    standard = dict(
        template="llama2", window="clip", encoder_rank=2, encoder_alpha=4.0, llm_rank=3,
        llm_alpha=6.0, dropout=0.1, directions=("fr-en",),
    )  # fmt: skip
    paths = {"encoder": str(bases / "whisper"), "llm": str(bases / "llama")}
    return LLaSTConfig(**paths | standard | changes)


def trained_model(bases: Path, **changes) -> LLaST:
    """A LLaST whose projector and LoRAs, B included, are no longer fresh."""
    model = LLaST.fresh(config_for(bases, **changes))
    chance = torch.Generator().manual_seed(0)
    for tensor in model.trained().values():
        # Wide enough for a clip to move every loss by far more than the tests' tolerance.
        tensor.normal_(std=0.3, generator=chance)
    return model.eval()


def hum(seconds: float, hertz: float = 300.0) -> Tensor:
    return 0.4 * torch.sin(2 * torch.pi * hertz * torch.arange(round(16000 * seconds)) / 16000)


# A clip, its prompt with AUDIO_ID in it, and its answer with the end token: lengths all differ.
ROWS = [
    (hum(0.33, 200), [1, 300, 301, AUDIO_ID, 302, 303], [400, 401, 402, 403, 2]),
    (hum(0.11, 900), [1, AUDIO_ID, 304], [404, 2]),
    (hum(0.52, 500), [1, 305, AUDIO_ID, 306, 307, 308, 309], [405, 406, 407, 408, 409, 410, 2]),
]


def batch_of(rows) -> Batch:
    T = max(len(prompt) + len(answer) for _, prompt, answer in rows)
    ids = torch.zeros(len(rows), T, dtype=torch.long)
    labels = torch.full((len(rows), T), IGNORE)
    for i, (_, prompt, answer) in enumerate(rows):
        ids[i, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
        labels[i, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
    lengths = torch.tensor([len(prompt) + len(answer) for _, prompt, answer in rows])
    audio_at = [prompt.index(AUDIO_ID) for _, prompt, _ in rows]
    return Batch([], [clip for clip, _, _ in rows], ids, labels, lengths, audio_at)


@torch.no_grad()
def losses(model: LLaST, rows=ROWS) -> Tensor:
    return model(batch_of(rows))


# ------------------------------------------------------------------------------- speech among words


def test_splice_puts_speech_in_place_of_the_audio_id(bases):
    model = trained_model(bases)
    speech = torch.randn(4, toys.LLAMA["hidden_size"])
    row = model.splice(torch.tensor([1, 300, AUDIO_ID, 301]), speech, 2)
    words = model.llm.model.embed_tokens.weight
    assert torch.equal(row, torch.cat([words[[1, 300]], speech, words[[301]]]))


@torch.no_grad()
@pytest.mark.parametrize("window", WINDOWS)
def test_a_clip_becomes_one_embedding_for_each_of_its_states(bases, window):
    model = trained_model(bases, window=window)
    clip = hum(0.33)  # 17 states
    mel = llast.clip_to_mel(clip, toys.WHISPER["num_mel_bins"], window)[None]
    states = model.speech_encoder(mel)[0][:17]  # (S, Da)
    speech = model.encode_speech([clip])[0]
    assert speech.shape == (17, toys.LLAMA["hidden_size"])
    torch.testing.assert_close(speech, model.projector(states), rtol=1e-4, atol=1e-4)


def test_a_clip_of_10_ms_is_one_position(bases):
    model = trained_model(bases)
    assert model.encode_speech([hum(0.01)])[0].shape == (1, toys.LLAMA["hidden_size"])
    assert losses(model, [(hum(0.01), *ROWS[0][1:])]).isfinite().all()


# ----------------------------------------------------------------------------------------- the loss


@torch.no_grad()
def slow_losses(model: LLaST, clip: Tensor, prompt: list[int], answer: list[int]) -> list[Tensor]:
    """The loss of each token of one answer, from all logits of a batch of one row."""
    speech = model.encode_speech([clip])[0]
    pieces = [speech if i == AUDIO_ID else model.llm.embed(torch.tensor([i])) for i in prompt]
    x = torch.cat([*pieces, model.llm.embed(torch.tensor(answer))])  # (P, D)
    log_probs = model.llm.logits(model.llm.hidden(x[None])[0])[0].log_softmax(-1)  # (P, V)
    start = len(x) - len(answer)
    return [-log_probs[start + i - 1, token] for i, token in enumerate(answer)]


@pytest.mark.parametrize("window", WINDOWS)
def test_the_loss_equals_a_slow_loop_over_answer_tokens(bases, window):
    model = trained_model(bases, window=window)
    slow = [loss for row in ROWS for loss in slow_losses(model, *row)]
    torch.testing.assert_close(losses(model), torch.stack(slow), rtol=0, atol=1e-4)


def test_each_loss_belongs_to_a_row_of_the_batch(bases):
    model, batch = trained_model(bases), batch_of(ROWS)
    with torch.no_grad():
        loss = model(batch)
    rows = (batch.labels != IGNORE).nonzero()[:, 0]
    assert rows.tolist() == [0] * 5 + [1] * 2 + [2] * 7
    for i, row in enumerate(ROWS):
        torch.testing.assert_close(loss[rows == i], losses(model, [row]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("window", WINDOWS)
def test_the_loss_of_a_row_does_not_depend_on_other_rows(bases, window):
    model = trained_model(bases, window=window)
    single = torch.cat([losses(model, [row]) for row in ROWS])
    torch.testing.assert_close(losses(model), single, rtol=0, atol=1e-4)


def test_an_answer_token_cannot_change_the_losses_before_it(bases):
    model = trained_model(bases)
    clip, prompt, answer = ROWS[2]
    before = losses(model, [ROWS[2]])
    for i in range(len(answer)):
        other = [*answer[:i], 500, *answer[i + 1 :]]
        after = losses(model, [(clip, prompt, other)])
        assert torch.equal(after[:i], before[:i])
        assert (after[i:] != before[i:]).all()


def test_another_clip_of_the_same_length_gives_another_loss(bases):
    model = trained_model(bases)
    clip, prompt, answer = ROWS[0]
    other = hum(len(clip) / 16000, hertz=1234)
    difference = losses(model, [(other, prompt, answer)]) - losses(model, [ROWS[0]])
    assert (difference.abs() > 1e-3).all()


# ---------------------------------------------------------------------------------- what is trained


def test_attention_in_training_needs_no_mask(bases, monkeypatch):
    """With a mask there is no flash kernel on a GPU."""
    model, calls = trained_model(bases, window="30s"), []
    attend = F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, is_causal=False, **options):
        calls.append((attn_mask, is_causal))
        return attend(q, k, v, attn_mask=attn_mask, is_causal=is_causal, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watch)
    model(batch_of(ROWS))
    assert calls == [(None, False)] * 2 + [(None, True)] * 2  # encoder and LLM have two layers each


KERNELS = {"MATH": 2, "FLASH_ATTENTION": 2, "CUDNN_ATTENTION": 2, "EFFICIENT_ATTENTION": 4}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", KERNELS)
def test_each_attention_kernel_takes_the_shapes_of_training(tmp_path, kernel):
    toys.whisper_folder(tmp_path / "whisper", d_model=64, encoder_attention_heads=4)
    heads = {"num_attention_heads": 4, "num_key_value_heads": KERNELS[kernel], "head_dim": 16}
    toys.llama_folder(tmp_path / "llama", hidden_size=64, **heads)
    config = config_for(tmp_path, window="30s", dropout=0.0)
    model = LLaST.fresh(config, torch.bfloat16, "cuda").train()
    results = []
    for name in (kernel, "MATH"):
        with sdpa_kernel(getattr(SDPBackend, name)):  # refuses the shapes with an error if it must
            loss = model(batch_of(ROWS))
            loss.sum().backward()
        grads = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        results.append((loss.detach(), torch.cat([grad.flatten() for grad in grads])))
    (loss, grads), (expected, by_math) = results
    torch.testing.assert_close(loss, expected, rtol=0.05, atol=0.05)
    assert (grads - by_math).norm() < 0.1 * by_math.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_the_cpu_does_not_wait_for_the_gpu_during_a_forward_and_a_backward_pass(bases, recompute):
    config = config_for(bases, window="30s", dropout=0.1)
    model = LLaST.fresh(config, torch.bfloat16, "cuda").train()
    model.speech_encoder.recompute = model.llm.recompute = recompute
    batch = train.to_device(batch_of(ROWS), model.device)
    model(batch).sum().backward()  # the first call fills caches
    torch.cuda.set_sync_debug_mode("error")  # now waiting is an error
    try:
        model(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_gradients_reach_the_projector_and_both_loras_and_nothing_else(bases):
    model = trained_model(bases)
    model(batch_of(ROWS)).mean().backward()
    wrapped = [
        f"{base}.layers.{i}.{name}"
        for base, parts in (
            ("speech_encoder", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                "self_attn.out_proj", "fc1", "fc2")),
            ("llm.model", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                           "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        )
        for i in range(2)
        for name in parts
    ]  # fmt: skip
    expected = {f"{name}.lora_{x}" for name in wrapped for x in "AB"}
    expected |= {f"projector.model.{i}.{x}" for i in (0, 2, 4) for x in ("weight", "bias")}
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert reached == expected
    assert set(model.trained()) == expected


@pytest.mark.parametrize(
    ("off", "without"), [("encoder_rank", "speech_encoder"), ("llm_rank", "llm")]
)
def test_rank_0_leaves_that_base_without_lora(bases, off, without):
    model = LLaST.fresh(config_for(bases, **{off: 0}))
    assert {name.split(".")[0] for name in model.trained()} == {
        "projector", "speech_encoder", "llm",
    } - {without}  # fmt: skip


def test_the_projector_starts_the_same_for_every_rank(bases):
    projectors = []
    for ranks in ({}, {"encoder_rank": 5}, {"encoder_rank": 0, "llm_rank": 0}):
        torch.manual_seed(3)
        projectors.append(LLaST.fresh(config_for(bases, **ranks)).projector.state_dict())
    for name, tensor in projectors[0].items():
        assert all(torch.equal(other[name], tensor) for other in projectors[1:]), name


def test_a_fresh_lora_changes_nothing(bases):
    fresh = LLaST.fresh(config_for(bases)).eval()
    plain = LLaST.fresh(config_for(bases, encoder_rank=0, llm_rank=0)).eval()
    plain.projector.load_state_dict(fresh.projector.state_dict())
    assert torch.equal(losses(fresh), losses(plain))


def test_a_tokenizer_with_more_tokens_than_the_llm_is_an_error(bases, tmp_path):
    toys.llama_folder(tmp_path / "small", vocab_size=100)
    with pytest.raises(ValueError, match=r"token with id 1299, but the weights have only 100"):
        LLaST.fresh(config_for(bases, llm=str(tmp_path / "small")))


def test_an_added_token_that_no_template_uses_may_be_beyond_the_weights(bases, tmp_path):
    folder = shutil.copytree(bases / "llama", tmp_path / "llama")
    (folder / "added_tokens.json").write_text(
        '{"<pad>": 1300, "<|im_start|>": 5, "<|im_end|>": 1300}'
    )
    LLaST.fresh(config_for(bases, llm=str(folder)))
    with pytest.raises(ValueError, match="token with id 1300, but the weights have only"):
        LLaST.fresh(config_for(bases, llm=str(folder), template="chatml"))


# ------------------------------------------------------------------------------- saving and loading


@pytest.fixture
def tree(bases, tmp_path):
    """A folder of one's own with both bases and, in run/, a saved model."""
    tree = tmp_path / "tree"
    shutil.copytree(bases, tree)
    trained_model(tree).save_pretrained(tree / "run")
    yield tree


def change(file: Path, edit):
    """Change the tensors of a file and keep its metadata."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata)


def change_description(tree: Path, edit):
    """Change what llast.json says."""
    description = json.loads((tree / "run" / "llast.json").read_text())
    edit(description)
    (tree / "run" / "llast.json").write_text(json.dumps(description))


def sign(tree: Path):
    """Store the digests of both files, as for a model that was saved in this state."""
    description = json.loads((tree / "run" / "llast.json").read_text())
    file = tree / "run" / "llast.safetensors"
    weights = load_file(file)
    content = [description["config"], description["fingerprints"]]
    save_file(weights, file, llast.digests_of(content, weights))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_loaded_model_is_the_saved_one_bit_for_bit(bases, tmp_path, window):
    model = trained_model(bases, window=window)
    model.save_pretrained(tmp_path / "run")
    loaded = LLaST.from_pretrained(tmp_path / "run")
    assert not loaded.training
    assert loaded.trained().keys() == model.trained().keys()
    assert torch.equal(losses(loaded), losses(model))


def test_only_what_was_trained_is_saved(tree):
    assert sorted(path.name for path in (tree / "run").iterdir()) == [
        "llast.json",
        "llast.safetensors",
    ]
    saved = load_file(tree / "run" / "llast.safetensors")
    assert saved.keys() == trained_model(tree).trained().keys()


def test_both_saved_files_have_the_same_permissions(tree):
    about, weights = (tree / "run" / f"llast.{kind}" for kind in ("json", "safetensors"))
    assert weights.stat().st_mode == about.stat().st_mode


def test_saving_again_replaces_the_earlier_model(tree):
    model = trained_model(tree)
    model.projector.model[0].weight.data += 1
    model.save_pretrained(tree / "run")
    assert torch.equal(losses(LLaST.from_pretrained(tree / "run")), losses(model))


@pytest.mark.parametrize(
    "name",
    [
        "projector.model.2.bias",
        "speech_encoder.layers.1.fc1.lora_A",
        "speech_encoder.layers.0.self_attn.k_proj.lora_B",
        "llm.model.layers.1.self_attn.o_proj.lora_A",
        "llm.model.layers.0.mlp.gate_proj.lora_B",
    ],
)
def test_a_faulty_tensor_is_an_error_that_names_it(tree, name):
    file = tree / "run" / "llast.safetensors"
    whole = file.read_bytes()
    for fault, edit in (toys.FAULTS | toys.INTEGERS).items():
        file.write_bytes(whole)
        change(file, lambda weights, edit=edit: edit(weights, name))
        sign(tree)
        with pytest.raises(ValueError, match=f" 1 tensors .*: {fault}: {name}"):
            LLaST.from_pretrained(tree / "run")


def test_a_saved_model_cannot_contain_weights_of_a_base(tree):
    head = torch.zeros(toys.LLAMA["vocab_size"], toys.LLAMA["hidden_size"])
    change(tree / "run" / "llast.safetensors", lambda w: w.update({"llm.lm_head.weight": head}))
    sign(tree)
    with pytest.raises(ValueError, match=r"unexpected: llm\.lm_head\.weight"):
        LLaST.from_pretrained(tree / "run")


def test_a_model_of_another_rank_is_an_error(tree):
    change_description(tree, lambda d: d["config"].update(llm_rank=d["config"]["llm_rank"] + 1))
    sign(tree)
    with pytest.raises(ValueError, match="28 tensors .*: other shape or type: llm.model"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("name", ["encoder_alpha", "template", "window", "directions", "tasks"])
def test_a_changed_description_is_an_error(tree, name):
    other = {"encoder_alpha": 40.0, "template": "plain", "window": "30s", "directions": ["de-en"],
             "tasks": ["st"]}  # fmt: skip
    change_description(tree, lambda d: d["config"].update({name: other[name]}))
    with pytest.raises(ValueError, match=r"or were changed: see llast\.json;"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("place", [0.01, 0.5, 0.99])
def test_one_flipped_bit_of_a_tensor_is_an_error(tree, place):
    file = tree / "run" / "llast.safetensors"
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")  # of the numbers, behind the header
    content[start + int(place * (len(content) - start))] ^= 4
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"or were changed: see llast\.safetensors;"):
        LLaST.from_pretrained(tree / "run")


def test_files_of_two_different_models_are_an_error(tree):
    other = trained_model(tree, llm_alpha=9.0)
    other.save_pretrained(tree / "other")
    shutil.copy(tree / "other" / "llast.json", tree / "run")
    with pytest.raises(ValueError, match="do not belong together"):
        LLaST.from_pretrained(tree / "run")


def test_a_save_that_stops_between_its_files_leaves_a_model_that_loads(tree, monkeypatch):
    model = trained_model(tree)
    model.projector.model[0].weight.data += 1
    replace, names = os.replace, []

    def stop(source, target):
        names.append(target.name)
        if len(names) == 2:
            raise KeyboardInterrupt
        replace(source, target)

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(tree / "run")
    assert names == ["llast.safetensors", "llast.json"]
    assert torch.equal(losses(LLaST.from_pretrained(tree / "run")), losses(model))


@pytest.mark.parametrize("number", [1, 2, "3", None])
def test_another_version_of_the_format_is_an_error(tree, number):
    change_description(tree, lambda d: d["versions"].update(llast=number))
    with pytest.raises(ValueError, match=f"llast.json has format {number!r}, but .* reads only 3"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("fingerprints", [None, {}, [], {"encoder": "0"}, {"llm": "0"}])
def test_missing_fingerprints_are_an_error(tree, fingerprints):
    change_description(tree, lambda d: d.update(fingerprints=fingerprints))
    with pytest.raises(ValueError, match="llast.json: fingerprints must contain .*found"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("name", LLaSTConfig.__dataclass_fields__)
def test_a_value_of_another_type_is_an_error_that_names_it(tree, name):
    for value in ({}, None, True, -1, 10**400):
        change_description(tree, lambda d, value=value: d["config"].update({name: value}))
        sign(tree)
        with pytest.raises(ValueError, match=f"llast.json.* {name}"):
            LLaST.from_pretrained(tree / "run")


def test_a_saved_model_knows_its_tasks(bases, tmp_path):
    trained_model(bases, tasks=("st",)).save_pretrained(tmp_path / "run")
    assert LLaST.from_pretrained(tmp_path / "run").config.tasks == ("st",)
    assert config_for(bases).tasks == ("st", "asr")


def test_damaged_weights_are_an_error(tree):
    file = tree / "run" / "llast.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"run/llast\.safetensors cannot be read"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("name", ["llast.json", "llast.safetensors"])
def test_a_folder_without_one_of_the_files_is_not_a_saved_model(tree, name):
    (tree / "run" / name).unlink()
    with pytest.raises(FileNotFoundError, match=f"is not a saved LLaST: it has no {name}"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize("text", ["", '{"config": ', "{}", '{"config": {}}', "[]", "[" * 200_000])
def test_a_broken_llast_json_is_an_error_that_names_it(tree, text):
    (tree / "run" / "llast.json").write_text(text)
    with pytest.raises(ValueError, match=r"run/llast\.json"):
        LLaST.from_pretrained(tree / "run")


@pytest.mark.parametrize(
    ("kind", "folder", "tensor"),
    [
        ("encoder", "whisper", "model.encoder.layers.1.fc1.bias"),
        ("llm", "llama", "model.layers.1.mlp.up_proj.weight"),
    ],
)
def test_a_base_with_one_changed_number_is_an_error(tree, kind, folder, tensor):
    def add_one(weights):
        weights[tensor].view(-1)[0] += 1

    change(tree / folder / "model.safetensors", add_one)
    with pytest.raises(ValueError, match=f"was trained on another {kind} than .*{folder}"):
        LLaST.from_pretrained(tree / "run")


def test_only_files_that_are_read_change_a_fingerprint(tree):
    for file in ("llama/params.json", "whisper/added_tokens.json", "whisper/tokenizer.model"):
        (tree / file).write_text("{}")
    LLaST.from_pretrained(tree / "run")
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (tree / "llama" / name).write_text("{}")
        with pytest.raises(ValueError, match="was trained on another llm"):
            LLaST.from_pretrained(tree / "run")
        (tree / "llama" / name).unlink()


def test_the_fingerprint_has_only_the_tokenizer_that_is_read(tree):
    (tree / "llama" / "tokenizer.json").write_text("{}")  # a copy in another format
    (tree / "llama" / "generation_config.json").write_text("{}")
    LLaST.from_pretrained(tree / "run")
    both = fingerprint(tree / "llama", "llm")
    (tree / "llama" / "tokenizer.model").unlink()
    only_json = fingerprint(tree / "llama", "llm")
    (tree / "llama" / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert len({both, only_json, fingerprint(tree / "llama", "llm")}) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_precision_of_the_frozen_weights_can_be_chosen(dtype):
    _, precision, reason = pick_device(dtype)
    assert precision == getattr(torch, dtype) and reason.endswith(f"frozen weights in {dtype}")


def test_fingerprints_are_those_of_the_bases_when_they_were_loaded(tree):
    model = trained_model(tree)
    change(tree / "llama" / "model.safetensors", lambda w: w["model.norm.weight"].add_(1))
    model.save_pretrained(tree / "late")
    with pytest.raises(ValueError, match="late was trained on another llm"):
        LLaST.from_pretrained(tree / "late")


def test_a_model_merged_for_good_cannot_be_saved(bases, tmp_path):
    model = trained_model(bases)
    merge_lora(model, delete_lora=True)
    with pytest.raises(ValueError, match="deleted the LoRA"):
        model.save_pretrained(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "folder"), [("encoder", "whisper"), ("llm", "llama")])
def test_a_base_that_moved_is_named_by_an_option(tree, kind, folder):
    (tree / folder).rename(tree / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"{folder}, which does not exist; .*--{kind} PATH"):
        LLaST.from_pretrained(tree / "run")
    loaded = LLaST.from_pretrained(tree / "run", **{kind: tree / "elsewhere"})
    assert getattr(loaded.config, kind) == str(tree / "elsewhere")


def test_run_and_bases_can_move_together(tree, tmp_path, monkeypatch):
    expected = losses(LLaST.from_pretrained(tree / "run"))
    tree.rename(tmp_path / "moved")
    assert torch.equal(losses(LLaST.from_pretrained(tmp_path / "moved" / "run")), expected)
    monkeypatch.chdir(tmp_path / "moved" / "run")
    assert torch.equal(losses(LLaST.from_pretrained(".")), expected)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    ],
)
def test_out_of_memory_names_the_phase_and_the_advice(error):
    with pytest.raises(torch.OutOfMemoryError, match="memory in training; use a smaller --batch: "):
        with llast.explain_out_of_memory("in training", "use a smaller --batch"):
            raise error


def test_other_errors_are_not_explained():
    with pytest.raises(RuntimeError, match="^a shape$"):
        with llast.explain_out_of_memory("in training", "use a smaller --batch"):
            raise RuntimeError("a shape")


def test_compiling_without_a_compiler_is_an_error(bases, monkeypatch):
    model = LLaST.fresh(config_for(bases))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        model.compile_layers()
