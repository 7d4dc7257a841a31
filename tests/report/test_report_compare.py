"""Runs found by their steps' names, models side by side, and what is said of their differences."""

import csv
import io
import itertools
import json
import re
import shutil
from pathlib import Path
from urllib.parse import unquote

import compare_run
import fake_run
import numpy as np
import pytest
from markupsafe import Markup

from galenic import cli
from galenic.evaluate.benchmarks import rows as published
from galenic.report import benchmarks, cost, data, failures, probes, report, steps
from galenic.report.config import ReportConfig
from galenic.report.inputs import read_run, read_runs, resolve
from galenic.runtime import UserError


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
    """Drawings take seconds, and are looked at elsewhere."""
    monkeypatch.setattr("galenic.report.charts.draw_figure", lambda key, label, *_: Markup("<svg></svg>"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    return [str(compare_run.build(root / name, seed)) for seed, name in enumerate(("one", "two"))]


def tables(html):
    """File name -> rows of every download on a page."""
    found = {}
    for name, text in re.findall(r'download="([^"]+)" href="data:text/csv;charset=utf-8,([^"]+)"', html):
        found[name] = list(csv.reader(io.StringIO(unquote(text))))
    return found


# ---------------------------------------------------------------------------- finding steps


def test_steps_are_found_by_their_names(runs):
    found = steps.find(runs[0])
    assert [Path(path).name for path in found.experts.values()] == list(fake_run.EXPERTS.values())
    assert list(found.merges) == list(fake_run.MERGES)
    assert list(found.alignment) == list(fake_run.STAGES)  # the sft that no merge read is a stage
    assert Path(found.evaluate).name == "70-evaluate" and Path(found.flatten).name == "60-flatten"
    config = resolve(ReportConfig(runs=[runs[0]]))
    assert config.title == "Galenic starter" and config.pretrain == found.pretrain
    assert resolve(ReportConfig(runs=[runs[0]], flatten="/mine")).flatten == "/mine"


def test_steps_without_a_part_of_their_own_are_counted_in_the_cost(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    fake_run.done(run / "05-scorer", 90.0)
    fake_run.done(run / "80-report", 7.0)  # an earlier page is none of it
    config = ReportConfig(runs=[str(run)])
    before = cost.cost(read_run(ReportConfig(runs=[runs[0]])), 100.0)
    after = cost.cost(read_run(config), 100.0)
    assert after["total"]["seconds"] == pytest.approx(before["total"]["seconds"] + 90.0)
    assert [row["steps"] for row in after["rows"] if row["name"] == "other steps"] == [1]
    assert "05-scorer" in report.render(config, read_run(config))


@pytest.mark.parametrize("kind", ["missing", "empty"])
def test_a_folder_that_is_no_run_is_refused(tmp_path, kind, capsys):
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    assert cli.main(["report", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert f"runs: {folder}" in capsys.readouterr().err


def test_several_runs_need_the_word_compare(runs, capsys):
    assert cli.main(["report", *runs]) == 2
    assert "2 runs: add --compare" in capsys.readouterr().err
    with pytest.raises(UserError, match="is named twice"):
        read_runs(ReportConfig(runs=[runs[0], runs[0]], compare=True))
    with pytest.raises(UserError, match="name run folders"):
        ReportConfig(compare=True, corpus="x")


def test_words_of_the_command_line():
    assert cli._report_words(["a", "b", "--compare", "--out", "x"]) == [
        *("--runs", '["a", "b"]', "--compare=true", "--out", "x")
    ]
    assert cli._report_words(["--compare", "false"]) == ["--compare", "false"]
    assert cli._report_words(["--help"]) == ["--help"]


def test_the_command_line_compares_and_plans(runs, tmp_path, capsys):
    words = ["report", *runs, "--compare", "--out", str(tmp_path / "page")]
    assert cli.main([*words, "--plan"]) == 0
    assert re.search(r"runs +one, two\n", capsys.readouterr().out) and not (tmp_path / "page").exists()
    assert cli.main(words) == 0
    assert "Comparison of 4 models of 2 runs" in (tmp_path / "page/report.html").read_text()


# ---------------------------------------------------------------------------- a page written anew


def test_a_run_that_grew_is_reported_into_the_same_folder(runs, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    words = ["report", str(run), "--out", str(tmp_path / "page")]
    (run / "30-pretrain/done.json").unlink()
    file = run / "30-pretrain/metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:300]))
    assert cli.main(words) == 0
    first = (tmp_path / "page/report.html").read_text()
    assert cli.main(words) == 0 and "already done" in capsys.readouterr().out
    file.write_text("".join(lines[:600]))
    assert cli.main(words) == 0
    second = (tmp_path / "page/report.html").read_text()
    assert first != second and "2.4" in second
    assert cli.main([*words, "--title", "Other"]) == 0  # a page is no loss
    assert "Other" in (tmp_path / "page/report.html").read_text()
    assert cli.main(["report", str(run), "--out", str(run / "10-corpus")]) == 2  # another verb's folder is


def test_a_run_tells_its_settings_without_its_place(runs):
    names = dict(read_run(ReportConfig(runs=[runs[0]])).recipe)
    assert names["30-pretrain.yaml"] == "out: RUN/30-pretrain\n"


# ---------------------------------------------------------------------------- differences


@pytest.fixture(scope="module")
def page(runs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("galenic.report.charts.draw_figure", lambda key, label, *_: Markup("<svg></svg>"))
        return report.render_comparison(ReportConfig(runs=[runs[0]], compare=True))


def test_the_page_tells_the_differences_of_the_items(runs, page):
    rows = {
        name: {
            item["id"]: item["right"]
            for item in map(json.loads, (Path(runs[0]) / f"70-evaluate/items/{name}.jsonl").open())
            if item["kind"] == "recall"
        }
        for name in ("phase-3-medical-advanced", "sft-medical")
    }
    base, expert = rows.values()
    difference = 100 * (sum(expert.values()) - sum(base.values())) / len(base)
    found = re.search(
        r'<th scope="row">sft-medical</th><td class="text">recall</td><td>240</td><td>([^<]+)</td>.*?</tr>',
        page,
    )
    assert found[1] == f"{difference:+.1f}" and "&#9650; better" in found[0]
    assert "sft-medical against phase-3-medical-advanced: better at" in page


def test_scores_are_those_of_the_results(runs, page):
    results = json.loads((Path(runs[0]) / "70-evaluate/results.json").read_text())
    table = tables(page)["models-by-measures.csv"]
    assert table[0] == ["model", "kind", "right", "low", "high", "questions"]
    told = {(name, kind): float(value) for name, kind, value, *_ in table[1:]}
    for name, model in results["models"].items():
        for kind, score in model["accuracy"].items():
            assert told[name, kind] == pytest.approx(score["value"], abs=1e-5)
    assert len(told) == len(results["models"]) * len(compare_run.KINDS)


def test_runs_of_one_set_of_questions_are_compared_and_of_others_not(runs, tmp_path):
    html = report.render_comparison(ReportConfig(runs=runs, compare=True))
    assert "two: flattened less one: phase-3-medical-advanced" in html
    assert "All runs have the same corpus." in html and "Not compared" not in html
    other = compare_run.build(tmp_path / "three", 5, questions=9)  # the same names, other questions
    html = report.render_comparison(ReportConfig(runs=[runs[0], str(other)], compare=True))
    assert re.search(r"Not compared, as the questions are not the same: three: \S+ on arithmetic", html)
    assert "three: flattened less one" not in html and "one: flattened less one" in html


def test_models_are_chosen_by_name(runs):
    chosen = ["flattened", "metagpt"]
    html = report.render_comparison(ReportConfig(runs=[runs[0]], compare=True, models=chosen))
    assert "metagpt less flattened" in html and "sft-medical less" not in html
    with pytest.raises(UserError, match=r"models: 'flatened' is not here \(did you mean 'flattened'\?\)"):
        report.render_comparison(ReportConfig(runs=[runs[0]], compare=True, models=["flatened"]))
    names = ["two: metagpt", "one: metagpt"]
    assert "one: metagpt less two: metagpt" in report.render_comparison(
        ReportConfig(runs=runs, compare=True, models=names)
    )


def test_runs_without_an_evaluation_are_named(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(Path(runs[0]) / "30-pretrain", run / "30-pretrain")
    with pytest.raises(UserError, match="no model of run was evaluated"):
        report.render_comparison(ReportConfig(runs=[str(run)], compare=True))


def test_the_plan_names_runs_and_models(runs):
    plan = report.plan(ReportConfig(runs=runs, compare=True))
    assert plan.facts["runs"] == "one, two" and "two: flattened" in plan.facts["models"]
    assert all(Path(path).is_file() for path in plan.reads)


def test_a_comparison_of_the_verb_evaluate_is_shown(runs, tmp_path):
    entry = {"n": 240, "difference": {"value": 0.125, "low": 0.05, "high": 0.2}, "p": 0.001, "p_holm": 0.002}
    found = {
        "a": "/data/run/70-evaluate:A",
        "b": "/data/other:B",
        "kinds": {"recall": entry | {"verdict": "better"}},
    }
    fake_run.write(tmp_path / "ab/compare.json", found)
    html = report.render_comparison(
        ReportConfig(runs=[runs[0]], compare=True, comparisons=[str(tmp_path / "ab")])
    )
    assert "other:B less 70-evaluate:A" in html and "+12.5" in html and "/data" not in html


# ---------------------------------------------------------------------------- failures


def test_failures_are_the_worst_of_their_sort(runs):
    run = read_run(ReportConfig(runs=[runs[0]]))
    found = failures.failures(run, "flattened", 6)
    items = {name: {(r["kind"], r["id"]): r for r in rows} for name, rows in run.items.items()}
    wrong = {item for item, row in items["flattened"].items() if not row["right"]}
    assert found["wrong"] == len(wrong) and found["asked"] == sum(compare_run.KINDS.values())
    shares = {
        item: np.mean([rows[item]["right"] for name, rows in items.items() if name != "flattened"])
        for item in wrong
    }
    missed = [item for item in wrong if shares[item] > 0.5]
    assert found["missed_all"] == len(missed)
    for kind in compare_run.KINDS:  # of each kind the worst comes first
        told = [entry for entry in found["missed"] if entry["kind"] == kind]
        best = max((shares[item] for item in missed if item[0] == kind), default=None)
        assert (not told and best is None) or told[0]["others"][0] / told[0]["others"][1] == pytest.approx(
            best
        )
    sure = {item: max(softmax(items["flattened"][item][compare_run.SCORING])) for item in wrong}
    assert found["bold_all"] == sum(value > 0.5 for value in sure.values())
    assert found["bold"][0]["sure"] == pytest.approx(max(sure.values()))
    for entry in itertools.chain(found["missed"], found["bold"]):
        assert sum(option["right"] for option in entry["options"]) == 1
        assert not any(option["right"] and option["picked"] for option in entry["options"])
    assert failures.failures(run, "flattened", 0) is None
    assert failures.failures(run, "nobody", 6) is None


def softmax(scores):
    weights = np.exp(np.asarray(scores) - max(scores))
    return weights / weights.sum()


def test_older_items_tell_the_options_picked_only():
    row = {"answer": 2, "picks": {"pmi": 2, "total": 1}}
    assert failures.right(row, "pmi") == 1.0 and failures.right(row, "total") == 0.0
    assert failures.right({"right": 0.25}, "pmi") == 0.25


# ---------------------------------------------------------------------------- benchmarks and probes


def test_published_averages_are_those_of_the_report():
    means = [sum(row.published[i] for row in published.ROWS.values()) / 22 for i in range(5)]
    assert len(published.ROWS) == 22
    assert means == pytest.approx(published.AVERAGE, abs=0.01)


def score(value, n=100):
    return {
        "value": value,
        "low": value - 0.1,
        "high": value + 0.1,
        "n": n,
        "metric": "accuracy",
        "unanswered": 3,
    }


def test_benchmarks_stand_beside_published_numbers(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "70-evaluate/results.json"
    results = json.loads(file.read_text())
    results["models"]["flattened"]["benchmarks"] = {"CMBClin": score(0.5), "my own": score(0.75)}
    results["models"]["metagpt"]["benchmarks"] = {row: score(0.3) for row in published.ROWS}
    results["models"]["flattened"]["probes"] = {
        "needle": {"depth_50": {"value": 0.8, "low": 0.7, "high": 0.9, "n": 40}},
        "calibration": {"ece": 0.0625},
    }
    fake_run.write(file, results)
    for html in (
        report.render(config := ReportConfig(runs=[str(run)]), read_run(config)),
        report.render_comparison(ReportConfig(runs=[str(run)], compare=True)),
    ):
        row = re.search(r'<tr><th scope="row">CMBClin.*?</tr>', html, re.DOTALL)[0]
        assert (
            "50.0%" in row and "n = 100, 3 unanswered" in row and "77.40" in row and "40.0&#8211;60.0" in row
        )
        assert "22 of the report's 22 benchmarks were measured" in html
        assert "my own" in html and "published" in html
        average = re.search(r'<tr><th scope="row">Average of the 22.*?</tr>', html, re.DOTALL)[0]
        assert "not all measured" in average and "30.0%" in average and "72.23" in average
        assert "depth 50" in html and "80.0%" in html and "0.0625" in html
    assert benchmarks.benchmarks({"a": {}}) is None and probes.probes({"a": {}}) is None


def share(value, n=40, **more):
    return {"value": value, "low": max(0.0, value - 0.1), "high": min(1.0, value + 0.1), "n": n} | more


PROBED = {
    "needle": share(0.625, chance=0.25, too_long=3, written=share(0.5, unanswered=7))
    | {
        "by": {"depth": {"0.0": share(0.75), "1.0": share(0.5)}},
        "grid": {"256": {"0.0": share(0.875), "1.0": share(0.125)}, "512": {"0.0": share(0.375)}},
    },
    "calibration": {
        "recall": {
            "pmi": {
                "n": 240,
                "error": share(0.15625, by_chance=0.03125)
                | {
                    "bins": [
                        {"confidence": 0.3, "accuracy": 0.25, "n": 90},
                        {"confidence": 0.9, "accuracy": 0.4, "n": 9},
                    ]
                },
            }
        }
    },
    "contamination": {
        "recall": share(0.0) | {"unsearched": 0, "found": {"value": None, "low": None, "high": None, "n": 0}}
    },
}


def test_every_number_of_a_probe_is_told():
    found = probes.probes({"a": {"probes": PROBED}, "b": {}})
    told = {(row["probe"], row["what"]): row["scores"][0] for row in found["all"]}
    first = [(row["probe"], row["what"]) for row in found["first"]]
    assert found["models"] == ["a"]
    assert told["needle", "all"]["value"] == 0.625 and told["needle", "written"]["value"] == 0.5
    assert told["needle", "too long"] == {"value": 3} and told["needle", "written, unanswered"] == {
        "value": 7
    }
    assert told["needle", "depth, 0.0"]["value"] == 0.75
    assert told["calibration", "recall, pmi, error"]["value"] == 0.15625
    assert told["calibration", "recall, pmi, error, by chance"] == {"value": 0.03125}
    assert told["contamination", "recall, found"]["value"] is None
    assert not any("grid" in what or "bins" in what for _, what in told)
    assert first == [
        ("needle", "all"),
        ("needle", "written"),
        ("calibration", "recall, pmi, error"),
        ("contamination", "recall"),
    ]


def test_probes_are_drawn_of_the_product(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "70-evaluate/results.json"
    results = json.loads(file.read_text())
    results["models"]["flattened"]["probes"] = PROBED
    fake_run.write(file, results)
    config = ReportConfig(runs=[str(run)])
    for html in (
        report.render(config, read_run(config)),
        report.render_comparison(ReportConfig(runs=[str(run)], compare=True)),
    ):
        table = tables(html)["a-fact-in-a-long-text-flattened.csv"]
        assert table[1:] == [
            ["256", "0.0", "0.875", "0.775", "0.975", "40"],
            ["256", "1.0", "0.125", "0.025", "0.225", "40"],
            ["512", "0.0", "0.375", "0.275", "0.475", "40"],
        ]
        assert "256 tokens, depth 0.0: 88%" in html and "62.5%" in html
        assert tables(html)["is-it-right-to-be-sure-flattened.csv"][1] == ["recall", "0.3", "0.25", "90"]


# ---------------------------------------------------------------------------- cost


def test_energy_is_seconds_times_stated_watts(runs):
    run = read_run(ReportConfig(runs=[runs[0]]))
    found = cost.cost(run, 250.0)
    seconds = sum(step.done["seconds"] for step in run.steps())
    assert found["total"]["seconds"] == pytest.approx(seconds)
    assert found["total"]["energy"] == f"{1000 * 250 * seconds / 3.6e6:.3g} Wh"
    assert "other steps" not in [row["name"] for row in found["rows"]]
    html = report.render(config := ReportConfig(runs=[runs[0]], watts=250.0), run)
    assert "energy is an estimate: time &#215; 250 W" in html
    assert config.watts == 250.0
    with pytest.raises(UserError, match="watts is 0"):
        ReportConfig(runs=[runs[0]], watts=0.0)
    assert cost.cost(read_run(ReportConfig(recipe="/nowhere")), 1.0) is None


# ---------------------------------------------------------------------------- the numbers of charts


def chart(rows, columns=("a", "b")):
    return data.Chart(svg=Markup(""), columns=columns, rows=rows)


def test_a_charts_file_holds_its_numbers():
    rows = [('x, "y" & <z>', 1.0 / 3), ("=1+1", None), ("心", 12)]
    text = unquote(chart(rows).uri.removeprefix("data:text/csv;charset=utf-8,"))
    assert list(csv.reader(io.StringIO(text))) == [
        *(["a", "b"], ['x, "y" & <z>', "0.333333"], ["'=1+1", ""], ["心", "12"])
    ]
    assert not set("\"<>&' \n") & set(chart(rows).uri.removeprefix("data:text/csv;charset=utf-8,"))


def test_long_tables_are_thinned_with_both_ends():
    long = chart([(i, float(i)) for i in range(100_000)])
    assert len(long.shown) == data.MOST_SHOWN and (long.shown[0][0], long.shown[-1][0]) == ("0", "99,999")
    lines = unquote(long.uri).splitlines()
    assert len(lines) == data.MOST_ROWS + 1 and lines[-1] == "99999,99999"
    assert len(long.uri) < 30_000 and long.note == "1,000 of 100,000 rows"
    assert chart([("a", 1)]).note == ""


def test_a_long_run_with_many_sources_and_stages_stays_small(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "30-pretrain/metrics.jsonl"
    rows = [json.loads(line) for line in file.open()]
    last = [row for row in rows if row["kind"] == "train"][-1]
    for step in range(last["step"] + 1, last["step"] + 12_000):
        losses = {f"source-{i}": 2.345678 + i / 7 for i in range(24)}
        rows.append(last | {"step": step, "tokens": step * 4096, "domains": losses})
    fake_run.write(file, rows)
    stage = run / "59-ppo/metrics.jsonl"
    rows = [json.loads(line) for line in stage.open()]
    rows += [rows[5] | {"step": 1000 + i, "kl": 0.01234567 * i} for i in range(12_000)]
    for number in range(60, 66):
        shutil.copytree(run / "59-ppo", run / f"{number}-ppo-again")
        fake_run.write(run / f"{number}-ppo-again/metrics.jsonl", rows)
    config = ReportConfig(runs=[str(run)])
    html = report.render(config, read_run(config))
    assert "1,000 of 12" in html
    assert len(html.encode()) < 1_800_000  # drawings take about half a megabyte more, of any number of steps


def test_an_evaluation_without_multiple_choice_has_its_pages(runs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs[0], run)
    file = run / "70-evaluate/results.json"
    results = json.loads(file.read_text()) | {"experts": {}, "shown": []}
    for model in results["models"].values():
        model |= {"accuracy": {}, "bits_per_byte": {}, "answers": {}, "normalised_average": None}
        model["benchmarks"] = {"CMExam": score(0.4)}
    fake_run.write(file, results)
    for name in results["models"]:
        rows = [{"kind": "CMExam", "id": str(i), "right": float(i % 3 == 0)} for i in range(30)]
        fake_run.write(run / f"70-evaluate/items/{name}.jsonl", rows)
    config = ReportConfig(runs=[str(run)])
    for html in (
        report.render(config, read_run(config)),
        report.render_comparison(ReportConfig(runs=[str(run)], compare=True)),
    ):
        assert "1 of the report's 22 benchmarks was measured" in html
    assert "not told apart at any of 1 kind of questions" in html


def test_every_chart_can_be_taken_along(runs):
    config = ReportConfig(runs=[runs[0]])
    html = report.render(config, read_run(config))
    assert html.count("<figure") == len(re.findall(r'<figure.*?download="', html, re.DOTALL))
    found = tables(html)
    metrics = [json.loads(line) for line in (Path(runs[0]) / "30-pretrain/metrics.jsonl").open()]
    losses = [row["loss"] for row in metrics if row["kind"] == "train"]
    assert [float(value) for _, value in found["loss.csv"][1:]] == pytest.approx(losses, rel=1e-5)
    assert found["curvature-before-and-after.csv"][1][:2] == ["before", "1523.4"]
