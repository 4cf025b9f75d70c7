"""``vecmill rollback``, ``gc``, ``purge``, ``unlock``."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, duration, messages, print_json, results
from pipeline.config_file import load_config
from pipeline.errors import LockedError
from pipeline.root.log import Log
from pipeline.root.storage import Storage


def _tell(text: str) -> None:
    messages.print(text, markup=False)


@command
def rollback(
    config: ConfigOption,
    overrides: SetOption = None,
    to: Annotated[str | None, typer.Option("--to", help="An artifact that was live; default: the one before")] = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Put an earlier artifact live again, after verifying every byte of it."""
    from pipeline.operations import upkeep

    manifest = upkeep.rollback(load_config(config, tuple(overrides or ())), to, _tell)
    if as_json:
        print_json({"live": manifest.version, "created": manifest.created, "documents": manifest.counts["documents"]})
        return
    results.print(f"artifact {manifest.version} of {manifest.created} is live, {manifest.counts['documents']} documents")


@command
def gc(
    config: ConfigOption,
    overrides: SetOption = None,
    keep: Annotated[int, typer.Option("--keep", min=1, help="Live artifacts to keep, the present one among them")] = 3,
    grace: Annotated[str, typer.Option("--grace", help="Nothing younger is deleted: 36h, 7d")] = "1d",
    compact: Annotated[bool, typer.Option("--compact", help="Write tiny and mostly dead embedding shards anew")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only tell what would go")] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Delete what neither the last artifacts nor a run of late needs."""
    from pipeline.operations import upkeep

    settings = load_config(config, tuple(overrides or ()))
    found = upkeep.collect(settings, keep, duration(grace), compact=compact, dry_run=dry_run, say=_tell)
    if as_json:
        print_json(asdict(found) | {"dry_run": dry_run})
        return
    total = f"{sum(found.files.values())} files, {sum(found.size_bytes.values()) / 1e6:.1f} MB"
    results.print(f"{'would delete' if dry_run else 'deleted'} {total}; kept artifacts {', '.join(found.kept) or 'none'}")
    if compact:
        results.print(f"embedding shards: {found.shards_before} {'would become' if dry_run else 'became'} {found.shards_after}")
    for folder in sorted(found.files):
        results.print(f"  {folder}: {found.files[folder]} files, {found.size_bytes[folder] / 1e6:.1f} MB")


@command
def purge(
    config: ConfigOption,
    doc_ids: Annotated[list[str], typer.Option("--doc-id", help="A document to erase; repeatable")],
    overrides: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Erase documents that have left the corpus: text, vectors, rejected rows, all earlier artifacts; and prove it."""
    from pipeline.operations import erasure

    found = erasure.purge(load_config(config, tuple(overrides or ())), doc_ids, _tell)
    if as_json:
        print_json(asdict(found))
        return
    what = f"{found.passages} passages, {found.rejected} rejected rows, {found.vectors} vectors, {found.files} other files"
    results.print(f"erased {what}; nothing of {len(doc_ids)} documents is in the {found.searched} files left")


@command
def unlock(
    config: ConfigOption,
    overrides: SetOption = None,
    force: Annotated[bool, typer.Option("--force", help="Take the root from its writer, who can then commit no more")] = False,
    verbose: VerboseOption = False,
) -> None:
    """Show who writes under the root; with --force take it away. A dead writer needs none: the next run waits it out."""
    from pipeline.root import log

    settings = load_config(config, tuple(overrides or ()))
    storage = Storage(settings.root, settings.store)
    holder = log.unlock(storage) if force else Log(storage).refresh().holder
    if holder is None:
        results.print(f"{storage.uri}: nobody writes here", markup=False)
        return
    if not force:
        raise LockedError(f"{storage.uri}: held by {holder.who}; vecmill unlock --force takes it away")
    results.print(f"{storage.uri}: taken from {holder.who}; it can commit no more", markup=False)
