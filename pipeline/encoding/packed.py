"""Texts end to end in one row, without padding: attention that keeps them apart, by torch's own flash attention.

It needs no package beside torch. On padded rectangles torch prefers cuDNN, which plans anew for every shape of a batch: with
texts of all lengths that took 40 % of the rate of an H100 (gpu.json). A model is given this attention through transformers'
registries; what it does not cover (a bias by distance, a head wider than 256) is refused, and before the engine uses it, its
vectors of some probes are compared with those of padded texts.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from sentence_transformers.sentence_transformer.modules import Transformer
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.encoding.batching import Tokens, lengths_of

NAME = "vecmill_packed"
PADDED = "sdpa"
BORDERS = "cu_seq_lens_q"
LONGEST = "max_length_q"
NOT_COVERED = ("position_bias", "softcap", "s_aux")
LEAST_CAPABILITY = (8, 0)
"""Of a GPU that flash attention runs on: Ampere."""


def is_possible(device: torch.device, precision: str) -> bool:
    """Whether the kernel runs there; it has 16-bit numbers only."""
    return device.type == "cuda" and precision != "fp32" and torch.cuda.get_device_capability(device) >= LEAST_CAPABILITY


def switch(module: Any) -> bool:
    """Give the first module of a model this attention; False for one with another attention than SDPA, or without a choice.

    Padded batches still get SDPA.
    """
    if not isinstance(module, Transformer) or module.config._attn_implementation != PADDED:
        return False
    module.model.set_attn_implementation(NAME)
    if module.model_forward_params is not None:
        module.model_forward_params |= {BORDERS, LONGEST}
    return bool(module.config._attn_implementation == NAME)


def switch_back(module: Any) -> None:
    """Undo ``switch``, if it was done."""
    if isinstance(module, Transformer) and module.config._attn_implementation == NAME:
        module.model.set_attn_implementation(PADDED)


def position_offset(module: Any) -> int:
    """The position of a first token: 0, or what follows the padding's in models of RoBERTa's family."""
    return int(module._infer_flatten_position_offset())


class Apart(torch.nn.Module):
    """Puts token vectors of texts in one row back into a padded rectangle, for pooling: sums of rows there need no atomics."""

    def forward(self, features: dict[str, Any]) -> dict[str, Any]:
        """(1, tokens, width) -> (texts, longest, width) with its mask; padded features stay as they are."""
        if BORDERS not in features:
            return features
        borders, longest = features.pop(BORDERS), features.pop(LONGEST)
        (tokens,), (texts,) = features["token_embeddings"], features["seq_idx"].long()
        places = texts * longest + torch.arange(len(texts), device=texts.device) - borders[texts]
        apart = tokens.new_zeros(len(borders) - 1, longest, tokens.shape[1])
        apart.view(-1, tokens.shape[1])[places] = tokens
        mask = torch.arange(longest, device=texts.device) < borders.diff()[:, None]
        return features | {"token_embeddings": apart, "attention_mask": mask}


def features(batch: Sequence[Tokens], offset: int) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """Ids, positions and borders of texts in one row, named as sentence-transformers names them, and the longest's tokens."""
    lengths = lengths_of(batch)
    borders = np.concatenate([[0], np.cumsum(lengths)])
    positions = np.arange(borders[-1]) - np.repeat(borders[:-1], lengths) + offset
    named = {
        "input_ids": np.concatenate(batch).astype(np.int64)[None],
        "position_ids": positions[None],
        "seq_idx": np.repeat(np.arange(len(batch), dtype=np.int32), lengths)[None],
        BORDERS: borders.astype(np.int32),
    }
    return named, int(lengths.max())


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """(1, heads, tokens, width) each -> (1, tokens, heads, width): a token sees those of its text."""
    if kwargs.get(BORDERS) is None:
        padded: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return padded
    if any(kwargs.get(name) is not None for name in NOT_COVERED):
        raise ValueError(f"packed texts: attention with one of {', '.join(NOT_COVERED)} needs padding")
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal  # as in SDPA
    back = kwargs["sliding_window"] - 1 if kwargs.get("sliding_window") else -1
    settings: dict[str, Any] = {"scale": kwargs.get("scaling")}
    if causal or back >= 0:
        settings["window_size"] = (back, 0 if causal else back)
    if key.shape[1] != query.shape[1]:
        settings["enable_gqa"] = True
    borders, longest = kwargs[BORDERS], kwargs[LONGEST]
    query, key, value = (part[0].transpose(0, 1) for part in (query, key, value))
    found: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **settings)
    return found[None], None


def _mask(*args: Any, attention_mask: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor | None:
    """None for texts in one row: a mask of all their tokens by all would be gigabytes."""
    return None if attention_mask is None else sdpa_mask(*args, attention_mask=attention_mask, **kwargs)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, _mask)
