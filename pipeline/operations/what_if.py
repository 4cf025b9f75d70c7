"""What encoding would take on a cluster that is not here: an estimate from published figures, always a range.

What an H100 encodes of texts tokenized ahead was measured afterwards and lies inside its ranges (tests/benchmarks/gpu.json).
Refuses what it has no figure for. Training and merge are left out: one machine does them.
"""

import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import safe_open

from pipeline.encoding.model import ModelFolder
from pipeline.encoding.numerics import on_gpu, resolve_precision
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import document_tokens
from pipeline.errors import ConfigError
from pipeline.operations.forecast import Rate, learned_rate
from pipeline.operations.planning import Plan, sample_texts
from pipeline.root.job import Job

CARDS = {"T4": 65, "A10G": 70, "L4": 121, "A10": 125, "A100": 312, "L40S": 362, "H100": 989, "H200": 989}
"""Dense FP16 peak of the tensor cores, TFLOP/s: NVIDIA's data sheets, whose figures with sparsity are halved. H100: SXM."""
CPU = "cpu"
UTILISATION = (0.10, 0.33)
"""Share of its peak that an L4 reaches with bge-large, 648 MFLOP per token: sentence-transformers in FP16 took 59.1 s for
1,150,000 tokens in texts of 449, text-embeddings-inference 18.5 s (docs/benchmarking.md of michaelfeil/infinity, 0.0.25)."""
UTILISATION_DIM = 1024
"""Width of bge-large."""
CPU_SHARE = (0.5, 1.0)
"""Of the speed of one encoder here. The lower end is a guess: many of them were never measured side by side."""
NOT_LINEAR = re.compile("embed|shared|relative_attention_bias|pooler|lm_head|predictions|classifier")
"""In names of weights: looked up and not multiplied, seen by one token of a text, or of another task."""


@dataclass(frozen=True)
class WhatIf:
    """Estimates, (from, to), of two digits. ``tokenizer_cores``: that keep one encoder of each kind busy."""

    encoders: Mapping[str, int]
    encode_s: tuple[float, float]
    tokens_per_s: tuple[float, float]
    tokenizer_cores: Mapping[str, tuple[float, float]]
    estimated_from: str
    tokenizer_rate_source: str


def parse_cluster(text: str) -> dict[str, int]:
    """``8xL4``, ``2xA100-80GB,4xL4`` or ``16xcpu`` -> encoders of each kind. Raises ConfigError for what it does not know."""
    known = {name.lower(): name for name in (*CARDS, CPU)}
    found: dict[str, int] = {}
    for part in text.split(","):
        match = re.fullmatch(r"([1-9]\d*)x([a-z\d]+?)(-\d+gb)?", part.strip().lower())
        if match is None or match[2] not in known:
            names = ", ".join(known.values())
            raise ConfigError(f"--cluster: {part.strip()!r}: expected COUNTxNAME, as in 8xL4,2xA100; names are {names}")
        found[known[match[2]]] = found.get(known[match[2]], 0) + int(match[1])
    if CPU in found and len(found) > 1:
        raise ConfigError(f"--cluster: {text}: encoders of one run are all on GPUs or all on CPUs; plan them apart")
    return found


def what_if(encoders: Mapping[str, int], plan: Plan, job: Job) -> WhatIf:
    """A plan on ``encoders``. Raises ConfigError for an encoder that has no figure on them."""
    _check(encoders, job)
    shares, most = CPU_SHARE, {CPU: plan.tokens_per_s}
    source = f"{plan.tokens_per_s:,.0f} tokens/s of an encoder here, by {plan.rate_source}"
    if CPU not in encoders:
        flops = flops_per_token(job.model, min(plan.tokens / max(1, plan.passages), job.spec.window or job.spec.max_tokens))
        shares, most = utilisation(job.model.dim), {name: CARDS[name] * 1e12 / flops for name in encoders}
        peaks = ", ".join(f"{name} {CARDS[name]} TFLOP/s" for name in encoders)
        source = f"the dense FP16 peak that the vendor states ({peaks}), at {flops / 1e6:,.1f} MFLOP per token"
    speeds = {name: (shares[0] * rate, shares[1] * rate) for name, rate in most.items()}
    source = f"{shares[0]:.0%} to {shares[1]:.0%} of {source}"
    return estimate(encoders, speeds, source, tokens=plan.encode_s * plan.tokens_per_s, tokenizer=tokenizer_rate(job))


