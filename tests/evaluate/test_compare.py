import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from evaluate_helpers import write_rows
from test_evaluate import config_of, evaluated, folders  # noqa: F401  # fixtures: a real evaluation

from galenic import build, cli
from galenic.evaluate import compare
from galenic.evaluate.compare_config import CompareConfig
from galenic.evaluate.statistics import holm, mcnemar, normalised_average, paired_bootstrap, wilson
from galenic.runtime import UserError


def evaluation(folder, models, experts=None):
    """Writes what an evaluation leaves: models -> kind -> scores."""
    for name, kinds in models.items():
        rows = [
            {"kind": kind, "id": f"{kind}-{i}", "right": score, "answer": i % 4}
            for kind, scores in kinds.items()
            for i, score in enumerate(scores)
        ]
        write_rows(folder / f"items/{name}.jsonl", rows)
    results = {"models": {name: {} for name in models}, "experts": experts or {}}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


A = {"recall": [1.0] * 20 + [0.0] * 20, "notes": [0.5, 0.25, 0.75, 1.0] * 5}
B = {"recall": [1.0] * 38 + [0.0] * 2, "notes": [0.5, 0.0, 0.75, 1.0] * 5}


@pytest.fixture
def both(tmp_path):
    return evaluation(tmp_path / "run", {"one": A, "two": B})


def test_the_comparison_is_its_parts(both):
    found = compare.compare(CompareConfig(a=f"{both}:one", b=f"{both}:two"))
    assert found["items"] == {"compared": 60, "only_a": 0, "only_b": 0}
    recall, notes = found["kinds"]["recall"], found["kinds"]["notes"]
    assert (recall["a"]["value"], recall["b"]["value"], recall["n"]) == (0.5, 0.95, 40)
    assert (recall["a"]["low"], recall["a"]["high"]) == pytest.approx(wilson(20, 40))
    change = paired_bootstrap(A["recall"], B["recall"])
    assert recall["difference"] == {"value": change.value, "low": change.low, "high": change.high}
    assert (recall["test"], recall["p"]) == ("mcnemar", mcnemar(0, 18))
    assert (recall["only_a"], recall["only_b"], recall["verdict"]) == (0, 18, "better")
    # five differences of one sign: 2 / 2^5
    assert notes["test"] == "sign flips" and notes["p"] == pytest.approx(1 / 16, abs=0.01)
    assert (notes["only_a"], notes["only_b"], notes["verdict"]) == (5, 0, "undecided")
    adjusted = holm({"recall": recall["p"], "notes": notes["p"]})
    assert {kind: row["p_holm"] for kind, row in found["kinds"].items()} == adjusted
    assert found["normalised_average"] is None and found["notes"] == []


def test_swapping_the_models_swaps_the_signs(both):
    there = compare.compare(CompareConfig(a=f"{both}:one", b=f"{both}:two"))["kinds"]["recall"]
    back = compare.compare(CompareConfig(a=f"{both}:two", b=f"{both}:one"))["kinds"]["recall"]
    assert back["verdict"] == "worse" and back["p"] == there["p"]
    assert back["difference"]["value"] == -there["difference"]["value"]
    assert back["difference"]["low"] == pytest.approx(-there["difference"]["high"], abs=0.03)


def test_the_verdict_needs_more_where_more_is_asked(tmp_path):
    """Six of six changes to the better: p is 1/32 alone, and not enough beside another kind."""
    a, b = [0.0] * 6 + [1.0] * 9, [1.0] * 15
    alone = evaluation(tmp_path / "alone", {"one": {"x": a}, "two": {"x": b}})
    assert (
        compare.compare(CompareConfig(a=f"{alone}:one", b=f"{alone}:two"))["kinds"]["x"]["verdict"]
        == "better"
    )
    more = evaluation(tmp_path / "more", {"one": {"x": a, "y": a}, "two": {"x": b, "y": a}})
    found = compare.compare(CompareConfig(a=f"{more}:one", b=f"{more}:two"))["kinds"]
    assert found["x"]["p"] == 1 / 32 and found["x"]["p_holm"] == 1 / 16
    assert [found[kind]["verdict"] for kind in "xy"] == ["undecided", "undecided"]


