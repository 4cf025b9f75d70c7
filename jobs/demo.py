"""``vecmill demo``: the whole job on real text with a real model, then five searches."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.demo_corpus import write_corpus
from jobs.options import LimitOption, QuietOption, VerboseOption, command, messages, progress, results
from jobs.search import hit_table
from pipeline.config_file import load_config

DEMO_CONFIG = """# written by `vecmill demo`; use it with vecmill search -c, status -c, reindex -c
root: {root}
corpus:
  uri: {folder}/docstrings.jsonl
  title: title
  metadata: [kind]
index:
  lexical: true
"""
QUERIES = (
    "remove duplicate lines while keeping order",
    "run a function later in another thread",
    "parse a date written as text",
    "send an email with an attachment",
    "compress a file",
)


@command
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where corpus, config and index go")] = Path("vecmill-demo"),
    root: Annotated[str | None, typer.Option("--root", help="Where the index goes instead, s3:// for example")] = None,
    limit: LimitOption = None,
    verbose: VerboseOption = False,
    quiet: QuietOption = False,
) -> None:
    """Index the docstrings of the Python standard library with all-MiniLM-L6-v2 and search them."""
    from pipeline import run
    from pipeline.client import open_root

    documents = write_corpus(folder / "docstrings.jsonl")
    file = folder / "demo.yaml"
    file.write_text(DEMO_CONFIG.format(folder=folder, root=root or folder / "root"), encoding="utf-8")
    if not quiet:
        messages.print(f"demo: {documents} docstrings of the Python standard library in {folder}/docstrings.jsonl")
    settings = load_config(file)
    with progress(quiet=quiet) as say:
        run.reindex(settings, limit=limit, say=say)
    asked = open_root(settings)
    for query in QUERIES:
        results.print(f"\n[bold]{query}")
        results.print(hit_table(asked.search(query, 3)))
    results.print(f'\nSearch it yourself: vecmill search -c {file} "your words"')
