"""Ingest units of a corpus that changes."""

import pyarrow.parquet as pq
import pytest

from pipeline.ingest.units import follow, identify_files, plan_units, reading
from pipeline.root.job import plan_job
from pipeline.run import reindex
from tests.conftest import make_config, sentences, write_jsonl
from tests.faults.alone import alone as alone  # a fixture

pytestmark = pytest.mark.usefixtures("alone")


def units_of(config, earlier=()):
    space = plan_job(config, on_gpu=False).spec.space
    return follow(plan_units(identify_files(config).chosen, config, space), earlier, config, space)


def passages(root, units):
    files = sorted(
        file for unit in units for file in (root / "passages").glob(f"{unit.name}-*.parquet") if "." not in file.stem
    )
    return pq.read_table(files).to_pylist()


def test_a_changed_export_follows_the_units_that_read_it_and_gives_what_a_new_root_gives(tmp_path):
    rows = [*sentences(60), {"id": "long", "text": "One word after another. " * 200}]
    write_jsonl(tmp_path / "corpus" / "a.jsonl", rows)
    config = make_config(tmp_path / "root", tmp_path / "corpus", index={"kind": "flat"})
    first = reindex(config)
    (old,) = units_of(config)
    assert units_of(config, first.snapshot.files) == [old], "an unchanged file follows nothing"
    rows[5]["text"] += " Revised."
    write_jsonl(tmp_path / "corpus" / "a.jsonl", [*rows[1:], {"id": "new", "text": "Something new."}])
    (new,) = units_of(config, first.snapshot.files)
    assert (new.before, new.name != old.name) == ((old.name,), True)
    second = reindex(config)
    fresh = reindex(make_config(tmp_path / "fresh", tmp_path / "corpus", index={"kind": "flat"}))
    assert second.snapshot.counts == fresh.snapshot.counts
    assert passages(tmp_path / "root", [new]) == passages(tmp_path / "fresh", [new])
    assert len(passages(tmp_path / "fresh", [new])) == second.snapshot.counts["passages"] > 62


def test_keys_that_are_as_they_always_were_do_not_name_a_unit(tmp_path):
    """A root made before the key was there is not read anew."""
    config = make_config(tmp_path / "root", tmp_path / "c")
    assert reading(config, "space")["passages"] == {"long": "split", "overlap": None}
    shorter = make_config(tmp_path / "root", tmp_path / "c", passages={"tokens": 64, "pool": "mean"})
    assert reading(shorter, "space")["passages"] == {"long": "split", "overlap": None, "tokens": 64, "pool": "mean"}