def test_normalised_averages_with_intervals(tmp_path):
    random = np.random.Generator(np.random.Philox(key=1))
    models = {
        name: {kind: (random.random(200) < p).astype(float).tolist() for kind, p in (("x", p), ("y", p / 2))}
        for name, p in {"one": 0.5, "two": 0.8, "expert": 0.9}.items()
    }
    folder = evaluation(tmp_path, models, {"x": "expert", "y": "expert"})
    found = compare.compare(CompareConfig(a=f"{folder}:one", b=f"{folder}:two"))["normalised_average"]
    scores = {name: {kind: float(np.mean(s)) for kind, s in kinds.items()} for name, kinds in models.items()}
    for side, name in (("a", "one"), ("b", "two")):
        assert found[side]["value"] == pytest.approx(normalised_average(scores[name], scores["expert"]))
        assert found[side]["low"] < found[side]["value"] < found[side]["high"]
    assert found["difference"]["value"] == pytest.approx(found["b"]["value"] - found["a"]["value"])
    # against drawing items by hand
    arrays = {name: {kind: np.array(s) for kind, s in kinds.items()} for name, kinds in models.items()}
    draws = []
    for _ in range(1500):
        total = 0.0
        for kind in ("x", "y"):
            at = random.integers(200, size=200)
            one, two, expert = (arrays[name][kind][at].mean() for name in ("one", "two", "expert"))
            total += (two - one) / expert / 2
        draws.append(total)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert (found["difference"]["low"], found["difference"]["high"]) == pytest.approx((low, high), abs=0.02)
    mine = compare.compare(CompareConfig(a=f"{folder}:one", b=f"{folder}:expert"))["normalised_average"]
    assert mine["b"] == {"value": 1.0, "low": 1.0, "high": 1.0}


def test_why_there_is_no_normalised_average(tmp_path):
    nothing = {"x": [0.0] * 5}
    folder = evaluation(
        tmp_path / "a", {"one": {"x": [1.0] * 5}, "two": nothing, "bad": nothing}, {"x": "bad"}
    )
    found = compare.compare(CompareConfig(a=f"{folder}:one", b=f"{folder}:two"))
    assert found["normalised_average"] is None
    assert found["notes"] == [
        "no normalised average: an expert has next to nothing right, so that a ratio to it has no meaning"
    ]
    assert compare.lines(found)[-1] == found["notes"][0]
    other = evaluation(tmp_path / "b", {"one": {"x": [1.0] * 5}}, {"x": "one"})
    found = compare.compare(CompareConfig(a=f"{folder}:one", b=str(other)))
    assert "different experts of x" in found["notes"][0]
    less = evaluation(
        tmp_path / "c", {"one": {"y": [1.0] * 5}, "two": {"y": [1.0] * 5}, "x": nothing}, {"x": "x"}
    )
    found = compare.compare(CompareConfig(a=f"{less}:one", b=f"{less}:two"))
    assert "items of x, which has an expert, are not all compared" in found["notes"][0]


def test_other_items_are_an_error_or_left_out(tmp_path):
    first = evaluation(tmp_path / "a", {"one": {"x": [1.0] * 5, "y": [1.0] * 2}})
    second = evaluation(tmp_path / "b", {"two": {"x": [0.0] * 9}})
    asked = {"a": str(first), "b": f"{second}:two"}
    said = (
        rf"the items differ: 2 only of {first}:one, 4 only of {second}:two \(the first is 'y-0' of y\); "
        "--common true compares the 5 of both"
    )
    with pytest.raises(UserError, match=said):
        compare.compare(CompareConfig(**asked))
    found = compare.compare(CompareConfig(**asked, common=True))
    assert list(found["kinds"]) == ["x"] and found["kinds"]["x"]["n"] == 5
    assert found["items"] == {"compared": 5, "only_a": 2, "only_b": 4}
    assert compare.lines(found)[-1] == "left out: 2 items only of a, 4 only of b"


def test_bad_input(both, tmp_path):
    def refused(message, a=f"{both}:one", b=f"{both}:two"):
        with pytest.raises(UserError, match=message):
            compare.plan(CompareConfig(a=a, b=b))

    refused("one is named twice; a model is compared with another", b=f"{both}/../run:one")
    refused("no model is called 'tow' .did you mean 'two'", b=f"{both}:tow")
    refused("no model is called 'x'; it holds one, two", b=f"{both}:x")
    refused(rf"holds 2 models; write {both}:MODEL, one of one, two", b=str(both))
    refused("nowhere: is not a folder", b=str(tmp_path / "nowhere:one"))
    (tmp_path / "empty").mkdir()
    refused(
        "is no evaluation .no results.json.; name the folder of `galenic evaluate`", b=str(tmp_path / "empty")
    )
    (tmp_path / "empty/items").mkdir()
    refused("the evaluation is not finished", b=str(tmp_path / "empty"))
    (tmp_path / "empty/results.json").write_text("[]")
    refused("names no models", b=str(tmp_path / "empty"))
    other = evaluation(tmp_path / "other", {"one": {"z": [1.0]}})
    refused("have no item in common", b=str(other))
    rows = [json.loads(line) for line in (both / "items/two.jsonl").read_text().splitlines()]
    file = both / "items/two.jsonl"
    for change, message in (
        ({"right": None}, "two.jsonl:2: has no 'right'"),
        ({"right": 1.5}, "two.jsonl:2: 'right' is 1.5"),
        ({"right": True}, "'right' is True"),
        ({"id": "recall-0"}, "item 'recall-0' of recall is there twice"),
        ({"answer": 3}, "item 'recall-1' of recall has answer 1 for .*:one and 3 for .*:two"),
    ):
        write_rows(file, [rows[0], {**rows[1], **change}, *rows[2:]])
        refused(message)
    file.write_text("")
    refused("no items in it")
    file.unlink()
    refused("two.jsonl: no such file")
    with pytest.raises(UserError, match="b: names no evaluation"):
        CompareConfig(a="x", b="")
    with pytest.raises(UserError, match="resamples is 3"):
        CompareConfig(a="x", b="y", resamples=3)