def estimate(
    encoders: Mapping[str, int], speeds: Mapping[str, tuple[float, float]], source: str, *, tokens: float, tokenizer: Rate
) -> WhatIf:
    """What ``tokens`` take. ``speeds``: tokens per second of one encoder of each kind; ``tokenizer``: of one core."""
    low, high = (sum(count * speeds[name][end] for name, count in encoders.items()) for end in (0, 1))
    core = tokenizer.tokens_per_s
    return WhatIf(
        encoders=dict(encoders),
        encode_s=_rough(tokens / high, tokens / low),
        tokens_per_s=_rough(low, high),
        tokenizer_cores={name: _rough(slow / core, fast / core) for name, (slow, fast) in speeds.items()},
        estimated_from=source,
        tokenizer_rate_source=f"{core:,.0f} tokens/s of a core here, by {tokenizer.source}",
    )


def utilisation(dim: int) -> tuple[float, float]:
    """For a model so wide. A guess: a narrow one may reach less, its work shrinks with the square of what it moves."""
    return UTILISATION[0] * min(1.0, dim / UTILISATION_DIM), UTILISATION[1]


def tokenizer_rate(job: Job) -> Rate:
    """Tokens per second of one core of a tokenizer: by the newest embedding records, else a sample is tokenized."""
    if learned := learned_rate(job, None, "tokenize"):
        return learned
    texts = sample_texts(job)
    tokenizer = TextTokenizer(job.model, job.spec.max_tokens, job.spec.prompts)
    started = time.process_time()  # of all threads: the tokenizer has its own
    tokens = sum(len(ids) for ids in document_tokens(tokenizer, job.spec, texts)[0])
    return Rate(tokens / (time.process_time() - started), f"{len(texts)} passages tokenized just now")


def flops_per_token(model: ModelFolder, length: float) -> float:
    """``Encoder.flops_per_token`` by the shapes of the weights, and attention over ``length`` tokens in models like BERT."""
    first = model.path / json.loads((model.path / "modules.json").read_text(encoding="utf-8"))[0]["path"]
    weights = 0
    for file in first.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in set(tensors.keys()) if not NOT_LINEAR.search(name)]
        weights += sum(int(shape[0] * shape[1]) for shape in shapes if len(shape) == 2)
    config = json.loads(file.read_text(encoding="utf-8")) if (file := first / "config.json").is_file() else {}
    return 2.0 * weights + 4.0 * length * int(config.get("num_hidden_layers", 0) * config.get("hidden_size", 0))


def _check(encoders: Mapping[str, int], job: Job) -> None:
    if CPU in encoders:
        if on_gpu():
            raise ConfigError("--cluster: cpu means encoders as here, and here they have a GPU; plan on a machine without one")
        return
    precision = resolve_precision(job.config.encoder.precision, on_gpu=True, overflows=job.model.overflows)
    if precision == "fp32" or (precision == "bf16" and "T4" in encoders):
        raise ConfigError(
            f"--cluster: no figure for {', '.join(encoders)} in {precision}; set encoder.precision=auto or name others"
        )
    if job.model.is_static:
        raise ConfigError(f"--cluster: {job.spec.model} looks tokens up and multiplies nothing, a GPU is no use; give cpu")


def _rough(low: float, high: float) -> tuple[float, float]:
    return float(f"{low:.2g}"), float(f"{high:.2g}")
