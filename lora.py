"""LoRA: train a low-rank change to a linear layer whose own weight is frozen.

                 x (..., in)
           ┌──────────┴──────────┐
           │                  dropout
           │                     │
      W (out, in)             A (R, in)      down to R numbers, starts with random values
        frozen                   │
           │                 B (out, R)      up to the width of the output, starts with zeros
           │                     │
           │                × alpha / R
           └──────────+──────────┘
                y (..., out)                 y = W x + (alpha / R) B A dropout(x)

Sizes: R rank of the change, much smaller than `in` and `out`.

A full change of W would have out * in trained numbers. A and B together have only R * (in + out).

B starts with zeros, so a new LoRA changes nothing and training starts from the published model. If
A also started with zeros, nothing would be trained: the gradient of B is a product with A, and the
gradient of A is a product with B, so both would be zero. B A x is multiplied by alpha / R: 0.5 in
the original LLaST, 1 in our preset "tiny".

LLaST adds LoRA to the linear layers of the speech encoder and of the LLM, except the LLM's head
("dual LoRA"). Paper: LoRA (2106.09685). Tests: tests/test_lora.py.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRALinear(nn.Linear):
    """A linear layer plus the low-rank path. (..., in) -> (..., out)

    It uses the weight and bias of `linear` under the same names, so checkpoints still fit.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float):
        nn.Module.__init__(self)  # nn.Linear.__init__ would create a second weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        # A and B are float32 even if the weight is in half precision: a step of the optimizer is
        # often too small to change a number in half precision. In bfloat16, 1 + 0.001 is 1.
        device = linear.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, self.in_features, device=device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, rank, device=device))
        # Uniform between -1/sqrt(in) and 1/sqrt(in), as in nn.Linear and in the peft library.
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.scale = alpha / rank
        self.dropout = dropout
        self.merged = False

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return F.linear(x, self.weight, self.bias)
        rows = x.flatten(0, -2)  # (n, in_features): addmm_ needs two dimensions
        y = F.linear(rows, self.weight, self.bias)  # (n, out_features)
        dropped = F.dropout(rows, self.dropout, self.training)  # (n, in_features)
        low = F.linear(dropped, self.lora_A.to(x.dtype))  # (n, R)
        # addmm_ adds in place. y is large, and separate multiply, scale and add would each read
        # and write all of it.
        y.addmm_(low, self.lora_B.to(y.dtype).T, alpha=self.scale)
        return y.unflatten(0, x.shape[:-1])

    @torch.no_grad()
    def add_change(self):
        """Add (alpha / R) B A to the weight."""
        change = self.scale * (self.lora_B @ self.lora_A)  # (out_features, in_features)
        self.weight.copy_(self.weight.float() + change)
        self.merged = True


def add_lora(module: nn.Module, targets, rank: int, alpha: float, dropout: float) -> list[str]:
    """Freeze `module`, add a LoRA to its linear layers in `targets`, and return their full names.

    A target is the last part of a full name: "q_proj" for "layers.0.self_attn.q_proj". Raises
    ValueError if a target matches no linear layer, or if the module already has a LoRA.
    """
    if lora_layers(module):
        raise ValueError("this module already has a LoRA; add it only once, to a new model")
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
    """Return the layers of `module` that have a LoRA."""
    return [layer for layer in module.modules() if isinstance(layer, LoRALinear)]


def merge_lora(module: nn.Module, delete_lora: bool = False):
    """Add (alpha / R) B A to each weight, so that the layer is as fast as without LoRA.

    The outputs are the same up to rounding. `delete_lora` also deletes A and B: with the ranks
    of the paper they need gigabytes. After that the model cannot be saved.
    """
    for layer in lora_layers(module):
        if not layer.merged:
            layer.add_change()
        if delete_lora:
            layer.lora_A = layer.lora_B = None