def test_a_folder_with_a_colon_in_its_name(tmp_path):
    first = evaluation(tmp_path / "run:1", {"one": {"x": [1.0]}})
    second = evaluation(tmp_path / "run:2", {"one": {"x": [1.0]}})
    found = compare.compare(CompareConfig(a=str(first), b=f"{second}:one"))
    assert found["b"] == f"{tmp_path.name}/run:2:one" and found["kinds"]["x"]["verdict"] == "undecided"


def test_on_the_command_line(both, tmp_path, capsys):
    words = ["evaluate", "--compare", f"{both}:one", f"{both}:two"]
    assert cli.main([*words, "--plan"]) == 0
    assert "recall" in capsys.readouterr().out
    assert cli.main(words) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[:2] == [f"a  {both.parent.name}/run:one", f"b  {both.parent.name}/run:two"]
    assert table[3].split() == [
        "n",
        "a",
        "b",
        "b",
        "-",
        "a",
        "95%",
        "interval",
        "p",
        "p",
        "(Holm)",
        "b",
        "is",
    ]
    assert table[4].split()[:5] == ["recall", "40", "0.500", "0.950", "+0.450"]
    assert table[4].split()[-1] == "better" and "<0.001" in table[4]
    for _ in range(2):  # done again each time
        assert cli.main([*words, "--out", str(tmp_path / "out")]) == 0
        assert capsys.readouterr().out.splitlines() == table
    first = (tmp_path / "out/compare.json").read_bytes()
    assert json.loads(first)["kinds"]["recall"]["verdict"] == "better"
    assert cli.main([*words[:3], f"{both}:tow"]) == 2
    assert "did you mean 'two'" in capsys.readouterr().err
    assert cli.main(words[:3]) == 2


def test_as_a_step_of_a_recipe(both, tmp_path):
    recipe, run = tmp_path / "recipe", tmp_path / "built"
    recipe.mkdir()
    (recipe / "70-evaluate.yaml").write_text("models: {one: m, two: n}\nquestions: q\n")
    (recipe / "75-compare.yaml").write_text("a: RUN/70-evaluate/:one\nb: RUN/70-evaluate/:two\n")
    step = build.read_recipe(recipe, run)[1]
    shutil.copytree(both, run / "70-evaluate")
    (run / "70-evaluate/done.json").write_text('{"fingerprint": "x"}')
    build.run_step("compare", step.config, build.fingerprint("compare", step.config, run))
    found = json.loads((run / "75-compare/compare.json").read_text())
    assert found["kinds"]["recall"]["verdict"] == "better" and (run / "75-compare/done.json").exists()


def test_comparing_needs_no_torch(both):
    code = "import sys\nfrom galenic.cli import main\nassert main(sys.argv[1:]) == 0\nassert 'torch' not in sys.modules"
    words = ["evaluate", "--compare", f"{both}:one", f"{both}:two"]
    subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)


def test_a_real_evaluation_can_be_compared(evaluated):  # noqa: F811
    found = compare.compare(CompareConfig(a=f"{evaluated.out}:one", b=f"{evaluated.out}:two"))
    with open(f"{evaluated.out}/results.json", encoding="utf-8") as file:
        results = json.load(file)["models"]
    for kind in ("recall", "code"):
        for side, name in (("a", "one"), ("b", "two")):
            assert found["kinds"][kind][side]["value"] == results[name]["accuracy"][kind]["value"]
    if results["one"]["normalised_average"] is not None and found["normalised_average"]:
        assert found["normalised_average"]["a"]["value"] == results["one"]["normalised_average"]
