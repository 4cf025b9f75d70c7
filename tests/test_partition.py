"""An artifact asked in several partitions answers as it does in one."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest

from pipeline.ann import collection, index
from pipeline.ann.index_plan import choose
from pipeline.ann.vectors import VECTORS
from pipeline.artifacts.artifact import describe
from pipeline.config_what import IndexConfig
from pipeline.errors import ConfigError
from pipeline.root.manifest import IndexPart, Merged, OperatingPoint
from pipeline.search import document_files
from pipeline.search.document_files import SCHEMA, Documents, DocumentsWriter
from pipeline.search.filters import METADATA, parse_filter, write_metadata
from pipeline.search.lexical import write_lexical
from pipeline.search.partition import Found, LocalPartition, best_of, ordinals_of, share_of
from pipeline.search.searcher import Ask, Queries, Searcher
from tests.conftest import TOPICS
from tests.test_index import unit_vectors

COUNT, DIM, PARTS = 5000, 32, 4
QUERIES = Queries(
    unit_vectors(20, DIM, seed=9), [f"Note on the {TOPICS[n % 10]} and the {TOPICS[n // 2]}, number {n}" for n in range(20)]
)
FILTERS = {
    "half": {"type": "eq", "key": "odd", "value": True},
    "few": {"type": "lt", "key": "number", "value": 40},
    "one": {"type": "eq", "key": "number", "value": 4321},
    "last": {"type": "gte", "key": "number", "value": 4600},
    "none": {"type": "eq", "key": "number", "value": -1},
}


def documents_of(ordinal):
    """Two passages to a document; every seventh text is in three documents, of which filters let one pass or two."""
    copies = 3 if ordinal % 7 == 0 else 1
    return [(f"d{ordinal // 2}" if not copy else f"copy{ordinal}-{copy}", ordinal + copy) for copy in range(copies)]


def text_of(ordinal):
    return f"Note {ordinal} on the {TOPICS[ordinal % 10]} and the {TOPICS[ordinal // 10 % 10]}, {TOPICS[ordinal // 100 % 10]}."


def table_of(ordinals):
    rows = [
        {
            "ordinal": ordinal, "doc_id": name, "passage": ordinal % 2, "start": 0, "end": 1, "text": text_of(ordinal),
            "source_uri": "file:///c", "source_row": ordinal, "truncated": False,
            "metadata": f'{{"number": {number}, "odd": {str(number % 2 == 1).lower()}}}',
        }
        for ordinal in ordinals
        for name, number in documents_of(ordinal)
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write_index(kind, vectors, folder):
    """Four index files, of which the last is longer."""
    data, codes = None, None
    if kind != "flat":
        plan = choose(IndexConfig(kind=kind, nlist=32), COUNT, DIM)
        data = index.train(plan, vectors.astype(np.float32), seed=1)
        codes = index.Trained(data).encode(vectors.astype(np.float32), "shard")
    parts = []
    for number, first in enumerate(range(0, COUNT - 500, (COUNT - 500) // PARTS)):
        end = COUNT if number == PARTS - 1 else first + (COUNT - 500) // PARTS
        block = range(first, end)
        made = (
            index.merge(data, kind, [(codes[first:end], np.arange(first, end))]) if data else index.build(None, vectors, block)
        )
        name = f"index-{number:04d}.faiss"
        index.write(made, folder / name)
        parts.append(IndexPart(name=name, first=first, count=end - first, mapped=index.can_be_mapped(made)))
    return tuple(parts)


@pytest.fixture(scope="module", params=["flat", "ivfpqfs", "ivfsq8"])
def artifact(request, tmp_path_factory):
    """A folder with index, vectors, documents, words and metadata; documents in files of about a thousand rows."""
    folder = tmp_path_factory.mktemp(request.param)
    vectors = unit_vectors(COUNT, DIM).astype(np.float16)
    vectors.tofile(folder / VECTORS)
    parts = write_index(request.param, vectors, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(document_files, "FILE_ROWS", 1000)
        with DocumentsWriter(folder, 2 * COUNT) as writer:
            for first in range(0, COUNT, 300):
                writer.write(table_of(range(first, min(first + 300, COUNT))))
    documents = Documents(folder, writer.files)
    names = write_lexical(documents.texts(), "english", folder)
    write_metadata((batch for _, _, batch in documents.batches(["ordinal", "metadata"])), ("number", "odd"), folder / METADATA)
    names += [VECTORS, METADATA, *(part.name for part in parts), *(file.name for file in writer.files)]
    files = {name: describe(folder / name, 1).model_copy(update={"name": name}) for name in names}
    merged = Merged(
        version="v", dim=DIM, files=files, parts=parts, documents=tuple(writer.files), rescore="float16", lexical="english",
        columns=("number", "odd"), records={}, counts={"passages": COUNT},
    )  # fmt: skip
    return request.param, folder, merged


def searcher(artifact, count, each=map):
    kind, folder, merged = artifact
    point = OperatingPoint(nprobe=0 if kind == "flat" else 24, rescore=0 if kind == "flat" else 8, recall=1, latency_ms=1)
    shares = [share_of(merged, number, count) for number in range(count)]
    return Searcher([LocalPartition(folder, share) for share in shares], merged, point, each)


def seen(answers):
    """What the answers say, less the scores."""
    return [[(text.rank, text.text, [hit.doc_id for hit in text.documents]) for text in found] for found in answers]


def scores_of(answers):
    return [value for found in answers for text in found for value in (text.score, *text.scores.values())]


def assert_same(kind, one, several, ask):
    """Partitions of an index with lists look at more candidates together, so they may find what the one has missed."""
    expected, found = one.ask(QUERIES, ask), several.ask(QUERIES, ask)
    assert [len(texts) for texts in found] == [len(texts) for texts in expected]
    if kind == "flat" or ask.mode == "lexical" or ask.exact:
        assert seen(found) == seen(expected)
        assert scores_of(found) == pytest.approx(scores_of(expected), abs=1e-6)
        return
    pairs = [
        ({text.text for text in texts}, {text.text for text in others}) for texts, others in zip(expected, found, strict=True)
    ]
    total = sum(len(texts) for texts, _ in pairs)
    assert sum(len(texts & others) for texts, others in pairs) >= 0.99 * total


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
def test_several_partitions_answer_as_one(artifact, count, mode):
    one, several = searcher(artifact, 1), searcher(artifact, count)
    for ask in (Ask(1, mode=mode), Ask(10, mode=mode), Ask(60, mode=mode), Ask(10, mode=mode, group="passage")):
        assert_same(artifact[0], one, several, ask)
    if mode == "dense":
        assert_same(artifact[0], one, several, Ask(20, exact=True))


@pytest.mark.parametrize("mode", ["dense", "lexical", "hybrid"])
@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_lets_the_same_pass(artifact, name, mode, monkeypatch):
    monkeypatch.setattr(collection, "EXACT_FLOATS", 300 * DIM)
    one, several = searcher(artifact, 1), searcher(artifact, 3)
    wanted = parse_filter(FILTERS[name])
    for group in ("document", "passage"):
        assert_same(artifact[0], one, several, Ask(10, mode=mode, filter=wanted, group=group))
    found = [hit.metadata for texts in several.ask(QUERIES, Ask(10, filter=wanted)) for text in texts for hit in text.documents]
    assert bool(found) == (name != "none")
    assert name != "half" or all('"odd": true' in metadata for metadata in found)
    if mode == "dense":
        assert_same(artifact[0], one, several, Ask(10, filter=wanted, exact=True))


def test_exact_search_finds_all_that_a_filter_lets_pass(artifact):
    answers = searcher(artifact, 2).ask(QUERIES, Ask(40, filter=parse_filter(FILTERS["few"]), exact=True, group="passage"))
    passing = [ordinal for ordinal in range(COUNT) if any(number < 40 for _, number in documents_of(ordinal))]
    assert [sorted(text.text for text in found) for found in answers] == [sorted(map(text_of, passing))] * len(QUERIES)


def test_more_than_there_is_gives_all_there_is(artifact):
    one, several, query = searcher(artifact, 1), searcher(artifact, 3), QUERIES.at([0])
    (expected,), (found,) = (each.ask(query, Ask(COUNT + 7)) for each in (one, several))
    assert {text.text for text in found} == {text.text for text in expected}
    (found,) = several.ask(query, Ask(COUNT + 7, group="passage"))
    assert {text.text for text in found} == set(map(text_of, range(COUNT)))


def test_a_document_is_found_by_id_wherever_it_is(artifact):
    vectors = np.fromfile(artifact[1] / VECTORS, "<f2").reshape(-1, DIM)
    several = searcher(artifact, 3)
    for ordinal in (0, 1501, 2250, COUNT - 1):
        assert (several.vector_of(f"d{ordinal // 2}", ordinal % 2) == vectors[ordinal].astype(np.float32)).all()
    assert several.vector_of("nobody", 0) is None
    assert several.vector_of("d0", 5) is None


def test_partitions_can_be_asked_side_by_side(artifact):
    with ThreadPoolExecutor(3) as pool:
        answers = searcher(artifact, 3, pool.map).ask(QUERIES, Ask(10, mode="hybrid"))
    assert seen(answers) == seen(searcher(artifact, 3).ask(QUERIES, Ask(10, mode="hybrid")))


def test_shares_have_every_index_file_once_and_the_documents_of_their_ordinals(artifact):
    _, folder, merged = artifact
    for count in range(1, PARTS + 1):
        shares = [share_of(merged, number, count) for number in range(count)]
        assert [part for share in shares for part in share.parts] == list(merged.parts)
        whole = set(merged.files) - {file.name for file in (*merged.parts, *merged.documents)}
        for share in shares:
            assert set(share.files) == whole | {file.name for file in (*share.parts, *share.documents)}
            held = ordinals_of(share.parts)
            rows = LocalPartition(folder, share).rows(np.array([held.start, held.stop - 1]), None)
            assert all(rows.values())
        assert count == 1 or all(len(share.documents) < len(merged.documents) for share in shares)
    with pytest.raises(ConfigError, match=r"index\.partitions: 5"):
        share_of(merged, 0, PARTS + 1)


def test_answers_are_merged_by_score_and_ties_by_ordinal():
    def found(is_all, *pairs):
        scores, ordinals = zip(*pairs, strict=True)
        return Found(np.array([scores], np.float32), np.array([ordinals]), np.array([is_all]))

    nothing = (-np.inf, -1)
    one, two = found(True, (0.9, 3), (0.5, 8), nothing), found(True, (0.9, 1), (0.7, 20), (0.5, 2))
    best = best_of([one, two], 3)
    assert best.ordinals.tolist() == [[1, 3, 20]]
    assert not best.is_all[0]  # there are five
    assert best_of([one, two], 5).ordinals.tolist() == [[1, 3, 20, 2, 8]]
    assert best_of([one, two], 5).is_all[0]
    assert not best_of([one, found(False, (0.9, 1), (0.7, 20))], 5).is_all[0]
