"""LoRA: train a low-rank change to a linear layer whose own weight is frozen.

                 x (..., in)
           ┌──────────┴──────────┐
           │                  dropout
           │                     │
      W (out, in)             A (R, in)      down to R numbers, starts random
        frozen                   │
           │                 B (out, R)      up to the width of the output, starts at zero
           │                     │
           │                × alpha / R
           └──────────+──────────┘
                y (..., out)                 y = W x + (alpha / R) B A dropout(x)

Sizes: R rank of the change, much smaller than `in` and `out`.

B starts at zero, so a fresh LoRA changes nothing and training starts from the published model. A
must not be zero, too: the gradient of B contains A, and the gradient of A contains B, so with two
zeros neither would ever change. B A x is a sum of R products; the factor alpha / R keeps the sum
from growing with the rank, so a learning rate that is good for one rank is a good start for others.

LLaST uses one LoRA in the speech encoder and one in the LLM ("dual LoRA").
Paper: LoRA (2106.09685). Tests: tests/test_lora.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer with A and B. Its weight and bias keep their values and names."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear.__init__ would create a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # A and B are float32 even if the weight is in half precision: a step of the optimizer is
        # often too small to change a number in half precision.
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # the same start as in peft
        self.scale = alpha / rank
        self.dropout = dropout
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)  # (n, in_features)
        y = F.linear(rows, self.weight, self.bias)  # (n, out_features)
        rows = F.dropout(rows, self.dropout, self.training)  # (n, in_features)
        low = F.linear(rows, self.lora_A.to(x.dtype))  # (n, R)
        # addmm_ adds in place. y is large, and separate multiply, scale and add would each read
        # and write all of it.
        y.addmm_(low, self.lora_B.to(y.dtype).T, alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def fold(self, sign: int):
        """Add the change to the weight (sign 1) or subtract it again (sign -1)."""
        change = sign * self.scale * (self.lora_B @ self.lora_A)  # (out_features, in_features)
        self.weight.copy_(self.weight.float() + change)
        self.merged = sign > 0


def add_lora(module: nn.Module, targets, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze `module` and replace each linear layer whose last name is in `targets`.

    Returns the names of the replaced layers. A target that is not the name of a linear layer is an
    error.
    """
    if lora_layers(module):
        raise ValueError("this module already has a LoRA; a second one would replace it")
    module.requires_grad_(False)
    names = []
    for name, layer in list(module.named_modules()):
        parent, _, last = name.rpartition(".")
        if isinstance(layer, nn.Linear) and last in targets:
            setattr(module.get_submodule(parent), last, LoRALinear(layer, rank, alpha, dropout))
            names.append(name)
    unused = set(targets) - {name.rpartition(".")[2] for name in names}
    if unused:
        raise ValueError(f"no linear layer is called {sorted(unused)}; check the target names")
    return names


def lora_layers(module: nn.Module) -> list[LoRALinear]:
    """Every layer of `module` that has a LoRA."""
    return [layer for layer in module.modules() if isinstance(layer, LoRALinear)]


def merge_lora(module: nn.Module, for_good: bool = False):
    """Add every B A to its weight: the same outputs, as fast as without LoRA.

    `for_good` also deletes A and B, which take gigabytes at the ranks of the paper. After that the
    model cannot be unmerged or saved.
    """
    for layer in lora_layers(module):
        if not layer.merged:
            layer.fold(1)
        if for_good:
            layer.lora_A = layer.lora_B = None


def unmerge_lora(module: nn.Module):
    """Subtract every B A from its weight again. The weight is exact up to rounding."""
    for layer in lora_layers(module):
        if layer.merged:
            layer.fold(-1)
