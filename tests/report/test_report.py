import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import fake_run
import numpy as np
import pytest
from markupsafe import Markup

from galenic.report import report
from galenic.report.charts import smooth, thin
from galenic.report.config import ReportConfig
from galenic.report.inputs import read_run
from galenic.report.page import HERE
from galenic.report.sections import spell
from galenic.report.weights import verdict
from galenic.runtime import UserError

VOID = {"meta", "br", "img", "link", "hr", "input", "path", "use", "rect"}
SECTIONS = (
    "Corpus",
    "Training",
    "Experts",
    "Merging",
    "Alignment",
    "Flattening",
    "Evaluation",
    "Questions",
    "Recipe",
    "Steps",
)


class Page(HTMLParser):
    """Checks that tags close in order; collects text, ids and references."""

    def __init__(self, text):
        super().__init__()
        self.open, self.ids, self.references, self.words, self.tags = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        values = dict(attributes)
        if "id" in values:
            self.ids.append(values["id"])
        for key in ("src", "href", "xlink:href", "action", "poster", "data", "srcset"):
            if key in values:
                self.references.append(values[key])
        self.references += re.findall(r"url\(([^)]*)\)", values.get("style") or "")
        self.references += re.findall(r"url\(([^)]*)\)", values.get("clip-path") or "")
        if tag not in {"meta", "br", "img", "link", "hr", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if tag not in {"meta", "br", "img", "link", "hr", "input"}:
            assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    config = fake_run.build(root)
    report.run(config)
    return root, config, (root / "80-report/report.html").read_text(encoding="utf-8")


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without drawings, where the drawings are not what is tested."""
    monkeypatch.setattr("galenic.report.charts.draw_figure", lambda key, label, *_: Markup("<svg></svg>"))


@pytest.fixture(scope="module")
def page(built):
    return Page(built[2])


def test_is_one_file_that_loads_nothing(built, page):
    text = built[2]
    assert len(text.encode()) < 3_000_000
    assert "script" not in page.tags
    inside = ("#", "data:text/csv;charset=utf-8,")  # places on the page, and the numbers of its charts
    assert all(reference.startswith(inside) for reference in page.references)
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style


def test_ids_are_unique_and_every_reference_resolves(page):
    assert len(page.ids) == len(set(page.ids))
    places = {reference[1:] for reference in page.references if reference.startswith("#")}
    assert places and places <= set(page.ids)
    assert page.tags.count("svg") == 21


def test_charts_say_what_they_show(built):
    labels = re.findall(r'<svg class="chart"[^>]* role="img" aria-label="([^"]+)"', built[2])
    assert len(labels) == built[2].count("<svg")
    assert any("chance 25%" in label and "flattened 38.8%" in label for label in labels)


def test_numbers_are_those_of_the_steps(built, page):
    root, _, _ = built
    results = json.loads((root / "70-evaluate/results.json").read_text())
    for name, model in results["models"].items():
        for score in model["accuracy"].values():
            row = f"{100 * score['value']:.1f}%"
            assert row in page.text
            assert f"{100 * score['low']:.1f}\u2013{100 * score['high']:.1f}" in page.text
        bits = [f"{model['bits_per_byte'][source]['value']:.3f}" for source in fake_run.SOURCES]
        assert f"{model['normalised_average']:.3f}" in page.text
        row = re.search(rf"{name} ((?:\d\.\d{{3}} ){{15}})", page.text)
        assert row is not None
        assert sorted(row[1].split()) == sorted(bits)
    for number in (
        "75,924",
        "18,770,000",
        "0.4321",
        "21.2345",
        "1523.4",
        "1377.8",
        "3.2312",
        "4.125",
        "1.876",
    ):
        assert number in page.text, number
    metrics = [json.loads(line) for line in (root / "30-pretrain/metrics.jsonl").read_text().splitlines()]
    for row in (row for row in metrics if row["kind"] == "heldout" and row["step"] in (420, 620, 730)):
        assert all(f"{value:.3f}" in page.text for value in row["bits_per_byte"].values())


def test_training_tells_speed_memory_and_what_was_skipped(built):
    root, _, text = built
    metrics = [json.loads(line) for line in (root / "30-pretrain/metrics.jsonl").read_text().splitlines()]
    for phase in fake_run.PHASES:
        rows = [row for row in metrics if row["kind"] == "train" and row["phase"] == phase]
        middle = {key: sorted(r[key] for r in rows)[len(rows) // 2] for key in ("tokens_per_second", "mfu")}
        cells = re.search(rf'Speed and memory.*?<th scope="row">{phase}</th>(.*?)</tr>', text, re.DOTALL)[1]
        assert re.findall(r"<td>(.*?)</td>", cells) == [
            f"{middle['tokens_per_second']:,.0f}",
            f"{100 * middle['mfu']:.1f}%",
            f"{rows[0]['memory_gb']:.2f} GB",
            spell(0.93 * len(rows)),
        ]
    skipped = text[text.index("documents of the batch") :]
    assert "hpo:230, " in skipped and "hpo:477, " in skipped
    (times,) = re.findall(r'<th scope="row">hpo</th>(?:(?!</tr>).)*<td>([\d.]+)</td></tr>', text, re.DOTALL)
    assert float(times) == pytest.approx(0.005 * 730, abs=0.005)


def test_each_source_has_its_own_small_chart(built):
    text = built[2]
    for key, what in (("domains", "Training loss of each"), ("bits", "Held-out bits per byte of each")):
        chart = re.search(rf'<svg class="chart"[^>]*aria-label="({what}[^"]*)">(.*?)</svg>', text, re.DOTALL)
        names = re.findall(r">([^<]+)</text>", chart[2])
        assert set(fake_run.SOURCES) <= set(names)
        assert f'id="{key}-' in chart[2]
        assert all(f"{source} " in chart[1] for source in fake_run.SOURCES)


def test_many_sources_do_not_make_the_page_endless(built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, file = fake_run.build(copy), copy / "30-pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    for number, row in enumerate(row for row in rows if row["kind"] == "train"):
        row["domains"] |= {f"s{i}": 2.0 for i in range(40) if number % (i + 1) == 0}
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = Page(report.render(config, read_run(config))).text
    assert "the 24 sources read most steadily, 31 more are in metrics.jsonl" in text


def test_an_older_run_without_those_columns_still_has_its_page(undrawn, built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, file = fake_run.build(copy), copy / "30-pretrain/metrics.jsonl"
    added = {"domains", "repeats", "mfu", "memory_gb", "eta_seconds", "documents"}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    kept = [
        {key: row[key] for key in row.keys() - added}
        for row in rows
        if row["step"] % 100 or row["kind"] == "train"
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    text = Page(report.render(config, read_run(config))).text
    assert "Loss by source" not in text and "during training" not in text and "times read" not in text
    assert "not noted" in text


def test_a_run_in_progress_can_be_looked_at(undrawn, built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, file = fake_run.build(copy), copy / "30-pretrain/metrics.jsonl"
    (copy / "30-pretrain/done.json").unlink()
    lines = file.read_text().splitlines(keepends=True)[:650]
    file.write_text("".join(lines) + '{"kind": "train", "ph')  # a row is just being written
    step = max(json.loads(line)["step"] for line in lines)
    alone = ReportConfig(out=config.out, pretrain=config.pretrain)
    text = Page(report.render(alone, read_run(alone))).text
    assert f"at its last step, {spell(0.93 * (730 - step))} were left" in text
    assert "is being trained from scratch, so far" in text
    assert f"{fake_run.PHASES[2]}, so far" not in text  # nothing of it was scored yet
    end = {"kind": "stopped", "step": step + 1, "loss": "nan", "grad_norm": "inf", "documents": ["a:1"]}
    file.write_text("".join([*lines, json.dumps(end) + "\n"]))
    text = Page(report.render(alone, read_run(alone))).text
    assert f"Stopped at step {step + 1}: loss nan, gradient norm inf. Documents of its batch: a:1" in text


def test_marks_the_phase_that_introduces_a_group(built):
    cells = re.findall(r'<th scope="row">hpo</th><td class="text">.*?</td>(.*?)</tr>', built[2])
    rows = [row for row in cells if "new" in row]
    assert len(rows) == 1
    phases_and_times_read = [("new" in cell) for cell in rows[0].split("<td")[1:]]
    assert phases_and_times_read == [False, False, True, False]


def test_questions_show_every_models_pick(built):
    root, _, text = built
    shown = json.loads((root / "70-evaluate/results.json").read_text())["shown"]
    articles = re.findall(r"<article.*?</article>", text, flags=re.DOTALL)
    assert len(articles) == len(shown) == 10
    for question, article in zip(shown, articles, strict=True):
        options = re.findall(r"<li(?: class=\"right\")?>[A-D]\. .*?(?=<li(?: class=\"right\")?>[A-D]\. |\Z)",
                             article, flags=re.DOTALL)  # fmt: skip
        assert len(options) == 4
        for index, option in enumerate(options):
            right = index == question["answer"]
            assert ("right answer" in option) == right
            found = re.findall(r"</span>\s*([\w.-]+) (✓|✗|&#10003;|&#10007;)</li>", option)
            assert [name for name, _ in found] == [
                n for n, pick in question["picks"].items() if pick == index
            ]
            assert {mark in ("✓", "&#10003;") for _, mark in found} <= {right}


def test_hostile_text_is_escaped_and_chinese_is_kept(built, page):
    text = built[2]
    assert "<script" not in text
    assert "<img" not in text
    assert (
        text.count("&lt;script&gt;") == 7
    )  # licence, option, question, answer, recipe, two names of documents
    assert fake_run.HOSTILE in page.text
    assert fake_run.CHINESE in page.text


def test_same_bytes_again_and_elsewhere(built, tmp_path):
    root, config, text = built
    assert report.render(config, read_run(config)) == text
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    moved = fake_run.build(copy)
    assert report.render(moved, read_run(moved)) == text
    assert str(root) not in text


@pytest.mark.parametrize(
    ("field", "section"),
    [
        ("corpus", "Corpus"),
        ("pretrain", "Training"),
        ("experts", "Experts"),
        ("merges", "Merging"),
        ("alignment", "Alignment"),
        ("flatten", "Flattening"),
        ("evaluate", "Evaluation"),
        ("recipe", "Recipe"),
        ("tokenizer", None),
    ],
)
def test_a_step_that_was_not_run_says_so(undrawn, built, field, section):
    _, config, _ = built
    empty = {} if field in ("experts", "merges", "alignment") else None
    without = dataclasses.replace(config, **{field: empty})
    text = Page(report.render(without, read_run(without))).text
    missing = {name for name in SECTIONS if f"{name}: not run" in text}
    expected = {section} if section else set()
    assert missing == (expected | {"Questions"} if field == "evaluate" else expected)
    with_bad_path = dataclasses.replace(
        config, **{field: dict.fromkeys(getattr(config, field), "/nowhere") if empty == {} else "/nowhere"}
    )
    again = Page(report.render(with_bad_path, read_run(with_bad_path))).text
    assert {name for name in SECTIONS if f"{name}: not run" in again} == missing


def test_only_one_step_is_enough(undrawn, built):
    _, config, _ = built
    alone = ReportConfig(out=config.out, flatten=config.flatten)
    text = Page(report.render(alone, read_run(alone))).text
    assert (
        sum(f"{name}: not run" in text for name in SECTIONS) == len(SECTIONS) - 2
    )  # flattening and its timings
    assert "1377.8" in text


def test_an_unfinished_step_is_called_unfinished(undrawn, built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config = fake_run.build(copy)
    (copy / "30-pretrain/done.json").unlink()
    text = Page(report.render(config, read_run(config))).text
    assert "3. Pre-training unfinished" in text
    assert "17 of 18 steps finished" in text


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("70-evaluate/results.json", "{", r"results.json: not valid JSON"),
        ("70-evaluate/results.json", '{"models": {}}', r"70-evaluate: not what its step writes"),
        ("30-pretrain/metrics.jsonl", '{"kind": "train"}\n', r"30-pretrain: not what its step writes"),
        ("10-corpus/sources.json", '{"a": 1}', r"10-corpus: not what its step writes"),
        ("60-flatten/flatten.json", "[]", r"60-flatten: not what its step writes"),
        ("50-merge-metagpt/merge.json", "{}", None),
    ],
)
def test_a_broken_step_is_named(undrawn, built, tmp_path, file, content, message):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config = fake_run.build(copy)
    (copy / file).write_text(content)
    if message is None:
        report.render(config, read_run(config))
        return
    with pytest.raises(UserError, match=message):
        report.run(config)
    assert (copy / "80-report/report.html").read_text() == built[2]  # the old page is kept


def test_plan_tells_what_there_is(built):
    _, config, _ = built
    plan = report.plan(dataclasses.replace(config, flatten=None))
    assert plan.facts["pretrain"] == "done"
    assert plan.facts["flatten"] == "not run"
    assert plan.facts["merge ties"] == "done"
    assert plan.writes == [f"{config.out}/report.html"]
    assert set(config.reads()) >= {config.corpus, config.recipe, *config.merges.values()}


def test_config_refuses_nothing_to_report():
    with pytest.raises(UserError, match="nothing to report on"):
        ReportConfig(out="x")
    with pytest.raises(UserError, match="title is empty"):
        ReportConfig(out="x", title=" ", corpus="y")


def flat(before, after, errors=(1.0, 1.0), heldout=(3.0, 3.0), probes=8, **trace):
    estimates = [
        {"mean": m, "standard_error": e, "probes": probes}
        for m, e in zip((before, after), errors, strict=True)
    ]
    return {
        "trace": {"before": estimates[0], "after": estimates[1], **trace},
        "loss": {"heldout": list(heldout)},
    }


def test_verdict_claims_no_more_than_the_errors_allow():
    assert verdict(flat(100.0, 90.0)) == (
        "The shift lowered the trace of the Hessian by 10.0%; held-out loss stayed at 3.000 nats per token."
    )
    assert "raised the trace of the Hessian by 10.0%" in verdict(flat(100.0, 110.0))
    assert "no more than its sampling error" in verdict(flat(100.0, 98.0))
    assert "went up by 0.0100 to 3.010" in verdict(flat(100.0, 90.0, heldout=(3.0, 3.01)))
    # two probes say little: t is 12.7 with one degree of freedom, 2.36 with seven
    assert "no more than its sampling error" in verdict(flat(100.0, 90.0, probes=2))
    assert "no more than its sampling error" in verdict(flat(100.0, 90.0, probes=1))
    assert "no more than its sampling error" in verdict(flat(100.0, 96.7))
    assert "lowered" in verdict(flat(100.0, 96.6))
    paired = {"mean": -2.0, "standard_error": 0.1, "probes": 8}
    assert "lowered the trace of the Hessian by 2.0%" in verdict(flat(100.0, 98.0, difference=paired))
    assert "no more than its sampling error" in verdict(flat(100.0, 50.0, errors=(float("nan"), 1.0)))
    assert "curvature unmeasured" in verdict({"trace": None, "loss": {"heldout": [3.0, 3.0]}})


def test_a_flattening_that_tells_more_is_shown_with_it(undrawn, built, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(built[0], copy)
    config, file = fake_run.build(copy), copy / "60-flatten/flatten.json"
    data = json.loads(file.read_text())
    data |= {"task": "class", "mode": "curvature", "verdict": "It is what it is."}
    data["trace"] |= {
        "kind": "Gauss-Newton",
        "scaled": "after",
        "matched": {"mean": 1402.5, "standard_error": 20.25, "probes": 32},
    }
    data["layers"][0]["action"] = "over budget"
    file.write_text(json.dumps(data))
    text = Page(report.render(config, read_run(config))).text
    assert "It is what it is." in text and "Hessian trace" not in text
    assert "the curvature of earlier layers is estimated to be least" in text and "200,000 samples" in text
    assert re.search(r"Gauss-Newton trace\s*1523.4\s*1377.8\s*1402.5", text)
    assert "over budget" in text and "Loss in nats per sample" in text


def test_smooth_is_the_centred_mean_and_thin_keeps_the_ends():
    values = [1.0, 4.0, 2.0, 8.0, 5.0]
    assert smooth(values, 1) == pytest.approx([1.0, 7 / 3, 14 / 3, 5.0, 5.0])
    assert smooth(values, 9) == pytest.approx([1.0, 7 / 3, 4.0, 5.0, 5.0])
    assert list(thin(3, 10)) == [0, 1, 2]
    kept = thin(1000, 7)
    assert (kept[0], kept[-1], len(kept)) == (0, 999, 7)
    assert np.all(np.diff(kept) > 0)


def test_spell():
    assert [spell(s) for s in (4.4, 75.2, 599, 630, 3599, 3661, 7325)] == [
        *("4 s", "1 min 15 s", "9 min 59 s", "10 min", "1 h 0 min", "1 h 1 min", "2 h 2 min")
    ]


def test_config_and_guide_import_nothing_heavy():
    import subprocess
    import sys

    code = (
        "import sys, galenic.report.config, galenic.evaluate.config, galenic.report, galenic.evaluate;"
        "print([m for m in ('torch', 'matplotlib', 'transformers', 'numpy', 'jinja2') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
    assert Path(HERE / "style.css").is_file()
