from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from pipeline.config_what import PassagesConfig
from pipeline.encoding.tokenizer import TextTokenizer
from pipeline.encoding.windows import context_tokens
from pipeline.errors import ConfigError
from pipeline.ingest.passages import CONTEXT_BYTES, Splitter, passage_key
from pipeline.root.shards import KEY_BYTES

WORDS = st.lists(
    st.sampled_from(["river", "unbelievable", "数学", "🙂", "x", "Grüße", "naïve,", "end.", "\n", "שלום"]), max_size=400
)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return TextTokenizer(minilm[1], 64)


def splitter(tokenizer, prompt="", **config):
    return Splitter(tokenizer, PassagesConfig(**config), prompt)


def test_short_document_is_one_passage(tokenizer):
    (passage,) = splitter(tokenizer)(["a short text"])[0]
    assert (passage.start, passage.end, passage.text, passage.truncated) == (0, 12, "a short text", False)
    assert passage.key == passage_key("a short text")
    assert len(passage.key) == KEY_BYTES


@settings(max_examples=60, deadline=None)
@given(words=WORDS, prompt=st.sampled_from(["", "passage: "]))
def test_windows_fit_cover_and_keep_their_spans(minilm, words, prompt):
    tokenizer = TextTokenizer(minilm[1], 64)
    text = " ".join(words).strip()
    passages = splitter(tokenizer, prompt, overlap=8)([text])[0]
    covered = [False] * len(text)
    for passage in passages:
        assert text[passage.start : passage.end] == passage.text
        count = tokenizer.count([prompt + passage.text])[0]
        assert count == passage.tokens <= 64
        assert not passage.truncated
        covered[passage.start : passage.end] = [True] * (passage.end - passage.start)
    assert all(seen or char.isspace() for seen, char in zip(covered, text, strict=True))
    starts = [passage.start for passage in passages]
    assert starts == sorted(set(starts))


def test_windows_are_as_short_as_the_config_says(tokenizer):
    text = " ".join(f"word{number}" for number in range(100))
    passages = splitter(tokenizer, "note: ", tokens=32, overlap=4)([text, "a short text"])
    assert [len(each) for each in passages] == [len(passages[0]), 1]
    assert len(passages[0]) > 8
    for passage in passages[0]:
        assert tokenizer.count(["note: " + passage.text])[0] == passage.tokens <= 32
    with pytest.raises(ConfigError, match=r"passages.tokens: 65, the encoder takes 64 at most"):
        splitter(tokenizer, tokens=65)


@pytest.mark.parametrize(
    "text", ["数学" * 300, "https://example.org/" + "a1-b2/" * 200, " ".join(f"word{n}" for n in range(200))]
)
def test_windows_without_overlap_share_nothing(tokenizer, text):
    passages = splitter(tokenizer, tokens=32, overlap=0)([text])[0]
    assert len(passages) > 5
    assert all(before.end <= after.start for before, after in pairwise(passages))
    assert "".join(passage.text for passage in passages).replace(" ", "") == text.replace(" ", "")


def test_a_document_of_pooled_windows_is_one_passage_of_all_their_tokens(tokenizer):
    text = " ".join(f"word{number}" for number in range(100))
    windows = splitter(tokenizer, tokens=32)([text])[0]
    ((pooled,),) = splitter(tokenizer, tokens=32, pool="mean")([text])
    assert (pooled.key, pooled.start, pooled.end, pooled.text) == (passage_key(text), 0, len(text), text)
    assert (pooled.tokens, pooled.truncated) == (sum(window.tokens for window in windows), False)
    assert splitter(tokenizer, pool="mean")(["a short text"]) == splitter(tokenizer)(["a short text"])
    with pytest.raises(ValueError, match=r"tokens, pool and late are of windows; set passages\.long: split"):
        PassagesConfig(long="truncate", pool="mean")


def test_windows_start_and_end_at_words_and_overlap(tokenizer):
    text = " ".join(f"word{number}" for number in range(300))
    passages = splitter(tokenizer, overlap=10)([text])[0]
    assert len(passages) > 5
    for before, after in pairwise(passages):
        assert after.start < before.end
        assert after.start == 0 or text[after.start - 1] == " "
        assert before.end == len(text) or text[before.end] == " "


def test_truncate_keeps_the_document_whole_and_says_so(tokenizer):
    text = "word " * 200 + "end"
    (passage,) = splitter(tokenizer, long="truncate")([text])[0]
    assert (passage.text, passage.tokens, passage.truncated) == (text, 64, True)


def test_text_without_spaces_is_split_too(tokenizer):
    passages = splitter(tokenizer, overlap=4)(["数" * 500])[0]
    assert "".join(dict.fromkeys(p.text[0] for p in passages)) == "数"
    assert passages[-1].end == 500
    assert len(passages) >= 500 // 62


def test_a_megabyte_is_split_in_bounded_segments(tokenizer):
    text = "the quick brown fox jumps over the lazy dog " * 25_000
    passages = splitter(tokenizer)([text.strip()])[0]
    assert passages[-1].end == len(text.strip())
    assert all(passage.tokens <= 64 for passage in passages)


def test_prompt_and_overlap_that_leave_no_room_are_refused(tokenizer):
    with pytest.raises(ConfigError, match="document_prompt"):
        splitter(tokenizer, "very " * 60)
    with pytest.raises(ConfigError, match="overlap"):
        splitter(tokenizer, overlap=40)


def test_what_was_counted_before_is_not_counted_again(tokenizer, monkeypatch):
    texts = ["A sea and a ship.", "word " * 200, "A sea and a ship.", "Another one."]
    splitter = Splitter(tokenizer, PassagesConfig(), "passage: ")
    expected = splitter(texts)
    known = {passage.key: passage.tokens for passages in expected for passage in passages}
    counted = []
    monkeypatch.setattr(tokenizer, "count", lambda texts, real=tokenizer.count: counted.extend(texts) or real(texts))
    assert splitter(texts, {expected[0][0].key: expected[0][0].tokens}) == expected
    assert "passage: A sea and a ship." not in counted
    counted.clear()
    assert splitter([texts[0], texts[3]], known) == [expected[0], expected[3]]
    assert counted == []


def byte_level(minilm):
    """A tokenizer of bytes, as those of ModernBERT and GPT are where they know no better."""
    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    specials = {"[CLS]": len(alphabet), "[SEP]": len(alphabet) + 1}
    inner = Tokenizer(models.BPE(alphabet | specials, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=list(specials.items()))
    made = TextTokenizer(minilm[1], 64)
    made._tokenizer = inner
    return made


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.sampled_from("a数学🙂é "), min_size=30, max_size=300), tokens=st.integers(16, 63))
def test_windows_end_between_characters_of_many_tokens(minilm, text, tokens):
    tokenizer = byte_level(minilm)
    text = text.strip()
    passages = splitter(tokenizer, late=True, tokens=tokens)([text])[0]
    contexts = {passage.key[:CONTEXT_BYTES] for passage in passages}
    for context in contexts:
        own = [passage for passage in passages if passage.key.startswith(context)]
        assert all(before.end <= after.start for before, after in pairwise(own))
        spaces = [False, *(before.end < after.start for before, after in pairwise(own))]
        read = context_tokens(tokenizer, "", list(zip(spaces, [each.text for each in own], strict=True)))
        assert read is not None
        ids, starts = read
        lengths = [end - start for start, end in pairwise([*starts, len(ids)])]
        assert all(length > 0 for length in lengths)
        assert sum(lengths) == len(ids) <= 64
    assert all(passage.tokens <= tokens for passage in passages)
