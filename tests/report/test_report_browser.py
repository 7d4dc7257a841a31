"""The pages as a browser sees them: wide and narrow, light and dark, without a mouse, and printed."""

import itertools
import re
import zipfile
from pathlib import Path

import compare_run
import fake_run
import pytest
import test_report_flatten_page as flattened
import test_report_merge_page as merged

import chromium
from galenic.report import report
from galenic.report.config import ReportConfig
from galenic.report.flatten_page import write_flatten_page
from galenic.report.inputs import read_run
from galenic.report.merge_page import write_merge_page

WHEELS = sorted((Path(__file__).parents[2] / "data/browser").glob("axe_playwright_python-*.whl"))
WIDTHS = (1280, 390)
ALL = ("single", "comparison", "merge", "flattening")
REPORTS = pytest.mark.parametrize("page", ALL[:2], indirect=True)

pytestmark = [
    pytest.mark.skipif(chromium.CHROMIUM is None, reason="there is no Chromium"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A page of one run, one of two runs side by side, with words that would do harm, and those beside models."""
    root = tmp_path_factory.mktemp("pages")
    runs = [str(compare_run.build(root / name, seed)) for seed, name in enumerate(("one", "two"))]
    results = Path(runs[0]) / "70-evaluate/results.json"
    text = results.read_text()
    score = '{"value": 0.5, "low": 0.4, "high": 0.6, "n": 99, "metric": "accuracy", "unanswered": 2}'
    probe = '{"needle": {"depth 50": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 40}}, "calibration": {"ece": 0.1}}'
    results.write_text(
        text.replace(
            '"flattened": {', f'"flattened": {{"benchmarks": {{"CMExam": {score}}}, "probes": {probe}, ', 1
        )
    )
    single = ReportConfig(runs=[runs[0]], title=f"One run {fake_run.CHINESE}")
    made = {
        "single": report.render(single, read_run(single)),
        "comparison": report.render_comparison(ReportConfig(runs=runs, compare=True)),
    }
    for name, html in made.items():
        (root / f"{name}.html").write_text(html, encoding="utf-8")
    names = [f"expert-{i}" for i in range(3)]
    recipe = "".join(f"{name}: {'long ' * 60}\n" for name in names)
    write_merge_page(root / "merge.html", merged.summary_of(names, scope="layer"), recipe, merged.INPUTS)
    write_flatten_page(root / "flattening.html", flattened.summary_of(), recipe)
    return {name: root / f"{name}.html" for name in ALL}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium.Chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(params=ALL)
def page(request, browser, pages):
    browser.size(1280, 900)
    browser.scheme("light")
    browser.open(pages[request.param])
    return browser


def test_asks_for_nothing_but_itself_and_complains_of_nothing(page, pages):
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.complaints == []
    asked = [address for address in page.requests if not address.startswith("data:")]
    assert len(asked) == 1 and asked[0].startswith("file://")
    assert Path(asked[0]).name in {file.name for file in pages.values()}
    assert page.run("document.documentElement.outerHTML.length") < 3_000_000


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_hangs_over_the_edge(page, width):
    page.size(width, 800)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.run("document.documentElement.scrollWidth") <= width
    over = page.run(
        """(width => [...document.querySelectorAll('main *, header *')].filter(e => {
            if (e.closest('.scroll, pre, svg, .hidden, .skip')) return false;
            const box = e.getBoundingClientRect();
            return box.width && (box.right > width + 0.5 || box.left < -0.5);
        }).map(e => e.tagName + '.' + e.className + ': ' + e.textContent.slice(0, 60)))"""
        f"({width})"
    )
    assert over == []


@pytest.mark.skipif(not WHEELS, reason="`make test` fetches axe-core")
@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (390, "dark")])
def test_axe_finds_nothing_serious(page, width, scheme):
    page.size(width, 900)
    page.scheme(scheme)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    with zipfile.ZipFile(WHEELS[-1]) as wheel:
        page.run(wheel.read("axe_playwright_python/axe.min.js").decode())
    found = page.run(
        """axe.run(document, {resultTypes: ['violations']}).then(r => ({
            passes: r.passes.length,
            serious: r.violations.filter(v => ['serious', 'critical'].includes(v.impact)).map(v =>
                v.id + ' x' + v.nodes.length + ': ' + v.nodes[0].html.slice(0, 200) + v.nodes[0].failureSummary)}))"""
    )
    assert found["serious"] == []
    assert found["passes"] > 15  # it did look


def test_is_used_without_a_mouse(page):
    page.press("Tab")
    assert page.run("document.activeElement.className") == "skip"
    assert page.run("document.activeElement.getBoundingClientRect().top") >= 0
    assert page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Enter")
    assert page.run("location.hash") == "#main" or page.run("document.activeElement.id") == "main"
    page.press("Tab")
    assert page.run("document.activeElement.closest('main') !== null")
    levels = page.run("[...document.querySelectorAll('h1,h2,h3,h4')].map(e => +e.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


@REPORTS
def test_says_what_each_chart_shows_and_gives_its_numbers(page):
    charts = page.run(
        """[...document.querySelectorAll('svg.chart')].map(svg => ({
            role: svg.getAttribute('role'), name: svg.getAttribute('aria-label'),
            rows: svg.closest('figure').querySelectorAll('details.data tbody tr').length,
            link: svg.closest('figure').querySelector('a[download]').getAttribute('download')}))"""
    )
    assert len(charts) > 8
    assert all(chart["role"] == "img" and len(chart["name"]) > 20 and chart["rows"] > 0 for chart in charts)
    assert all(re.fullmatch(r"[a-z0-9-]+\.csv", chart["link"]) for chart in charts)


@REPORTS
def test_a_download_is_a_file(page, tmp_path):
    page.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    page.run(
        "document.querySelectorAll('details').forEach(d => d.open = true);"
        "document.querySelector('svg.chart').closest('figure').querySelector('a[download]').click()"
    )
    page.run("new Promise(done => setTimeout(done, 1500))")
    (file,) = tmp_path.glob("*.csv")
    assert len(file.read_text(encoding="utf-8").splitlines()) > 3


@REPORTS
def test_colours_follow_the_reader(page):
    light = page.run("getComputedStyle(document.body).backgroundColor")
    page.scheme("dark")
    dark = page.run("getComputedStyle(document.body).backgroundColor")
    brightness = [sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in (light, dark)]
    assert brightness[0] > 600 and brightness[1] < 150


@REPORTS
def test_prints(page):
    page.scheme("dark")  # paper is white all the same
    pdf = page.pdf()
    assert pdf.startswith(b"%PDF-") and len(pdf) > 50_000
    assert len(re.findall(rb"/Type\s*/Page[^s]", pdf)) >= 4
    page.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    shades = page.run("['backgroundColor', 'color'].map(p => getComputedStyle(document.body)[p])")
    page.call("Emulation.setEmulatedMedia", media="")
    back, ink = (sum(map(int, re.findall(r"\d+", shade)[:3])) for shade in shades)
    assert back == 765 and ink < 200
