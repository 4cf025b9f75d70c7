"""``python -m jobs``, installed as ``vecmill``."""

import typer

from jobs.audit import audit
from jobs.bench import app as bench
from jobs.compare import compare
from jobs.demo import demo
from jobs.doctor import app as doctor
from jobs.evaluate import evaluate
from jobs.export import export
from jobs.plan import plan
from jobs.reindex import embed, index, ingest, reindex
from jobs.schedule import schedule
from jobs.search import search
from jobs.serve import serve
from jobs.status import status
from jobs.submit import submit
from jobs.train import distill, mine, train_encoder, train_reranker
from jobs.tune import report, tune
from jobs.upkeep import gc, purge, rollback, unlock
from jobs.validate import validate
from jobs.verify import verify
from pipeline import __version__

app = typer.Typer(
    name="vecmill",
    help="A corpus of text becomes one servable vector index, and stays up to date.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS = (
    reindex, ingest, embed, index, plan, validate, search, serve, evaluate, compare, tune, report, verify, audit, export,
    status, rollback, gc, purge, unlock, submit, schedule, mine, train_encoder, train_reranker, distill, demo,
)  # fmt: skip
for function in COMMANDS:
    app.command()(function)
app.add_typer(bench, name="bench")
app.add_typer(doctor, name="doctor")


@app.command()
def version() -> None:
    """Print the version."""
    typer.echo(__version__)


def main() -> None:
    """Entry point of ``vecmill``."""
    app()


if __name__ == "__main__":
    main()
