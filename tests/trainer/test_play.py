"""The page that shows the experts of each token: its HTML, its colours, and a visit by a real browser."""

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.tokenizer import Tokenizer
from model.config import ModelConfig
from model.transformer import Transformer
from tests.support import run_cases as cases
from tests.support.browser import Browser
from trainer import play
from trainer.cli import guarded
from trainer.generate import Sampling
from trainer.play import RoutingRecorder, Story, colour, spans, story_html, stylesheet, write_story

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# These tests start another process, because gradio warns, and pytest makes errors of warnings.
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="the extra `play` is not installed")
NAME = "<img src=x onerror=hit()>"
HOSTILE = '<script>hit()</script><img src=x onerror="hit()"> &amp; "\' ${hit()} {{hit}} <b>é🙂</b>\n\tTom'


@pytest.fixture(autouse=True)
def enable_gradients():
    """Stories that are generated in turn may leave `no_grad` on, because the `no_grad` blocks of two can overlap."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture(scope="module")
def tokenizer(corpus_dir):
    return Tokenizer(corpus_dir / "tokenizer.model")


@pytest.fixture(scope="module")
def run(corpus_dir, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    more = ["model.n_experts=31", "model.top_k=2", "model.max_seq_len=4000", "model.n_layers=4", "model.moe_every=2"]
    cases.run(corpus_dir, runs, f"run.name={NAME}", "train.steps=3", *more)
    return runs / NAME


def model_of(tokenizer, **keys):
    keys = {"n_layers": 4, "n_experts": 31, "top_k": 2, "moe_every": 2} | keys
    model = Transformer(ModelConfig(dim=16, n_heads=2, expert_dim=16, ffn_dim=16, **keys), tokenizer.vocab_size)
    model.init_weights(5)
    return model.requires_grad_(False).eval()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_spans_hold_the_whole_text_in_whole_characters(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    parts = list(spans(tokenizer, ids))
    assert "".join(part.text for part in parts) == tokenizer.decode(ids)
    assert all(part.start < part.stop <= len(ids) for part in parts)
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts[:-1]))
    text = data.draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=20))
    assert all("\ufffd" not in part.text or "\ufffd" in text for part in spans(tokenizer, tokenizer.encode(text)))


def test_tokens_that_share_a_character_share_a_span(tokenizer):
    ids = tokenizer.encode("a🙂b")
    assert len(ids) == 6
    assert [tuple(part) for part in spans(tokenizer, ids)] == [("a", 0, 1), ("🙂", 1, 5), ("b", 5, 6)]
    assert [part.text for part in spans(tokenizer, ids[:4], is_complete=False)] == ["a"]
    assert "".join(part.text for part in spans(tokenizer, ids[:4])) == "a\ufffd\ufffd\ufffd"


@pytest.mark.parametrize("dark", [False, True])
def test_31_colours_are_distinct_and_text_is_legible_on_them(dark):
    def lab(expert):
        lightness, chroma, hue = colour(expert, 31, dark)
        return lightness, chroma * math.cos(math.radians(hue)), chroma * math.sin(math.radians(hue))

    def luminance(expert):  # of the colour in sRGB, from Ottosson's OKLab matrices
        lightness, a, b = lab(expert)
        cones = [0.3963377774 * a + 0.2158037573 * b, -0.1055613458 * a - 0.0638541728 * b]
        cones = [(lightness + x) ** 3 for x in [*cones, -0.0894841775 * a - 1.2914855480 * b]]
        rows = [(4.0767416621, -3.3077115913, 0.2309699292), (-1.2684380046, 2.6097574011, -0.3413193965)]
        rows.append((-0.0041960863, -0.7034186147, 1.7076147010))
        rgb = [min(1, max(0, sum(x * y for x, y in zip(row, cones, strict=True)))) for row in rows]
        return 0.2126 * rgb[0] + 0.7152 * rgb[1] + 0.0722 * rgb[2]

    # the smallest difference that an eye can see is about 0.02
    assert min(math.dist(lab(a), lab(b)) for a, b in itertools.combinations(range(31), 2)) > 0.025
    assert min(math.dist(lab(a), lab(a + 1)) for a in range(30)) > 0.08
    text = 0.9 if dark else 0.02  # luminance of the page's letters, about
    for expert in range(31):
        low, high = sorted([text, luminance(expert)])
        assert (high + 0.05) / (low + 0.05) > 4.5, expert


def test_a_story_has_the_experts_of_one_forward(tokenizer):
    """Two stories are generated in turn. Only layers 1 and 3 have experts."""
    model = model_of(tokenizer)
    recorder = RoutingRecorder(model)
    assert recorder.layers == [1, 3]
    stories = [(Story(1), "Tom ran", Sampling(20, seed=1)), (Story(3), "a🙂", Sampling(30, seed=2))]
    writers = [write_story(story, model, tokenizer, recorder, prompt, sampling) for story, prompt, sampling in stories]
    for _ in itertools.zip_longest(*writers):
        pass
    for story, prompt, _ in stories:
        assert story.ids[: story.n_prompt] == tokenizer.encode(prompt) and len(story.ids) > story.n_prompt
        tokens = [tokenizer.bos, *story.ids]
        _, expected = recorder.next_token(model(torch.tensor([tokens])).logits for _ in range(1))
        for layer in (1, 3):
            # at a limit, the last token was not an input of the model
            assert len(story.experts[layer]) >= len(tokens) - 1
            assert story.experts[layer] == expected[layer][: len(story.experts[layer])]


def test_html_is_escaped_and_names_the_experts_of_the_layer(tokenizer):
    model = model_of(tokenizer)
    story = Story(1)
    for _ in write_story(story, model, tokenizer, RoutingRecorder(model), HOSTILE, Sampling(5)):
        html = story_html(story, tokenizer, 31)
        assert "<script" not in html and "<img" not in html and "<b>" not in html
    other = Story(3, story.ids, story.experts, story.n_prompt, story.status)
    for shown in (story, other):
        html = story_html(shown, tokenizer, 31)
        best, second = shown.experts[shown.shown_layer][1]
        assert (
            f'<div id="story"><span class="prompt e{best} f{second}" title="&quot;&lt;&quot;\n'
            f'layer {shown.shown_layer}: experts {best}, {second}">&lt;</span>'
        ) in html
        assert html.count("idle") < 31 == html.count('tokens">')
    assert "layer 3: not processed by an expert yet" in html
    css = stylesheet(31)
    assert all(f".e{expert} {{" in css and f".dark .f{expert} {{" in css for expert in range(31))


def test_the_story_of_a_dense_model_has_no_colours(tokenizer):
    model = model_of(tokenizer, moe_every=5)
    recorder, story = RoutingRecorder(model), Story()
    list(write_story(story, model, tokenizer, recorder, "Tom", Sampling(5)))
    html = story_html(story, tokenizer, 31)
    assert recorder.layers == [] and '<span class="prompt" title="&quot;T' in html and "expert" not in html


def test_a_story_can_be_stopped(tokenizer):
    model, story = model_of(tokenizer), Story(1)
    for _ in write_story(story, model, tokenizer, RoutingRecorder(model), "Tom", Sampling(100)):
        story.stop_requested = True
    assert len(story.ids) == story.n_prompt + 1 and story.status == "1 token" and not story.is_running
    writer = write_story(story, model, tokenizer, RoutingRecorder(model), "Tom", Sampling(100))
    next(writer)
    writer.close()  # as if the visitor closed the page
    assert not story.is_running and not story.stop_requested


def test_each_mistake_is_reported_in_one_line(tmp_path, monkeypatch, capfd):
    def error(*words):
        assert guarded(lambda: play.main(["--checkpoint", str(tmp_path), *words])) == 2
        return capfd.readouterr().err

    monkeypatch.setattr(os, "environ", dict(os.environ))  # the command sets some
    with play.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setitem(sys.modules, "gradio", None)
        assert error() == "the page needs gradio, which is not installed: pip install -e '.[play]'\n"
        monkeypatch.setitem(sys.modules, "gradio", sys)
        assert error("--port", str(port)).startswith(
            f"--port {port}: address already in use at 127.0.0.1; give another"
        )
        assert error("--port", "70000") == "--port 70000: should be from 1 to 65535, or 0 for any free port\n"
        assert error("--host", "192.0.2.1").startswith("--host 192.0.2.1: cannot listen at this address (")
        line = error("--port", "0")
        assert str(tmp_path) in line and line.count("\n") == 1
        monkeypatch.setattr(play, "PORTS", range(port, port + 1))
        assert error() == f"none of the ports {port} to {port} is free at 127.0.0.1; give another one by --port\n"
        monkeypatch.setattr(play, "PORTS", range(port, port + 9))
        with play.listen("127.0.0.1", None) as free:
            assert free.getsockname()[1] in range(port + 1, port + 9)


DENSE = """
from model.config import ModelConfig
from model.transformer import Transformer
from trainer.play import build_page
model = Transformer(ModelConfig(dim=16, n_layers=2, n_heads=2, moe_every=5), 320)
print([c["props"]["visible"] for c in build_page(model, None, "<x>").config["components"] if c["type"] == "radio"])
"""


@pytest.mark.slow
@needs_gradio
def test_the_page_of_a_dense_model_offers_no_layers():
    done = subprocess.run([sys.executable, "-c", DENSE], capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "[False]\n"), done.stderr


# a sitecustomize.py that logs each address that the process connects to or looks up
LOG_CONNECTIONS = """import os, sys
log = os.open(os.environ["CONNECTIONS"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.write(log, b"started\\n")
def hook(event, args):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname"):
        os.write(log, repr((event, args[1] if event == "socket.connect" else args)).encode() + b"\\n")
sys.addaudithook(hook)
"""


@pytest.fixture
def server(run, tmp_path):
    """The command; its stderr goes to the file `stderr`, and the addresses it connects to go to `connections`."""
    (tmp_path / "sitecustomize.py").write_text(LOG_CONNECTIONS)
    paths = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    environment["CONNECTIONS"] = str(tmp_path / "connections")
    words = [sys.executable, "-m", "trainer.play", "--checkpoint", str(run), "--port", "0"]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    yield process
    process.kill()
    process.communicate()


SPANS = """[...document.querySelectorAll('#story span')].map(e =>
    ({text: e.textContent, title: e.title, kind: e.className, colour: getComputedStyle(e).backgroundColor,
    line: getComputedStyle(e).borderBottomColor}))"""
NOTE = "document.querySelector('#note').textContent"
TEXT = "document.querySelector('#story').textContent"


@pytest.mark.slow
@needs_gradio
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_the_page_in_a_browser(server, tmp_path):
    url = server.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:"), (tmp_path / "stderr").read_text()
    browser = Browser(CHROMIUM, tmp_path / "profile")
    try:
        browser.set_size(1000, 800)
        browser.call("Page.addScriptToEvaluateOnNewDocument", source="window.hit = () => { window.wasHit = true }")
        browser.navigate(url)
        write_hostile_story(browser)
        browser.screenshot(tmp_path / "play.png")
        assert (tmp_path / "play.png").read_bytes().startswith(b"\x89PNG")
        show_another_layer(browser)
        stop_and_leave(browser, url, tmp_path / "stderr")
        for event in browser.events:
            assert event["method"] != "Runtime.exceptionThrown", event
            if event["method"] in ("Network.requestWillBeSent", "Network.webSocketCreated"):
                requested = event["params"].get("request", event["params"])["url"]
                assert requested.startswith(("data:", f"{url}/")), requested
    finally:
        browser.close()
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0 and server.stdout.read() == ""
    stderr = (tmp_path / "stderr").read_text()
    assert stderr.endswith("the page is closed\n") and "Traceback" not in stderr, stderr
    connections = (tmp_path / "connections").read_text().splitlines()
    assert connections[0] == "started"
    assert all("127.0.0.1" in line or line == "started" for line in connections), connections


def write_hostile_story(browser):
    browser.wait("!!document.querySelector('#write') && !!document.querySelector('#prompt textarea')")
    assert browser.run("document.querySelector('#head b').textContent") == browser.run("document.title") == NAME
    browser.type("#prompt textarea", HOSTILE)
    browser.type("input[aria-label='number input for Temperature']", "0")
    browser.type("input[aria-label='number input for New tokens']", "40")
    browser.click("#write")
    browser.wait(f"/^\\d+ token/.test({NOTE})")
    assert browser.run(TEXT).startswith(HOSTILE) and len(browser.run(TEXT)) > len(HOSTILE)
    assert not browser.run("window.wasHit || document.querySelector('#story :not(span)')")
    parts = browser.run(SPANS)
    assert "".join(part["text"] for part in parts) == browser.run(TEXT)
    assert len({part["colour"] for part in parts}) > 3
    for part in parts[:-1]:
        first, *lines = part["title"].split("\n")
        assert json.loads(first) == part["text"]
        assert lines[0].startswith("layer 1: experts ")
        assert f"e{lines[0].split()[3].strip(',')}" in part["kind"].split()
    assert len(next(part["title"] for part in parts if part["text"] == "🙂").split("\n")) == 5
    chips = browser.run(SPANS.replace("#story", "#legend"))
    assert [chip["text"] for chip in chips] == [str(expert) for expert in range(31)]
    assert len({chip["colour"] for chip in chips}) == 31
    colours = {f"e{chip['text']}": chip["colour"] for chip in chips}
    for part in parts[:20]:
        _, best, second = part["kind"].split()
        assert (part["colour"], part["line"]) == (colours[best], colours[second.replace("f", "e")])


def show_another_layer(browser):
    """Layers 1 and 3 have experts. The story keeps its text and changes its colours, also while it is written."""
    before = browser.run(SPANS)
    assert browser.run("[...document.querySelectorAll('input[type=radio]')].map(e => e.value)") == ["1", "3"]
    browser.click("input[type=radio][value='3']")
    browser.wait("document.querySelector('#story span').title.includes('layer 3')")
    after = browser.run(SPANS)
    assert [part["text"] for part in after] == [part["text"] for part in before]
    assert [part["colour"] for part in after] != [part["colour"] for part in before]
    browser.type("input[aria-label='number input for New tokens']", "2000")
    browser.click("#write")
    browser.wait("!!document.querySelector('#story.running')")
    browser.click("input[type=radio][value='1']")
    browser.wait("document.querySelector('#story span').title.includes('layer 1')")
    assert browser.run("!!document.querySelector('#story.running')")


def stop_and_leave(browser, url, stderr):
    """A story ends when it is stopped, and when the visitor closes the tab. A prompt that is too long is reported."""
    browser.click("#stop")
    browser.wait(f"/^\\d+ token/.test({NOTE})")
    count = int(browser.run(NOTE).split()[0])
    assert 0 < count < 2000 and stderr.read_text().endswith(f"generated {count} tokens\n")
    browser.click("#write")
    browser.wait("!!document.querySelector('#story.running')")
    n_lines = len(stderr.read_text().splitlines())
    browser.close_tab()
    browser.open()
    end = time.monotonic() + 60
    while len(lines := stderr.read_text().splitlines()) == n_lines:
        assert time.monotonic() < end
        time.sleep(0.1)
    assert int(lines[-1].split()[1]) < 2000
    browser.navigate(url)
    browser.wait("!!document.querySelector('#write') && !!document.querySelector('#prompt textarea')")
    assert browser.run(TEXT) == ""  # a reload is a new visitor
    browser.type("#prompt textarea", "1" * 5000)
    browser.click("#write")
    assert browser.wait(f"/^prompt: /.test({NOTE}) && {NOTE}").endswith(
        "but the model accepts at most 4000; give a shorter one"
    )
