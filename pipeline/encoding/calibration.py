"""Padded tokens per batch: which budget is the fastest for an encoder on its device."""

import time
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from pipeline.encoder import Encoder

BUDGETS = {"cpu": (1024, 2048), "cuda": (16384, 32768, 65536, 131072)}
"""What is tried; without a trial the second. On CPUs 1 to 2 k is the flat optimum for MiniLM (DESIGN)."""
SECONDS = 0.3
GAIN = 1.03
"""A larger budget must be so much faster: a smaller one pads less and needs less memory."""
TEXT = "A text of common words, Ünïcode, 数学 and emoji 🙂 for the tokenizer. "


def calibrate(encoder: "Encoder") -> None:
    """Choose the batch budget in about a second, by texts of 8 to 256 tokens."""
    budgets = encoder.budgets
    rate = max(_rate(encoder, budgets[0]) for _ in range(2))  # the first is cold
    size = 2 * budgets[-1]
    if size > 4 * rate * SECONDS or encoder.tokenizer.is_static:
        return  # so slow a model fills the device with any budget
    size = max(size, int(rate * SECONDS))
    best, best_rate = encoder.batch_tokens, 0.0
    for budget in budgets:
        encoder.batch_tokens = budget
        rate = max(_rate(encoder, size) for _ in range(2))
        if encoder.batch_tokens < budget:
            break  # out of memory
        if rate > best_rate * GAIN:
            best, best_rate = budget, rate
    encoder.batch_tokens = min(best, encoder.batch_tokens)


def _rate(encoder: "Encoder", size: int) -> float:
    """Tokens per second of about ``size`` tokens in texts of log-uniform length."""
    ids = encoder.tokenizer([TEXT * 16])[0]
    lengths = np.geomspace(8, len(ids), 32).astype(int)
    sample = [ids[:length] for length in np.tile(lengths, max(1, round(size / int(lengths.sum()))))]
    started = time.perf_counter()
    return encoder.encode_tokens(sample).tokens / (time.perf_counter() - started)
