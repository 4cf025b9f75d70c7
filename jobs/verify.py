"""``vecmill verify``: every byte of an artifact against its manifest."""

from jobs.options import JsonOption, SetOption, VerboseOption, command, print_json, results
from jobs.search import NOTHING_NAMED, ArtifactOption, OptionalConfig
from pipeline.artifacts import artifact as artifacts
from pipeline.artifacts.publish import require_live
from pipeline.config_file import load_config
from pipeline.errors import ConfigError
from pipeline.root import layout
from pipeline.root.storage import Storage


@command
def verify(
    config: OptionalConfig = None,
    overrides: SetOption = None,
    artifact: ArtifactOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Read every file of an artifact back and compare hashes; exit 5 names the first that is wrong."""
    settings = load_config(config, tuple(overrides or ())) if config else None
    store = settings.store if settings else None
    if artifact is not None:
        manifest = artifacts.verify(Storage(artifact, store), "")
    elif settings is not None:
        storage = Storage(settings.root, store)
        manifest = artifacts.verify(storage, layout.artifact(require_live(storage).version))
    else:
        raise ConfigError(NOTHING_NAMED)
    size_bytes = sum(file.size_bytes for file in manifest.all_files.values())
    if as_json:
        print_json({"artifact": manifest.version, "files": len(manifest.all_files) + 1, "bytes": size_bytes, "ok": True})
    else:
        results.print(
            f"artifact {manifest.version}: {len(manifest.all_files) + 1} files, {size_bytes / 1e6:.1f} MB, all as recorded"
        )
