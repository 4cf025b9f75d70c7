"""Measures what a night costs that changes one document in a hundred; writes incremental.json. Twenty minutes on 2 cores.

``python tests/benchmarks/incremental.py FOLDER``: FOLDER as for index.py. 100,000 documents become an artifact by ``vecmill
reindex``; then, night after night, 1 % of them change, come or go, in all files of a full export. Wall times are those of the
command; start-up is that of the same command over ten documents: with the encoder for runs that encode, without for others.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOME = Path(__file__).parent.parent.parent
sys.path.insert(0, str(HOME))

from tests.benchmarks import debian
from tests.benchmarks.machine import machine

DOCUMENTS = 100_000
CHANGED, ADDED, DELETED = 600, 200, 200
"""Documents that a night touches: 1 %."""
NIGHTS = 3
FILES = 8
LONGEST_CHARS = 250
"""Fewer than the model takes tokens: every document is one passage, and what is to be encoded can be counted here."""


def main() -> None:
    folder = Path(sys.argv[1])
    texts = [text for text in debian.documents(folder) if len(text) <= LONGEST_CHARS]
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        start_up = measure_start_up(Path(scratch) / "tiny", texts)
        found = measure_nights(Path(scratch) / "large", texts, start_up)
    target = Path(__file__).with_suffix(".json")
    target.write_text(json.dumps({"measured": machine(), "start_up": start_up, **found}, indent=1) + "\n")
    print(target.read_text())


def measure_start_up(home: Path, texts: list[str]) -> dict[str, float]:
    """Median seconds of a run over ten documents that encodes one, and of one that finds nothing to do."""
    corpus = {f"d{number}": texts[number] for number in range(10)}
    reindex(home, corpus)
    encodes, idles = [], []
    for night in range(NIGHTS):
        corpus["d0"] = f"{texts[0]} {night}"
        encodes.append(reindex(home, corpus)["wall_s"])
        idles.append(reindex(home, corpus)["wall_s"])
    return {"encodes_s": statistics.median(encodes), "idle_s": statistics.median(idles)}


def measure_nights(home: Path, texts: list[str], start_up: dict[str, float]) -> dict[str, Any]:
    corpus = {f"d{number}": texts[number] for number in range(DOCUMENTS)}
    first = reindex(home, corpus)
    if first["passages"] != DOCUMENTS:
        raise SystemExit(f"{first['passages']} passages of {DOCUMENTS} documents")
    nights, idles = [], []
    for night in range(NIGHTS):
        ids = list(corpus)
        for name in ids[night * CHANGED : (night + 1) * CHANGED]:
            corpus[name] = f"{corpus[name]} Revised."
        for name in ids[-DELETED:]:
            del corpus[name]
        start = DOCUMENTS + night * ADDED
        corpus |= {f"d{number}": texts[number] for number in range(start, start + ADDED)}
        nights.append(reindex(home, corpus))
        if nights[-1]["encoded"] != CHANGED + ADDED:
            raise SystemExit(f"{nights[-1]['encoded']} passages encoded, {CHANGED + ADDED} texts are new")
        idles.append(reindex(home, corpus))
        if idles[-1]["encoded"] or idles[-1]["committed"]:
            raise SystemExit("a run over an unchanged corpus did something")
    second_s = statistics.median(night["wall_s"] for night in nights)
    idle_s = statistics.median(idle["wall_s"] for idle in idles)
    return {
        "first": first,
        "nights": nights,
        "idles": idles,
        "second_s": second_s,
        "idle_s": idle_s,
        "share_above_start_up": round((second_s - start_up["encodes_s"]) / (first["wall_s"] - start_up["encodes_s"]), 4),
        "idle_above_start_up_s": round(idle_s - start_up["idle_s"], 1),
    }


def reindex(home: Path, corpus: dict[str, str]) -> dict[str, Any]:
    """Write the corpus as a full export and run the command over it: wall seconds, passages encoded, quality, verdict."""
    (home / "corpus").mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"id": name, "text": text}) + "\n" for name, text in corpus.items()]
    for number in range(FILES):
        (home / f"corpus/{number}.jsonl").write_text("".join(rows[number::FILES]), encoding="utf-8")
    config = home / "config.yaml"
    config.write_text(f"root: {home}/root\ncorpus: {{uri: {home}/corpus}}\n")
    started = time.perf_counter()
    command = [sys.executable, "-m", "jobs", "reindex", "-c", str(config), "--json", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=HOME)
    wall_s = time.perf_counter() - started
    result = json.loads(done.stdout.splitlines()[-1])
    live = result["live"]
    return {
        "wall_s": round(wall_s, 1),
        "passages": live["passages"],
        "encoded": result["encoded"],
        "committed": result["committed"],
        "trained": result["trained"],
        "kind": live["index"]["kind"],
        "recall": live["recall"]["mean"],
        "verdict": live["verdict"],
    }


if __name__ == "__main__":
    main()
