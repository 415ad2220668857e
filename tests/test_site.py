"The site: every page opens without an error, on a wide and a narrow screen, and nothing on it is missing or cut off."
import functools
import http.server
import importlib.util
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote, urldefrag

import pytest

ROOT = Path(__file__).parent.parent
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytest.importorskip("material", reason="mkdocs-material is not installed: make docs installs it")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

LOOK = """() => ({
    width: document.documentElement.scrollWidth,
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    ids: [...document.querySelectorAll('[id]')].map(e => e.id),
    blank: [...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src),
    noalt: [...document.images].filter(i => !i.alt).map(i => i.src),
    formulas: document.querySelectorAll('math').length,
    flat: [...document.querySelectorAll('math')].filter(m => m.getBoundingClientRect().height < 5).length,
    text: (article => {
        article.querySelectorAll('pre, code').forEach(e => e.remove());
        return article.textContent;
    })(document.querySelector('article').cloneNode(true)),
    cut: [...document.querySelectorAll('article table')].filter(t => {
        const box = t.closest('.md-typeset__scrollwrap, div') ?? t;
        const scrolls = [t, box, box.firstElementChild].some(
            e => e && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX));
        return t.getBoundingClientRect().right > innerWidth && !scrolls;
    }).length,
})"""


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def site():
    "The address of the site, served from a folder as any static host does."
    subprocess.run([sys.executable, ROOT / "nbs/_site/build.py"], check=True, capture_output=True)
    folder = ROOT / "build/site"
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", folder
    server.shutdown()


@pytest.fixture(scope="module")
def looked(site):
    "What a browser finds on every page, by screen."
    if not CHROMIUM:
        pytest.skip("there is no Chromium here: Debian's package chromium has it")
    address, folder = site
    pages, found = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.html")), {}
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for screen, width in (("wide", 1280), ("narrow", 390)):
            page, errors = browser.new_page(viewport=dict(width=width, height=900)), []
            page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
            page.on("pageerror", lambda error: errors.append(str(error)))
            ours = address, "data:", "blob:"
            page.on("request", lambda asked: None if asked.url.startswith(ours) else errors.append(asked.url))
            for name in pages:
                errors.clear()
                page.goto(f"{address}/{name}")
                found[name, screen] = page.evaluate(LOOK) | dict(errors=[*errors], screen=width)
        page.set_viewport_size(dict(width=1280, height=900))
        page.goto(f"{address}/index.html")
        page.get_by_role("textbox", name="Search").fill("repulsion")
        page.wait_for_selector(".md-search-result__link", timeout=10_000)
        found["search"] = page.locator(".md-search-result__link").count()
        browser.close()
    return found


def of_pages(looked):
    return {key: value for key, value in looked.items() if key != "search"}


def test_every_notebook_and_module_has_a_page(site):
    _, folder = site
    for path in (ROOT / "nbs").glob("*.ipynb"):
        assert (folder / f"{path.stem}.html").exists(), path
    modules = {path.stem for path in (ROOT / "advdpnp").glob("*.py")} - {"__init__", "__main__", "_modidx"}
    assert {path.stem for path in (folder / "api").glob("*.html")} == modules
    text = (folder / "api" / "attacks.html").read_text()
    assert "radius of the ball, on the scale of images in [0, 1]" in text and "ThreatModel.project" in text


def test_no_page_has_an_error_or_asks_for_anything_from_elsewhere(looked):
    assert len(looked) > 80
    assert {key: page["errors"] for key, page in of_pages(looked).items() if page["errors"]} == {}


def test_pictures_and_formulas_are_drawn(looked):
    for key, page in of_pages(looked).items():
        assert not page["blank"] and not page["noalt"] and not page["flat"], key
        assert "$$" not in page["text"] and "\\(" not in page["text"] and "\\frac" not in page["text"], key
    assert looked["20_losses.html", "wide"]["formulas"] > 10


def test_nothing_is_cut_off(looked):
    for key, page in of_pages(looked).items():
        assert page["width"] <= page["screen"] and not page["cut"], key


def test_no_internal_link_is_dead(looked, site):
    address, folder = site
    ids = {name: {*page["ids"]} for (name, screen), page in of_pages(looked).items() if screen == "wide"}
    for (name, screen), page in of_pages(looked).items():
        for link in page["links"] if screen == "wide" else ():
            if not link.startswith(address):
                assert link.startswith("https://"), (name, link)
                continue
            target, anchor = urldefrag(link[len(address) + 1:] or "index.html")
            target = unquote(target) or "index.html"
            assert (folder / target).is_file(), (name, link)
            assert not anchor or target not in ids or unquote(anchor) in ids[target], (name, link)


def test_search_finds(looked):
    assert looked["search"] >= 3


@pytest.mark.parametrize("address, opens", [
    ("https://github.com/some-one/advdpnp", True), ("https://github.com/some-one/advdpnp.git", True),
    ("", False), ("https://gitlab.com/some-one/advdpnp", False),  # Colab reads GitHub alone
])
def test_pages_open_in_colab_where_the_repository_has_an_address(tmp_path, monkeypatch, address, opens):
    spec = importlib.util.spec_from_file_location("build", ROOT / "nbs/_site/build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "PAGES", tmp_path)
    settings = re.sub(r"(?m)^git_url =.*$", f"git_url = {address}", (ROOT / "settings.ini").read_text())
    (tmp_path / "settings.ini").write_text(settings)
    for path in (ROOT / "nbs/00_method.ipynb", ROOT / "nbs/table2.ipynb"):
        build.write_page(path)
        title, rest = (tmp_path / f"{path.stem}.md").read_text().strip().split("\n", 1)
        there = f"https://colab.research.google.com/github/some-one/advdpnp/blob/main/nbs/{path.name}"
        assert title.startswith("# ") and rest.strip().startswith(f"[Open in Colab]({there})") == opens
        lines = "!git clone --depth 1 --branch main https://github.com/some-one/advdpnp /content/advdpnp"
        assert (lines in rest) == ("colab" in rest.lower()) == opens
