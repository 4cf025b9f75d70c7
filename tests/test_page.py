"""The search page and the report over HTTP, and in a real browser."""

import base64
import contextlib
import hashlib
import re
import shutil
from itertools import islice
from pathlib import Path

import pytest

from jobs.demo_corpus import docstrings
from pipeline.artifacts.artifact import MANIFEST
from pipeline.artifacts.live import open_live
from pipeline.reports.report import HEAD, HTML
from pipeline.root import layout
from pipeline.root.manifest import to_bytes
from pipeline.run import reindex
from pipeline.service.engine import Engine
from pipeline.service.page import FILE
from tests.conftest import make_config, start_ray, write_jsonl
from tests.e2e.browser import CHROMIUM, FACTS, tab
from tests.test_service import served

TOKEN = "s3cret"
HOSTILE = '<img src=x onerror="document.title=\'hurt\'"><script>document.title="hurt"</script> & <b>zebra stripes</b>'
NAMES = {"dense", "lexical", "hybrid"}
browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const parts = colour => { canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data]; };
  const light = colour => { const [r, g, b] = parts(colour).slice(0, 3).map(part => part / 255)
    .map(part => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = each => { while (parts(getComputedStyle(each).backgroundColor)[3] === 0) each = each.parentElement;
    return getComputedStyle(each).backgroundColor; };
  const found = {};
  for (const each of document.querySelectorAll("body *")) {
    const text = [...each.childNodes].some(node => node.nodeType === 3 && node.data.trim());
    if (!text || !each.checkVisibility() || ["SCRIPT", "STYLE"].includes(each.tagName)) continue;
    const [a, b] = [light(getComputedStyle(each).color), light(behind(each))];
    found[`${each.tagName}.${each.className}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
})()"""
"""Ratio of the lightness of text and what is behind it, by kind of element, as WCAG 2 measures it."""


def corpus():
    texts = [row | {"kind": ("class", "function")[number % 2]} for number, row in enumerate(islice(docstrings(), 240))]
    return [
        *texts,
        {"id": "<b>zebra</b>", "text": HOSTILE, "kind": "<i>kind</i>"},
        *({"id": f"same/{number}?a=b&c#d", "text": "Granite is an igneous rock.", "kind": None} for number in range(3)),
        {"id": "文/利率", "text": "中央银行在三月份再次提高了利率。", "kind": "zh"},
        {"id": "arabic", "text": "رفع البنك المركزي أسعار الفائدة مرة أخرى في مارس.", "kind": "ar"},
        {"id": "long", "text": "Not yet. " * 30 + "Then a kingfisher comes along. " + "And leaves. " * 60, "kind": "x"},
    ]  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory, short_tmp):
    folder = tmp_path_factory.mktemp("page")
    start_ray(short_tmp)
    made = make_config(
        folder / "root", folder / "corpus", corpus={"metadata": ["kind"]}, index={"lexical": True}, serve={"max_k": 50}
    )
    write_jsonl(folder / "corpus" / "a.jsonl", corpus())
    assert reindex(made).committed
    return made


@pytest.fixture(scope="module")
def client(config):
    with served(config) as client:
        yield client


@pytest.fixture
def page(client, tmp_path):
    """The page in a browser, which must not complain."""
    with tab(tmp_path) as opened:
        opened.visit(f"{client.base_url}/")
        opened.wait("document.querySelector('#about bdi')")
        yield opened
        assert opened.errors == []


def search(page, query):
    page.value("document.getElementById('q').focus(), document.getElementById('q').select()")
    page.write(query)
    with answered(page):
        page.press("Enter")


@contextlib.contextmanager
def answered(page):
    """Until what is done in it has its answer on the page, which says so."""
    page.value("document.getElementById('results').ariaBusy = 'true'")
    yield
    page.wait("document.getElementById('results').ariaBusy === 'false'")


def texts(page, query):
    return page.value(f"[...document.querySelectorAll({query!r})].map(each => each.textContent)")


def ids(page, within=""):
    return texts(page, f"{within} .open bdi")


def expected(client, **body):
    hits = client.post("/search", json=body).json()["results"][0]["hits"]
    return [hit["doc_ids"][0] for hit in hits]


def focused(page):
    return page.value("document.activeElement.querySelector('bdi')?.textContent ?? document.activeElement.id")


def test_the_page_needs_nothing_else_and_its_policy_lets_nothing_else_run(client):
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text == FILE.read_text(encoding="utf-8")
    for foreign in ("http:", "https:", "//cdn", "src=", "@import", "url(", "innerHTML", "insertAdjacentHTML", "onclick="):
        assert foreign not in answer.text
    rules = dict(rule.split(" ", 1) for rule in answer.headers["content-security-policy"].split("; "))
    assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == rules["frame-ancestors"] == "'none'"
    assert rules["connect-src"] == "'self'"
    for tag in ("script", "style"):
        (content,) = re.findall(f"<{tag}>(.*?)</{tag}>", answer.text, re.DOTALL)
        assert len(re.findall(f"^<{tag}", answer.text, re.M)) == 1
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert rules[f"{tag}-src"] == f"'sha256-{digest}'"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_its_colours_are_those_of_the_report():
    def colours(text):
        return re.findall(r"^(?:@media.*\{ )?:root \{ --ink.*$", text, re.M)

    report = (FILE.parent.parent / "reports" / HEAD).read_text(encoding="utf-8")
    assert len(colours(report)) == 2
    assert colours(FILE.read_text(encoding="utf-8")) == colours(report)


def test_the_report_is_the_file_of_the_artifact(client, config):
    answer = client.get("/report")
    file = Path(config.root) / layout.artifact(open_live(config).manifest.version) / HTML
    assert answer.content == file.read_bytes()
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.headers["content-security-policy"].startswith("sandbox; default-src 'none'")


def test_a_token_is_asked_for_the_report_and_not_for_the_page(config):
    with served(config, token=TOKEN) as client:
        assert client.get("/").status_code == 200
        for path in ("/report", "/info", "/index.html"):
            assert client.get(path).status_code == 401, path
        assert client.post("/", json={}).status_code == 405
        assert client.get("/report", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200


def test_an_artifact_without_a_report_is_404(config, tmp_path):
    manifest = open_live(config).manifest
    folder = shutil.copytree(Path(config.root) / layout.artifact(manifest.version), tmp_path / "artifact")
    bare = manifest.model_copy(update={"report": {}}).sealed()
    (folder / MANIFEST).write_bytes(to_bytes(bare))
    for name in manifest.report:
        (folder / name).unlink()
    with served(config, artifact=str(folder)) as client:
        answer = client.get("/report")
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "report_not_found"
        assert bare.version in answer.json()["error"]["message"]


@browser
def test_a_search_shows_what_the_service_answers(page, client):
    query = "return the sum of numbers"
    search(page, query)
    answer = client.post("/search", json={"queries": query, "k": 10}).json()
    hits = answer["results"][0]["hits"]
    assert ids(page) == [hit["doc_ids"][0] for hit in hits]
    assert texts(page, ".rank") == [*"123456789", "10"]
    source = hits[0]["documents"][0]["source"]
    assert page.value("document.querySelector('.source').textContent") == f"{source['uri']}:{source['row']}"
    text = page.value("document.querySelector('#results').innerText")
    assert f"dense {hits[0]['score']:.4f}" in text
    assert f"kind {hits[0]['documents'][0]['metadata']['kind']}" in text
    assert f"Artifact {answer['artifact']} · {answer['model']} · " in page.value("document.getElementById('about').innerText")
    took = page.value("document.querySelector('.took').innerText")
    assert re.fullmatch(r"\d+\.\d ms: queue \d+\.\d, encode \d+\.\d, search \d+\.\d", took)
    marks = {mark.lower() for mark in texts(page, "mark")}
    assert "return" in marks
    assert not marks & {"the", "of"}
    assert page.value("document.querySelector('[role=status]').textContent") == "10 results."
    assert page.value("document.title") == f"{query} - vecmill"


@browser
def test_the_page_begins_with_the_mode_of_the_config(config, tmp_path):
    hybrid = config.model_copy(update={"search": config.search.model_copy(update={"mode": "hybrid"})})
    with served(hybrid) as client, tab(tmp_path) as opened:
        opened.visit(f"{client.base_url}/")
        opened.wait("document.querySelector('[name=mode]:checked')")
        assert opened.value("document.querySelector('[name=mode]:checked').value") == "hybrid"
        query = "read a file line by line"
        search(opened, query)
        assert ids(opened) == expected(client, queries=query, k=10) == expected(client, queries=query, mode="hybrid", k=10)


@browser
def test_modes_and_the_back_button(page, client):
    query = "read a file line by line"
    search(page, query)
    for mode in ("lexical", "hybrid"):
        with answered(page):
            page.click(f"[value={mode}]")
        assert ids(page) == expected(client, queries=query, mode=mode, k=10)
    for mode in ("lexical", "dense"):
        with answered(page):
            page.value("history.back()")
        assert page.value("document.querySelector('[name=mode]:checked').value") == mode
        assert ids(page) == expected(client, queries=query, mode=mode, k=10)
    page.value("document.getElementById('k').focus(), document.getElementById('k').select()")
    page.write("3")
    page.press("Enter")
    page.wait("document.querySelectorAll('.hit').length === 3")
    shared = page.value("location.href")
    page.visit("about:blank")
    page.visit(shared)
    page.wait("document.querySelectorAll('.hit').length === 3")
    assert page.value("document.getElementById('q').value") == query


@browser
def test_side_by_side_in_columns_and_in_tabs(page, client):
    query = "igneous rock"
    search(page, query)
    with answered(page):
        page.click("[value=side]")
    for mode in NAMES:
        column = f"[aria-label={mode.capitalize()}]"
        assert ids(page, column) == expected(client, queries=query, mode=mode, k=10)
    assert "and 2 more" in page.value("document.querySelector('[aria-label=Lexical]').innerText")
    ranks = page.value("document.querySelector('[aria-label=Lexical] .hit').innerText")
    assert "dense rank 1" in ranks
    assert "hybrid rank 1" in ranks
    lefts = "[...document.querySelectorAll('.column')].map(each => each.getBoundingClientRect().x)"
    assert page.value(lefts) == sorted(set(page.value(lefts)))
    shown = "[...document.querySelectorAll('.column')].filter(each => each.checkVisibility()).map(each => each.ariaLabel)"
    assert page.value(shown) == ["Dense", "Lexical", "Hybrid"]
    page.press("j", "ArrowRight")
    assert page.value("document.activeElement.closest('.column').ariaLabel") == "Lexical"
    page.resize(390, 900)
    assert page.value(shown) == ["Dense"]
    page.click("#tabs button:nth-child(3)")
    assert page.value(shown) == ["Hybrid"]
    assert page.value("document.querySelector('#tabs [aria-pressed=true]').textContent") == "Hybrid"


@browser
def test_more_like_a_result_and_back(page, client):
    search(page, "granite, an igneous rock")
    assert ids(page)[0] == "same/0?a=b&c#d"
    with answered(page):
        page.click(".like")
    answer = client.get("/similar/same%2F0%3Fa=b&c%23d", params={"k": 10}).json()
    assert ids(page) == [hit["doc_ids"][0] for hit in answer["results"][0]["hits"]]
    assert ids(page)[0] == "same/1?a=b&c#d"
    with answered(page):
        page.value("history.back()")
    assert ids(page)[0] == "same/0?a=b&c#d"
    assert focused(page) == "same/0?a=b&c#d"


@browser
def test_the_keyboard_is_enough(page):
    assert focused(page) == "q"
    page.write("a comet over the harbour")
    page.press("Enter")
    page.wait("document.querySelectorAll('.hit').length === 10")
    found = ids(page)
    page.press("ArrowDown")
    assert focused(page) == found[0]
    page.press("j", "ArrowDown", "k")
    assert focused(page) == found[1]
    assert page.value("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.value("document.activeElement.ariaExpanded") == "true"
    detail = page.value("document.activeElement.closest('.hit').querySelector('.detail').innerText")
    assert "characters" in detail
    assert found[1] in detail
    page.press("Escape")
    assert page.value("document.activeElement.ariaExpanded") == "false"
    assert focused(page) == found[1]
    page.press("Tab")
    assert page.value("document.activeElement.textContent") == "More like this"
    page.press("Enter")
    page.wait("location.hash.includes('like=')")
    page.wait("document.querySelector('[aria-label=\"More like this\"]')")
    assert focused(page) == ids(page)[0]
    page.press("Escape")
    page.wait("document.querySelector('[aria-label=Dense]')")
    assert ids(page) == found
    assert focused(page) == found[1]
    page.press("Escape")
    assert focused(page) == "q"
    page.press("ArrowDown", "/")
    assert focused(page) == "q"
    page.write("rates/j/k")
    page.press("Enter")
    page.wait("location.hash.includes('rates')")
    assert page.value("document.getElementById('q').value") == "rates/j/k"


@browser
def test_markup_in_the_corpus_is_text(page):
    search(page, "<b>zebra stripes</b>")
    page.press("ArrowDown", "Enter")
    assert page.value("document.querySelector('.passage').textContent") == HOSTILE
    assert ids(page)[0] == "<b>zebra</b>"
    assert ("kind", "<i>kind</i>") in zip(texts(page, "dt"), texts(page, "dd"), strict=True)
    with answered(page):
        page.click(".like")
    assert "like <b>zebra</b>" in page.value("document.querySelector('#status').textContent")
    assert page.value("document.querySelectorAll('img, main script, main i, main bdi *').length") == 0
    assert "hurt" not in page.value("document.title")


@browser
def test_words_are_found_in_any_script_and_far_inside(page):
    search(page, "利率")
    assert set(texts(page, "mark")) == {"利率"}
    with answered(page):
        page.click("[value=lexical]")
    search(page, "kingfishers")
    assert (ids(page), texts(page, "mark")) == (["long"], ["kingfisher"])
    (short,) = texts(page, ".passage")
    assert short.startswith("… ")
    assert short.endswith(" …")
    assert page.value("[...document.querySelectorAll('.passage')].every(each => each.dir === 'auto')")


@browser
def test_a_filter_and_what_is_wrong_with_one(page, client):
    search(page, "a function")
    wanted = {"type": "eq", "key": "kind", "value": "zh"}
    page.value("document.getElementById('filtering').open = true")
    page.value("document.getElementById('filter').focus()")
    page.write('{"type": "eq", "key": "kind", "value": "zh"}')
    with answered(page):
        page.press("Enter")
    assert ids(page) == expected(client, queries="a function", filter=wanted) == ["文/利率"]
    page.value("document.getElementById('filter').select()")
    page.write('{"type": ')
    page.press("Enter")
    page.wait("!document.getElementById('trouble').hidden")
    assert "The filter is not JSON" in page.value("document.querySelector('[role=alert]').innerText")
    assert page.value("document.getElementById('filter').ariaInvalid") == "true"
    assert ids(page) == []
    assert "kind" in page.value("document.getElementById('columns').textContent")


@browser
def test_a_refusal_is_told_in_its_own_words(page, client):
    page.visit(f"{client.base_url}/#q=granite&k=51")
    page.wait("!document.getElementById('trouble').hidden")
    said = page.value("document.getElementById('trouble').innerText")
    message = client.post("/search", json={"queries": "granite", "k": 51}).json()["error"]["message"]
    assert message.removeprefix("k: k") in said
    assert "This cannot be searched for" in said
    assert "{" not in said
    assert page.value("document.getElementById('k').ariaInvalid") == "true"
    page.visit(f"{client.base_url}/#like=nobody")
    page.wait("document.getElementById('trouble').innerText.startsWith('Not found')")
    assert all("Failed to load resource" in error for error in page.errors)
    page.errors.clear()


@browser
def test_a_service_that_is_gone_is_told(config, tmp_path):
    with tab(tmp_path) as page:
        with served(config) as client:
            page.visit(f"{client.base_url}/")
            page.wait("document.querySelector('#about bdi')")
        page.write("granite")
        page.press("Enter")
        page.wait("document.getElementById('trouble').innerText.includes('cannot be reached')")
        assert page.value("document.querySelector('#trouble button').textContent") == "Try again"


@browser
def test_the_token_is_asked_for_and_kept_in_the_tab_alone(config, tmp_path):
    with served(config, token=TOKEN) as client, tab(tmp_path) as page:
        page.visit(f"{client.base_url}/#q=igneous+rock")
        page.wait("document.getElementById('asking').open")
        page.press("Escape")
        page.wait("!document.getElementById('trouble').hidden")
        page.click("#trouble button")
        page.wait("document.getElementById('asking').open")
        page.write("wrong")
        page.press("Enter")
        page.wait("document.getElementById('asking-why').textContent.includes('is wrong')")
        page.wait("document.getElementById('asking').open")
        page.write(TOKEN)
        page.press("Enter")
        page.wait("document.querySelectorAll('.hit').length === 10")
        assert ids(page)[0] == "same/0?a=b&c#d"
        assert page.value("document.getElementById('trouble').hidden")
        assert page.value("[document.cookie, localStorage.length, document.getElementById('token').value]") == ["", 0, ""]
        assert TOKEN not in page.value("location.href")
        page.visit(f"{client.base_url}/?again#report=1")
        page.wait("document.querySelector('iframe').contentDocument?.querySelector('h1')")
        assert all("status of 401" in error for error in page.errors)


@browser
def test_the_report_is_shown_in_a_frame_that_runs_nothing(page, client, config):
    search(page, "granite")
    page.click("#about a")
    page.wait("document.querySelector('iframe').contentDocument?.adoptedStyleSheets.length")
    inside = "document.querySelector('iframe').contentDocument"
    assert page.value(f"{inside}.querySelector('h1').textContent") == f"Artifact {open_live(config).manifest.version}"
    assert page.value("document.querySelector('iframe').sandbox.value") == "allow-same-origin"
    assert page.value(f"getComputedStyle({inside}.querySelector('.card')).borderRadius") == "8px"
    styled = page.value(f"{inside}.querySelectorAll('[data-style]').length")
    assert styled == client.get("/report").text.count(' style="') > 10
    assert page.value(f"[...{inside}.querySelectorAll('[data-style]')].every(each => each.style.length)")
    page.wait(f"document.querySelector('iframe').clientHeight >= {inside}.documentElement.scrollHeight")
    assert page.value("document.getElementById('results').checkVisibility()") is False
    page.press("Escape")
    page.wait("document.getElementById('report').hidden && document.querySelectorAll('.hit').length")


@browser
def test_re_ranking_is_offered_and_asked_for_where_there_is_one(page, config, tmp_path, monkeypatch):
    assert not page.value("document.getElementById('rerank').checkVisibility()")
    told = Engine.info
    monkeypatch.setattr(Engine, "info", lambda self: told(self).model_copy(update={"rerank": True}))
    page.visit("about:blank")
    with served(config) as other:
        page.visit(f"{other.base_url}/")
        page.wait("document.getElementById('rerank').checkVisibility()")
        search(page, "granite")
        with answered(page):
            page.click("#rerank")
        bodies = [body for method, _, body in page.requests if method == "POST"]
        assert '"rerank":true' in bodies[-1]
        assert "rerank" not in bodies[-2]
        page.errors[:] = [error for error in page.errors if "Failed to load resource" not in error]


@browser
@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1400])
def test_it_is_readable(client, tmp_path, width, dark):
    with tab(tmp_path, width=width, dark=dark) as page:
        page.visit(f"{client.base_url}/#q=return+the+sum+of+numbers")
        for name, steps in {"one": (), "opened": ("ArrowDown", "Enter"), "side": ()}.items():
            if name == "side":
                page.visit(f"{client.base_url}/?side#q=%3Cb%3Ezebra+stripes&mode=side")
            page.wait("document.getElementById('results').ariaBusy === 'false'")
            page.press(*steps)
            facts = page.value(FACTS)
            assert facts["width"] <= width
            assert facts["cut"] == []
            assert facts["smallest"] >= 14
            ink, paper = (sum(int(part) for part in colour[4:-1].split(", ")) for colour in facts["colours"])
            assert (ink > paper) == dark
            contrasts = page.value(CONTRASTS)
            assert len(contrasts) > 15
            assert {kind: ratio for kind, ratio in contrasts.items() if ratio < 4.5} == {}
            page.picture(tmp_path / f"{name}-{width}-{dark}.png")
        assert page.errors == []
