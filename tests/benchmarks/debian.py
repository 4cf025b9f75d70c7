"""Real texts in large numbers: WordNet's glosses, the GCIDE dictionary and package descriptions, fetched from Debian.

Needs ``apt-get``; writes only below the folder it is given.
"""

import gzip
import random
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"
SENTENCE_END = re.compile(r"(?<=[.;:!?])\s+")
SHORTEST_CHARS = 24


def documents(folder: Path) -> list[str]:
    """About 350,000 distinct texts of a line to a page, in a random order that is always the same."""
    return _shuffled(text for source in (_glosses, _dictionary, _descriptions) for text in source(folder))


def documents_and_sentences(folder: Path) -> list[str]:
    """About a million distinct texts: those documents and each of their sentences, in such an order."""
    found = documents(folder)
    return _shuffled([*found, *(part for text in found for part in SENTENCE_END.split(text))])


def _shuffled(texts: Iterator[str] | list[str]) -> list[str]:
    distinct = [text for text in dict.fromkeys(texts) if len(text) >= SHORTEST_CHARS]
    random.Random(0).shuffle(distinct)
    return distinct


def _glosses(folder: Path) -> Iterator[str]:
    home = _package(folder, "wordnet-base") / "usr" / "share" / "wordnet"
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (home / f"data.{kind}").read_text(encoding="utf-8", errors="replace").splitlines():
            if "|" in line and not line.startswith("  "):
                words = line.split()[4].replace("_", " ")
                yield f"{words}: {line.partition('|')[2].strip()}"


def _dictionary(folder: Path) -> Iterator[str]:
    home = _package(folder, "dict-gcide") / "usr" / "share" / "dictd"
    text = gzip.decompress((home / "gcide.dict.dz").read_bytes())
    for line in (home / "gcide.index").read_text(encoding="utf-8", errors="replace").splitlines():
        name, start, size = line.split("\t")[:3]
        first = _number(start)
        if not name.startswith("00"):
            yield " ".join(text[first : first + _number(size)].decode("utf-8", errors="replace").split())


def _descriptions(folder: Path) -> Iterator[str]:
    lists = folder / "lists"
    if not lists.is_dir():
        (lists / "partial").mkdir(parents=True)
        _run("apt-get", "update", "-o", f"Dir::State::lists={lists}", "-o", "Acquire::Languages=en")
    for file in sorted(lists.glob("*Translation-en*")):
        text = _run("/usr/lib/apt/apt-helper", "cat-file", str(file))
        for entry in text.split("\n\n"):
            _, _, description = entry.partition("Description-en: ")
            for paragraph in re.split(r"\n \.\n", description):
                yield " ".join(paragraph.split())


def _package(folder: Path, name: str) -> Path:
    """The files of a Debian package, fetched and unpacked below ``folder``."""
    home = folder / name
    if not home.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        if not list(folder.glob(f"{name}_*.deb")):
            _run("apt-get", "download", name, cwd=folder)
        _run("dpkg-deb", "-x", str(next(folder.glob(f"{name}_*.deb"))), str(home))
    return home


def _number(digits: str) -> int:
    value = 0
    for digit in digits:
        value = value * 64 + BASE64.index(digit)
    return value


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, errors="replace")
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout
