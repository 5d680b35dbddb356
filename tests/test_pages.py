"""Pages in a browser: those that adamjax writes and the documentation site, light and dark, on a phone and a desktop.

Those of the site are tested where it has been built: `sphinx-build .docs build/docs`.
"""

import functools
import http.server
import itertools
import shutil
import threading
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import adamjax
from adamjax.diagnostics import History, measure
from adamjax.tuning import LrRange, Report
from adamjax.tuning._journal import TrialRecord

pytestmark = pytest.mark.numbers

SITE = Path(__file__).parent.parent / "build" / "docs"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
SCREENS = {"phone": (390, 844), "desktop": (1280, 800)}
PAPER = 718  # pixels of the width of a page of A4 between its margins
CONTROLS = "a[href], button, input, summary, [tabindex='0']"
NAME = "<script>alert('&amp;')</script> \"" + "/a_path_without_a_space" * 8
# Rules that the theme of the site breaks, and one about the empty corners of tables, which Markdown cannot avoid.
OF_THE_THEME = ("aria-required-attr", "landmark-unique", "scrollable-region-focusable", "empty-table-header")

LAYOUT = """() => {
  const wrong = []
  if (document.scrollingElement.scrollWidth > innerWidth) wrong.push("the page is wider than the screen")
  for (const x of document.images) if (!x.naturalWidth || !x.alt) wrong.push("an image is missing: " + x.alt)
  const brightness = Math.max(...getComputedStyle(document.body).backgroundColor.match(/[0-9]+/g))
  const [least, most] = matchMedia("(prefers-color-scheme: dark)").matches ? [0, 50] : [240, 255]
  if (brightness < least || brightness > most) wrong.push("the brightness of the page is " + brightness)
  return wrong
}"""
HIDDEN = """() => {
  const hidden = [], range = document.createRange()
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT, x => x.data.trim() ? 1 : 2)
  while (texts.nextNode()) {
    range.selectNode(texts.currentNode)
    const {width, right} = range.getBoundingClientRect(), isShown = texts.currentNode.parentElement.checkVisibility()
    if (!isShown || !width || right > innerWidth) hidden.push(texts.currentNode.data)
  }
  return hidden
}"""


@pytest.fixture(scope="module")
def browser():
    install = "pip install playwright axe-playwright-python"
    playwright = pytest.importorskip("playwright.sync_api", reason=install)
    pytest.importorskip("axe_playwright_python", reason=install)
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser is on the PATH: {', '.join(BROWSERS)}")
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=path)
        yield found
        found.close()


@pytest.fixture
def open_page(browser):
    """A function that opens a page, and returns it with the list to which go its complaints and foreign requests."""
    pages = []

    def opened(url, screen, scheme="light", home=None):
        width, height = SCREENS[screen]
        page, wrong = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme), []
        page.on("console", lambda message: wrong.append(message.text))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: request.url.startswith((home or url, "data:")) or wrong.append(request.url))
        page.goto(url)
        pages.append(page)
        return page, wrong

    yield opened
    for page in pages:
        page.close()


@pytest.fixture
def faults(open_page):
    """A function that returns what is wrong with a page on any screen; axe-core knows colours, headings and names."""
    from axe_playwright_python.sync_playwright import Axe

    def found(url, home=None, ignored=()):
        options = {"preload": False, "rules": {rule: {"enabled": False} for rule in ignored}}
        faults = []
        for screen, scheme in itertools.product(SCREENS, ("light", "dark")):
            page, wrong = open_page(url, screen, scheme, home)
            wrong += page.evaluate(LAYOUT)
            broken = Axe().run(page, options=options).response["violations"]
            wrong += [f"{rule['help']}: {node['html']}" for rule in broken for node in rule["nodes"]]
            faults += [f"{screen}, {scheme}: {x}" for x in wrong]
            page.close()
        return faults

    return found


def unreached(page):
    """The controls that the Tab key does not reach."""
    page.evaluate("reached = new Set(); document.addEventListener('focusin', event => reached.add(event.target))")
    for _ in range(2 * page.locator(CONTROLS).count() + 10):
        page.keyboard.press("Tab")
    left = "all => all.filter(x => x.checkVisibility({visibilityProperty: true}) && !reached.has(x))"
    return page.locator(CONTROLS).evaluate_all(f"all => ({left})(all).map(x => x.outerHTML)")


def write_diagnosis(path):
    params = {NAME: jnp.ones((2, 3)), "bias": jnp.zeros(3)}
    opt, history = adamjax.adam(1e-9), History()
    state = opt.init(params)
    for _ in range(2):
        updates, state = opt.update(params, state, params)
        history.append(measure(params, updates, state, params, opt=opt))
    history.save(path, title=f"Diagnosis of {NAME}")
    return path / "diagnostics.html"


def write_report(path):
    """A report with all its pictures, wide tables, and names that nobody should take."""
    rng = np.random.default_rng(0)
    arguments = ["learning_rate", "b1", "b2", "eps", "weight_decay", *(f"argument_{i}" for i in range(8))]
    settings = [dict(zip(arguments, rng.uniform(0.1, 0.9, len(arguments)).tolist(), strict=True)) for _ in range(9)]

    def record(number, stage, seed):
        metrics = {NAME: rng.uniform(0.1, 1, 2).tolist()}
        setting = settings[number] | {"mask": NAME}
        return TrialRecord(number, stage, setting, seed, "complete", [50, 100], [], metrics, 0)

    trials = [record(n, "list" if n else "defaults", 0) for n in range(9)]
    trials += [record(n, "confirm", seed) for n in range(3) for seed in (1, 2)]
    question = {"problem": NAME, "optimizer": "mine.make", "metric": NAME, "mode": "min", "steps": 100, "trials": 9}
    curve = LrRange(np.geomspace(1e-6, 1, 30), np.geomspace(9, 1, 30))
    report = Report(question | {"confirm": [3, 2]}, trials, trials[0].setting, None, curve, {}, "one by one")
    report.save(path)
    return path / "report.html"


@pytest.mark.parametrize("write", [write_diagnosis, write_report])
def test_page(write, tmp_path, faults, open_page):
    url = write(tmp_path).as_uri()
    assert faults(url) == []
    page, wrong = open_page(url, "phone")
    assert page.locator("script").count() == 0
    assert NAME in page.locator("h1").inner_text()
    assert page.locator("td", has_text=NAME).count() > 0
    assert unreached(page) == []

    page.emulate_media(media="print")
    page.set_viewport_size({"width": PAPER, "height": 1000})
    assert page.evaluate(HIDDEN) == []
    assert page.locator("img").evaluate_all("all => all.every(x => x.checkVisibility() && x.width <= innerWidth)")

    page.emulate_media(media="screen")
    for folded in page.locator("details").all():
        assert not folded.locator("td").first.is_visible()
        folded.locator("summary").press("Enter")
        assert folded.locator("td").first.is_visible()
    assert wrong == []


@pytest.fixture(scope="module")
def site():
    """The address of the site on this machine."""
    if not (SITE / "index.html").exists():
        pytest.skip("the site is not built: sphinx-build .docs build/docs")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("path", ["index", "guides/comparison", "recipes/runs", "api/kernels", "gallery"])
def test_site(path, site, faults):
    assert faults(f"{site}{path}.html", site, OF_THE_THEME) == []


@pytest.mark.slow
def test_site_from_its_start_page(site, open_page):
    """Each card leads to its ten lines by one click, the search finds words, and the keyboard reaches everything."""
    from playwright.sync_api import expect

    page, wrong = open_page(f"{site}index.html", "phone", home=site)
    cards = page.locator("#i-have .sd-card")
    assert cards.count() == 8
    for i in range(cards.count()):
        cards.nth(i).click()
        expect(page.locator(":target h2")).to_be_in_viewport()
        lines = page.locator(":target pre").first.inner_text().splitlines()
        assert 1 <= len(list(filter(None, lines))) <= 10
        page.go_back()
    page, said = open_page(f"{site}index.html", "desktop", home=site)
    assert unreached(page) == []
    for word, path in {"amsgrad": "api/optimizers.html", "kahan": "guides/low_precision.html"}.items():
        page.get_by_placeholder("Search").fill(word)
        page.keyboard.press("Enter")
        page.locator(f"#search-results a[href^='{path}']").first.click()
        assert word in page.locator("article").inner_text().lower()
    assert wrong + said == []
