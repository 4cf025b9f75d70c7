"""Where a number was measured: processor, GPU, versions, commit."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

HOME = Path(__file__).parent.parent.parent
PACKAGES = ("torch", "transformers", "sentence-transformers", "faiss-cpu", "ray", "pyarrow")


def machine() -> dict[str, Any]:
    """``changed``: what differed from the commit. ``COMMIT`` names it where the checkout came without its history."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line), "?"
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        **_gpu(),
        "python": platform.python_version(),
        "versions": dict(filter(None, map(_version, PACKAGES))),
        "commit": os.environ.get("COMMIT") or _git("rev-parse", "HEAD"),
        "changed": [] if os.environ.get("COMMIT") else _git("status", "--porcelain", "--", "*.py").splitlines(),
    }


def _gpu() -> dict[str, str]:
    torch = sys.modules.get("torch")  # which a benchmark that needs none shall not load
    return {"gpu": torch.cuda.get_device_name()} if torch and torch.cuda.is_available() else {}


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=HOME, capture_output=True, text=True, check=True).stdout.strip()
