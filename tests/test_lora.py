"""A fresh LoRA changes nothing, training changes only A and B, merging keeps the outputs."""

import pytest
import torch
import torch.nn.functional as F

from llama import Llama
from lora import LoRALinear, add_lora, lora_layers, merge_lora
from toys import WHISPER, fill, llama_config, made_up
from whisper_encoder import WhisperConfig, WhisperEncoder

TOY = llama_config()
R, ALPHA = 4, 12.0
IDS = torch.tensor([[1, 66, 5, 5, 17], [1, 8, 33, 2, 60]])
CASES = {
    "llama": (
        lambda: Llama(TOY),
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        IDS,
    ),
    "whisper": (
        lambda: WhisperEncoder(WhisperConfig(**WHISPER)),
        ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),  # with biases and without
        made_up("mel", (2, WHISPER["num_mel_bins"], 20)),
    ),
}


@pytest.fixture(params=CASES)
def case(request):
    """A base model with made-up weights, the names of its layers that get a LoRA, and an input."""
    make, targets, x = CASES[request.param]
    model = make()
    fill(model)
    return model, targets, x


def add_trained_lora(model, targets, dropout=0.0):
    """Add a LoRA as it is after training: B is not zero."""
    add_lora(model, targets, R, ALPHA, dropout)
    with torch.no_grad():
        for i, layer in enumerate(lora_layers(model)):
            layer.lora_A.copy_(made_up(f"{i} A", layer.lora_A.shape))
            layer.lora_B.copy_(made_up(f"{i} B", layer.lora_B.shape))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


# -------------------------------------------------------------------------------------- the formula


@torch.no_grad()
def test_a_fresh_lora_changes_nothing(case):
    model, targets, x = case
    before = model(x)
    names = add_lora(model, targets, R, ALPHA, dropout=0.5)
    assert len(names) == 2 * len(targets)  # two layers
    assert all(layer.lora_A.any() for layer in lora_layers(model))
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("bias", (True, False))
def test_the_output_equals_the_formula(bias):
    linear = torch.nn.Linear(6, 5, bias=bias)
    lora = LoRALinear(linear, R, ALPHA, dropout=0.0)
    lora.lora_B.data = made_up("B", (5, R))
    x = made_up("x", (2, 3, 6))
    written_out = linear(x) + (ALPHA / R) * (x @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(lora(x), written_out, rtol=0, atol=1e-6)


def test_dropout_changes_only_the_low_rank_path_and_only_in_training():
    linear = torch.nn.Linear(64, 5)
    lora = LoRALinear(linear, R, ALPHA, dropout=0.5)
    lora.lora_B.data = made_up("B", (5, R), 1.0)
    x = made_up("x", (3, 64))
    whole = linear(x) + ALPHA / R * (x @ lora.lora_A.T @ lora.lora_B.T)
    torch.testing.assert_close(lora.eval()(x), whole, rtol=0, atol=1e-6)

    torch.manual_seed(0)
    dropped = lora.train()(x)
    torch.manual_seed(0)
    low = F.dropout(x, 0.5) @ lora.lora_A.T @ lora.lora_B.T
    torch.testing.assert_close(dropped, linear(x) + ALPHA / R * low, rtol=0, atol=1e-6)
    assert not torch.allclose(dropped, whole, atol=1e-3)


def test_adding_a_lora_keeps_the_names_and_weights_of_the_base(case):
    model, targets, _ = case
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = add_lora(model, targets, R, ALPHA, dropout=0.0)
    after = model.state_dict()
    added = {f"{name}.lora_{side}" for name in names for side in "AB"}
    assert after.keys() == before.keys() | added
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_an_unknown_target_is_an_error_that_names_it(case):
    model, targets, _ = case
    with pytest.raises(ValueError, match=r"no linear layer is called \['q_project'\]"):
        add_lora(model, ("q_proj", "q_project"), R, ALPHA, dropout=0.0)


def test_a_target_that_is_not_linear_is_an_error_that_names_it():
    with pytest.raises(ValueError, match=r"no linear layer is called \['embed_tokens'\]"):
        add_lora(Llama(TOY), ("embed_tokens",), R, ALPHA, dropout=0.0)


# ----------------------------------------------------------------------------------------- training


def test_only_a_and_b_are_trained(case):
    model, targets, x = case
    before = fill(model)
    add_trained_lora(model, targets)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if n.endswith(("lora_A", "lora_B"))}

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(x).square().mean().backward()
    for name, weight in model.named_parameters():
        assert (weight.grad is not None and weight.grad.any()) == (name in trained), name

    start = {name: model.get_parameter(name).clone() for name in trained}
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not any(torch.equal(after[name], start[name]) for name in trained)


def test_b_of_a_fresh_lora_gets_the_first_gradient(case):
    model, targets, x = case
    add_lora(model, targets, R, ALPHA, dropout=0.0)
    model(x).square().mean().backward()
    for layer in lora_layers(model):
        assert layer.lora_B.grad.any()
        assert not layer.lora_A.grad.any()  # B is zero, so the gradient of A is zero


def test_a_and_b_are_float32_when_the_weight_is_in_half_precision():
    lora = LoRALinear(torch.nn.Linear(6, 5, dtype=torch.bfloat16), R, ALPHA, dropout=0.0)
    assert lora.lora_A.dtype == lora.lora_B.dtype == torch.float32
    assert lora(torch.ones(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


# -------------------------------------------------------------------------------------------- merge


@torch.no_grad()
def test_merged_lora_gives_the_same_outputs(case):
    model, targets, x = case
    base = model(x)
    add_trained_lora(model, targets)
    unmerged = model(x)
    assert not torch.allclose(unmerged, base, atol=1e-2)
    merge_lora(model)
    assert_close(model(x), unmerged)


@torch.no_grad()
def test_merging_with_delete_lora_deletes_a_and_b(case):
    model, targets, x = case
    add_trained_lora(model, targets)
    unmerged = model(x)
    merge_lora(model, delete_lora=True)
    assert_close(model(x), unmerged)
    assert not [name for name, _ in model.named_parameters() if "lora_" in name]


def test_a_second_lora_is_an_error_and_the_first_is_unchanged(case):
    model, targets, _ = case
    add_trained_lora(model, targets)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match="already has a LoRA"):
        add_lora(model, targets, R, ALPHA, 0.0)
    assert trained == [name for name, p in model.named_parameters() if p.requires_grad] != []


@torch.no_grad()
def test_a_merged_layer_is_a_linear_layer_with_a_changed_weight():
    linear = torch.nn.Linear(6, 5)
    before = linear.weight.clone()
    lora = LoRALinear(linear, R, ALPHA, dropout=0.0)
    lora.lora_B.copy_(made_up("B", (5, R)))
    merge_lora(lora)
    change = ALPHA / R * lora.lora_B @ lora.lora_A
    torch.testing.assert_close(lora.weight, before + change, rtol=0, atol=1e-6)
    x = made_up("x", (2, 6))
    assert torch.equal(lora(x), F.linear(x, lora.weight, lora.bias))


@torch.no_grad()
def test_merging_twice_changes_nothing_more(case):
    model, targets, _ = case
    add_trained_lora(model, targets)
    merge_lora(model)
    first = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    merge_lora(model)
    assert all(torch.equal(model.state_dict()[name], first[name]) for name in first)
