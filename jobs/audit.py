"""``vecmill audit``: what the live artifact holds against what it was made from."""

from dataclasses import asdict
from typing import Annotated

import typer

from jobs.options import ConfigOption, JsonOption, SetOption, VerboseOption, command, print_json, results
from pipeline.config_file import load_config


@command
def audit(
    config: ConfigOption,
    overrides: SetOption = None,
    sample: Annotated[int, typer.Option("--sample", min=1, help="Passages whose vector and code are compared")] = 10_000,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Prove that every live passage is in the index once, with its own text, vector and code; exit 5 names the first wrong."""
    from pipeline.artifacts.audit import audit as run_audit

    found = run_audit(load_config(config, tuple(overrides or ())), sample)
    if as_json:
        print_json(asdict(found) | {"ok": True})
        return
    results.print(
        f"artifact {found.artifact}: {found.passages} passages, each once in the index and with its text "
        f"({found.document_rows} document rows); {found.vectors} vectors as stored; {found.codes} list entries checked, "
        f"{found.other_codes} on a tie"
    )
