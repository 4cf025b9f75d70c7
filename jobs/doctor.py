"""``vecmill doctor``: whether this machine and that storage can do what a run needs."""

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from jobs.options import JsonOption, VerboseOption, command, print_json, results
from pipeline.config import StoreConfig
from pipeline.config_file import load_config
from pipeline.errors import VerificationError
from pipeline.operations.doctor import Finding, examine, examine_storage

app = typer.Typer(help="Try out whether this machine and a storage can do what a run needs.", invoke_without_command=True)
OptionalConfig = Annotated[Path | None, typer.Option("--config", "-c", help="Look at its model, root and corpus too")]


@app.callback()
def machine(context: typer.Context, config: OptionalConfig = None, as_json: JsonOption = False) -> None:
    """Look at Python, packages, FAISS, GPU, disk; with -c at the model, the root and the corpus."""
    if context.invoked_subcommand is None:
        _machine(config, as_json=as_json)


@command
def _machine(config: Path | None, *, as_json: bool) -> None:
    bad = _report(examine(load_config(config) if config else None), as_json=as_json)
    if bad:
        raise VerificationError(f"doctor: {bad[0].what}: {bad[0].found}; {bad[0].advice}")


@app.command()
@command
def storage(
    uri: Annotated[str, typer.Argument(help="Folder or bucket to try; a folder of its own is made there and removed")],
    config: OptionalConfig = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Race writers for the same object: exit 5 where more than one may win."""
    _report(examine_storage(uri, load_config(config).store if config else StoreConfig()), as_json=as_json)


def _report(findings: Iterable[Finding], *, as_json: bool) -> list[Finding]:
    """Show findings as they come; returns those that are not well."""
    seen: list[Finding] = []
    try:
        for finding in findings:
            seen.append(finding)
            if not as_json:
                text = finding.found if finding.ok else f"{finding.found}; {finding.advice}"
                results.print(f"{'ok ' if finding.ok else 'BAD'} {finding.what:22} {text}", markup=False)
    finally:
        if as_json:
            print_json([asdict(finding) for finding in seen])
    return [finding for finding in seen if not finding.ok]
