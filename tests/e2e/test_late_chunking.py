"""Late chunking: the vector of a window is the mean of its tokens after the model has read all of the document."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from pipeline.artifacts.audit import audit
from pipeline.artifacts.live import open_live
from pipeline.config_what import PassagesConfig
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import context_tokens
from pipeline.errors import ConfigError
from pipeline.ingest.passages import CONTEXT_BYTES, Splitter, late_keys, passage_key
from pipeline.operations.erasure import purge
from pipeline.root.job import plan_job
from pipeline.run import reindex
from tests.conftest import make_config, save_first_layer, sentences, write_jsonl
from tests.e2e.test_cli import vecmill

LATE = {"late": True, "tokens": 32}
NAMES = ["Alexandria", "Pharos", "Ptolemy", "Sostratus", "Octavian", "Cleopatra"]
LONG = " ".join(f"In year {n} {NAMES[n % 6]} saw the light of the harbour, and it was seen from afar." for n in range(40))
SPACED = "".join(f"one{n}  two\n\nthree " for n in range(60))
MIDDLE = "The keeper of the tower lives alone. " * 3 + "He has a violin and plays it when ships come home late at night."


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """One layer of MiniLM, which takes 256 tokens."""
    return str(save_first_layer(tmp_path_factory.mktemp("small") / "model"))


@pytest.fixture
def config(tmp_path, small, local_ray):
    rows = [{"id": "long", "text": LONG}, {"id": "middle", "text": MIDDLE}, *sentences(5)]
    write_jsonl(tmp_path / "c" / "a.jsonl", rows)
    return make_config(tmp_path / "root", tmp_path / "c", passages=LATE, encoder={"model": small})


def vectors_of(config, doc_id):
    found = (open_live(config).partition.vector_of(doc_id, number) for number in range(100))
    return [vector[0] for vector in found if vector is not None]


def pieces_of(passages):
    return [(number > 0, passage.text) for number, passage in enumerate(passages)]


@pytest.mark.parametrize("prompt", ["", "passage: "])
def test_the_passages_of_a_context_share_out_its_tokens(minilm, prompt):
    tokenizer = TextTokenizer(minilm[1], 128, (prompt, ""))
    passages, (short,) = Splitter(tokenizer, PassagesConfig(**LATE), prompt)([LONG, "A short one."])
    assert short.key == passage_key("A short one.")
    contexts = {passage.key[:CONTEXT_BYTES] for passage in passages}
    assert len(contexts) > 3
    assert len({passage.key for passage in passages}) == len(passages)
    for context in contexts:
        own = [passage for passage in passages if passage.key.startswith(context)]
        assert len(own) > 1
        assert sorted(own, key=lambda passage: passage.key) == own
        assert all(before.end <= after.start for before, after in pairwise(own))
        ids, starts = context_tokens(tokenizer, prompt, pieces_of(own))
        assert ids == tokenizer([prompt + LONG[own[0].start : own[-1].end]])[0]
        assert starts[0] == 0
        for passage, start, end in zip(own[1:-1], starts[1:-1], starts[2:], strict=True):
            assert ids[start:end] == tokenizer([passage.text])[0][1:-1]


def test_keys_tell_equal_texts_apart_and_end_as_those_of_their_text():
    pieces = [(False, "one"), (True, "two"), (True, "one")]
    keys = late_keys(pieces)
    assert len({*keys}) == 3
    assert {len(key) for key in keys} == {16} and len({key[:CONTEXT_BYTES] for key in keys}) == 1
    assert [key[-4:] for key in keys] == [passage_key(text)[-4:] for _, text in pieces]
    assert not {*late_keys([*pieces[:2], (True, "three")])} & {*keys}
    assert not {*late_keys([pieces[0], (False, "two"), pieces[2]])} & {*keys}
    assert late_keys(pieces) == keys


def test_windows_that_end_within_words_share_out_the_tokens_of_the_text(minilm):
    tokenizer = TextTokenizer(minilm[1], 128)
    for text in (
        "".join(map(chr, range(0x4E00, 0x4F2C))),
        "https://example.org/" + "".join(f"a{n}-b2/" for n in range(80)),
        SPACED,
    ):
        passages = Splitter(tokenizer, PassagesConfig(**LATE), "")([text])[0]
        for context in {passage.key[:CONTEXT_BYTES] for passage in passages}:
            own = [passage for passage in passages if passage.key.startswith(context)]
            if len(own) == 1:
                continue
            spaces = [False, *(before.end < after.start for before, after in pairwise(own))]
            ids, starts = context_tokens(tokenizer, "", list(zip(spaces, [each.text for each in own], strict=True)))
            assert len(ids) <= 128
            assert all(before < after for before, after in pairwise([*starts, len(ids)]))
            assert ids == tokenizer([" ".join(text[own[0].start : own[-1].end].split())])[0]


def test_vectors_are_means_of_tokens_that_have_read_their_document(config, small):
    assert reindex(config).snapshot.counts["split"] == 2
    model = SentenceTransformer(small, device="cpu")
    tokens = model.encode(MIDDLE, output_value="token_embeddings")
    tokenizer = TextTokenizer(plan_job(config, on_gpu=False).model, 256)
    passages = Splitter(tokenizer, config.passages, "")([MIDDLE])[0]
    texts = [passage.text for passage in passages]
    ids, starts = context_tokens(tokenizer, "", pieces_of(passages))
    assert len(ids) == len(tokens)
    found = vectors_of(config, "middle")
    assert len(found) == len(texts) > 1
    for vector, text, start, end in zip(found, texts, starts, [*starts[1:], len(ids)], strict=True):
        mean = tokens[start:end].mean(axis=0).numpy()
        assert vector @ mean / np.linalg.norm(mean) > 0.999
        assert vector @ model.encode(text, normalize_embeddings=True) < 0.999
    whole = model.encode([row["text"] for row in sentences(5)], normalize_embeddings=True)
    for number, vector in enumerate(whole):
        assert vectors_of(config, f"d{number}")[0] @ vector > 0.999


def test_late_passages_are_audited_encoded_once_and_purged(config):
    first = reindex(config)
    assert first.encoded == first.live.counts["passages"] > 20
    again = reindex(config)
    assert (again.encoded, again.built) == (0, None)
    assert audit(config, 1000).passages == first.live.counts["passages"]
    before = vectors_of(config, "middle")
    file = Path(config.corpus.uri) / "a.jsonl"
    changed = f"{MIDDLE} Sometimes."
    write_jsonl(file, [{"id": "long", "text": LONG}, {"id": "middle", "text": changed}, *sentences(5)])
    assert reindex(config).encoded == len(vectors_of(config, "middle")) > 1  # each of them has read the new word
    assert all(vector @ other < 0.9999 for vector, other in zip(before, vectors_of(config, "middle"), strict=False))
    write_jsonl(file, [{"id": "middle", "text": changed}, *sentences(5)])
    reindex(config)
    purge(config, ["long"])
    assert reindex(config).encoded == 0
    assert audit(config, 1000).passages == 5 + len(vectors_of(config, "middle"))


def test_nothing_is_mined_by_vectors_that_no_text_has_by_itself(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(json.dumps({"root": str(tmp_path / "root"), "corpus": {"uri": str(tmp_path / "c")}, "passages": LATE}))
    done = vecmill("mine", "-c", file, "--from", "title", "--out", tmp_path / "pairs.parquet", check=False)
    assert (done.returncode, "mine from an artifact made without it" in " ".join(done.stderr.split())) == (2, True), done.stderr


def test_what_cannot_be_chunked_late_is_refused(config):
    openvino = config.encoder.model_copy(update={"backend": "openvino"})
    with pytest.raises(ConfigError, match=r"passages\.late: needs a plain transformer .* on openvino"):
        plan_job(config.model_copy(update={"encoder": openvino}), on_gpu=False)
    for wrong in ({}, {"tokens": 32, "pool": "mean"}):
        with pytest.raises(ValueError, match=r"late needs passages\.tokens"):
            PassagesConfig(late=True, **wrong)
