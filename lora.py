"""LoRA: train a low-rank change to a frozen linear layer.

    y = W x + (alpha / r) B A dropout(x)        LoRA paper (2106.09685)

A is (R, in), B is (out, R). B starts at zero, so a fresh LoRA changes nothing: tests/test_lora.py.
LLaST puts one into the speech encoder and one into the LLM ("dual LoRA").
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer that keeps its weight, its bias and their names, with A and B beside them."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear's own would make a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # Trained numbers stay in float32 even where the frozen weight is in half precision:
        # a step of the optimizer is smaller than what half precision can tell apart.
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as peft does
        self.scale = alpha / rank
        self.dropout = dropout
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)
        y = F.linear(rows, self.weight, self.bias)
        low = F.linear(F.dropout(rows, self.dropout, self.training), self.lora_A.to(x.dtype))
        # In place: y is wide, and a product, a scaled copy and a sum would each pass over it.
        y.addmm_(low, self.lora_B.to(y.dtype).T, alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def fold(self, sign: int):
        """Add the change to the weight (sign 1) or take it out again (-1)."""
        change = sign * self.scale * (self.lora_B @ self.lora_A)
        self.weight.copy_(self.weight.float() + change)
        self.merged = sign > 0


def add_lora(module: nn.Module, targets, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze `module`, then wrap each linear layer whose last name is in `targets`.

    Returns the names of the wrapped layers; a target that names no linear layer is an error.
    """
    if lora_layers(module):
        raise ValueError("this module has a LoRA already; a second one would replace it")
    module.requires_grad_(False)
    wrapped = []
    for name, layer in list(module.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(layer, nn.Linear) and last in targets:
            lora = LoRALinear(layer, rank, alpha, dropout)
            setattr(module.get_submodule(parent), last, lora)
            wrapped.append(name)
    unused = set(targets) - {name.rpartition(".")[2] for name in wrapped}
    if unused:
        raise ValueError(f"no linear layer is called {sorted(unused)}; LoRA would not be applied")
    return wrapped


def lora_layers(module: nn.Module) -> list[LoRALinear]:
    return [layer for layer in module.modules() if isinstance(layer, LoRALinear)]


def merge_lora(module: nn.Module, for_good: bool = False):
    """Fold every A and B into its weight: the same outputs, at the cost of a plain linear layer.

    `for_good` lets go of A and B, which take gigabytes at the paper's ranks; such a model can be
    neither unmerged nor saved.
    """
    for layer in lora_layers(module):
        if not layer.merged:
            layer.fold(1)
        if for_good:
            layer.lora_A = layer.lora_B = None


def unmerge_lora(module: nn.Module):
    """Take every A and B out of its weight again, up to the rounding of the weight's precision."""
    for layer in lora_layers(module):
        if layer.merged:
            layer.fold(-1)
