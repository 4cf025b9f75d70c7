"""A model as one function that can be traced, with linear weights in int8 where that is asked for."""

from collections.abc import Sequence
from typing import Any, cast

import torch


class Whole(torch.nn.Module):
    """All modules of a model as one function, for tracing."""

    def __init__(self, parts: Sequence[Any], dim: int) -> None:
        super().__init__()
        self.parts = torch.nn.ModuleList(parts)
        self.dim = dim

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Vectors, (rows, dim), not normalised."""
        features = {"input_ids": ids, "attention_mask": mask}
        for module in self.parts:
            features = module(features)
        return features["sentence_embedding"][:, : self.dim]


class _Int8Linear(torch.nn.Module):
    """A linear layer whose weights are int8 with one scale per output: a runtime that knows the pattern multiplies in int8."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        scale = weight.abs().amax(dim=1, keepdim=True).clamp_min(1e-12) / 127
        self.register_buffer("weight", (weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The same as the layer it stands for, but for rounding."""
        weight = cast(torch.Tensor, self.weight)
        return torch.nn.functional.linear(inputs, weight.to(torch.float32) * cast(torch.Tensor, self.scale), self.bias)


def quantize_linear(module: Any) -> None:
    """Replace every linear layer below ``module`` by one with int8 weights, in place."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear):
            setattr(module, name, _Int8Linear(child))
        else:
            quantize_linear(child)
