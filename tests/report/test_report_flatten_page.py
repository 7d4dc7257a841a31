import copy
import re
import subprocess
import sys

import pytest
from balanced import Balanced

from galenic.report import flatten_charts, svg
from galenic.report.flatten_page import write_flatten_page

SECTIONS = ("losses", "notes", "curvature", "landscape", "layers", "selection", "settings")


def layer(name, action="shift", **changes):
    still = action == "no-op"
    return {
        "name": name,
        "kind": "Linear",
        "rows": 32768,
        "rank": 8 if still else 5,
        "dimension": 8,
        "action": action,
        "reason": "inputs span every direction" if still else "",
        "relative_output_change_predicted": 0.0 if still else 0.00123,
        "relative_output_change_measured": 3e-8 if still else 0.00125,
        "loss_bound": None,
        "norm_before": 20.0,
        "norm_after": 18.0 if action == "shift" else 20.0,
        "loss_change": 0.0 if still else -0.00011,
        "noop": still,
        "rolled_back": action == "rolled back",
        "spectrum": [1.0, 0.1, 0.01, 1e-8, 0.0],
    } | changes


def estimate(mean, error, probes=16):
    return {"mean": mean, "standard_error": error, "probes": probes}


def summary_of(blocks=2, **changes):
    parts = {"self_attn.q_proj": "shift", "self_attn.o_proj": "no-op", "mlp.down_proj": "rolled back"}
    places = [-1.0, -0.5, 0.0, 0.5, 1.0]
    bowl = [[2.0 + a * a + b * b for b in places] for a in places]
    layers = [layer(f"model.layers.{i}.{part}", act) for i in range(blocks) for part, act in parts.items()]
    return {
        "model": "little",
        "task": "next token",
        "mode": "ridge",
        "settings": {"output_budget": 0.01, "rank": None},
        "anchored_to": None,
        "rows": 32768,
        "layers": [*layers, layer("lm_head", "over budget", loss_bound=0.0456)],
        "loss": {"train": [2.3101, 2.3114], "heldout": [2.4512, 2.4498]},
        "accuracy": {"train": [0.99, 0.921], "heldout": [0.761, 0.7875]},
        "trace": {
            "kind": "Hessian",
            "before": estimate(1377.8, 21.0),
            "after": estimate(1291.2, 19.5),
            "difference": estimate(-86.6, 12.1),
            "matched": estimate(1330.4, 19.7),
            "matched_difference": estimate(-47.4, 12.4),
            "scaled": "after",
            "scale": 1.0023,
        },
        "eigenvalue": {"before": 88.21, "after": 90.12, "matched": 91.5, "matched_difference": 3.29},
        "adaptive_sharpness": {"rho": 0.5, "before": 0.0321, "after": 0.0309},
        "landscape": {
            "places": places,
            "line": {"before": bowl[2], "after": [None, *bowl[2][1:]]},
            "plane": {"places": places, "before": bowl, "after": [[None, *row[1:]] for row in bowl]},
        },
        "selection": {
            "candidates": [
                {
                    "settings": {"mode": "exact"},
                    "errors": 2.4512,
                    "difference": 0.0,
                    "standard_error": 0.0,
                },
                {
                    "settings": {"mode": "ridge", "output_budget": 0.01},
                    "errors": 2.4498,
                    "difference": -0.0014,
                    "standard_error": 0.0005,
                },
            ],
            "chosen": 1,
        },
        "notes": ["mind the gap"],
        "verdict": "The shift lowered the trace at equal loss.",
    } | changes


@pytest.fixture
def page(tmp_path):
    def write(summary, recipe="mode: ridge\n"):
        file = tmp_path / "flatten-report.html"
        write_flatten_page(file, summary, recipe)
        return file.read_text(encoding="utf-8")

    return write


def read(html):
    parser = Balanced()
    parser.feed(html)
    assert not parser.open and "script" not in parser.tags
    assert not re.search(r"https?://(?!www\.w3\.org)", html)
    return parser.text


def sections(html):
    return tuple(re.findall(r'<section id="(\w+)"', html))


def test_the_page_is_whole_and_shows_the_numbers_it_was_given(page):
    html = page(summary_of())
    text = read(html)
    assert sections(html) == SECTIONS and html.count("<svg") == 8
    for said in (
        "The shift lowered the trace at equal loss.",
        "Mode ridge: each layer's weight became the smallest one that moves its outputs",
        "32,768 tokens of training data.",
        "loss, training data 2.3101 2.3114 +0.0013",
        "loss, held-out data 2.4512 2.4498 \u22120.0014",
        "accuracy, held-out data 76.10% 78.75% +2.65 points",
        # Student's quantile for the 12 degrees of freedom that the table has next below 15, times the errors
        "trace of the Hessian 1377.8 \u00b1 46 1291.2 \u00b1 43 \u221286.6 \u00b1 26 "
        "1330.4 \u00b1 43 \u221247.4 \u00b1 27",
        "As it is, the shift lowered the trace of the Hessian by 6.3%.",
        "At equal loss, the shift lowered the trace of the Hessian by 3.4%.",
        "multiplied by 1.0023",
        "largest eigenvalue 88.21 90.12 1.91 91.5 3.29",
        "adaptive sharpness (\u03c1 = 0.5) 0.0321 0.0309 \u22120.0012 \u2013 \u2013",
        "model.layers.1.self_attn.q_proj 5 / 8 shift 1.23e\u221203 1.25e\u221203 "
        "20.0000 \u2192 18.0000 \u221210.00% \u22120.0001 \u2013",
        "model.layers.0.self_attn.o_proj 8 / 8 no-op inputs span every direction 0 3.00e\u221208 "
        "20.0000 \u2192 20.0000 0% 0 \u2013",
        "rolled back",
        "lm_head 5 / 8 over budget 1.23e\u221203 1.25e\u221203 20.0000 \u2192 20.0000 0% \u22120.0001 4.56e\u221202",
        "The outputs of 2 of 7 layers changed by less than a millionth",
        "2 (chosen) ridge 0.01 2.4498 \u22120.0014 \u00b1 0.0005",
        "output_budget 0.01",
        "mode: ridge",
        "mind the gap",
    ):
        assert said in text, said
    assert "rank None" not in text


ABSENT = {
    "accuracy": None,
    "trace": None,
    "eigenvalue": None,
    "adaptive_sharpness": None,
    "landscape": None,
    "selection": None,
    "notes": [],
}


def test_what_was_not_measured_leaves_no_hole(page):
    html = page(summary_of(**ABSENT))
    text = read(html)
    assert sections(html) == ("losses", "layers", "settings") and html.count("<svg") == 4
    assert "accuracy" not in text and "None" not in text and "Hessian" not in text


@pytest.mark.parametrize("name", ABSENT)
def test_each_part_can_be_absent_alone(page, name):
    text = read(page(summary_of(**{name: ABSENT[name]})))
    assert "None" not in text and "loss, held-out data" in text


def test_curvature_without_a_comparison_at_equal_loss(page):
    trace = summary_of()["trace"] | {"matched": None, "matched_difference": None, "scale": None}
    summary = summary_of(trace=trace | {"kind": "Gauss-Newton"})
    summary["eigenvalue"]["matched"] = None
    text = read(page(summary))
    assert "equal loss" not in text.replace(summary["verdict"], "")
    assert "lowered the trace of the Gauss-Newton matrix by 6.3%" in text
    assert "the losses differ" in text


def test_curvature_that_did_not_move_beyond_its_error_is_not_called_lower(page):
    summary = summary_of()
    summary["trace"]["matched_difference"] = estimate(-20.0, 12.4)
    text = read(page(summary))
    assert (
        "At equal loss, the shift changed the trace of the Hessian by no more than its sampling error."
        in text
    )


def test_one_probe_has_no_interval(page):
    trace = {key: estimate(100.0, 5.0, probes=1) for key in ("before", "after", "difference")}
    trace |= {
        "kind": "Hessian",
        "matched": None,
        "matched_difference": None,
        "scaled": "after",
        "scale": None,
    }
    text = read(page(summary_of(trace=trace)))
    assert "trace of the Hessian 100 100 100" in text and not re.search(r"\bnan\b", text)


def test_nothing_chosen_and_nothing_flattened(page):
    summary = summary_of(mode="nothing", layers=[])
    summary["selection"]["chosen"] = None
    html = page(summary)
    text = read(html)
    assert "None of these was chosen." in text and "the model was left as it was" in text
    assert "layers" not in sections(html)


def test_layers_that_did_not_move_are_told_in_words(page):
    html = page(summary_of(layers=[layer(f"layers.{i}", "no-op") for i in range(3)]))
    text = read(html)
    assert "predicted against measured" not in text and "Change of the norms" not in text
    assert "The outputs of 3 of 3 layers changed by less than a millionth" in text


def test_a_prediction_that_failed_is_drawn(page):
    bad = layer("a", "no-op", relative_output_change_measured=0.5)
    drawing = flatten_charts.agreement([bad, layer("b", "no-op")])
    assert "a: predicted 0, measured 0.5" in drawing and "b: predicted" not in drawing


def test_names_cannot_break_out_of_the_page(page):
    evil = '<script>alert(1)</script>" onload="x'
    summary = summary_of(model=evil, notes=[evil], verdict=evil, anchored_to=evil, settings={evil: evil})
    summary["layers"] = [
        layer(f"{evil}.0", reason=evil, kind=evil),
        layer(f"x.{evil}"),
    ]
    summary["selection"]["candidates"][0]["settings"] = {evil: evil}
    html = page(summary, recipe=evil)
    read(html)
    assert "<script" not in html and 'onload="x' not in html.replace("&#34;", "")


def test_the_same_values_give_the_same_bytes_and_stay_untouched(page):
    summary = summary_of()
    before = copy.deepcopy(summary)
    assert page(summary) == page(summary_of()) and summary == before


@pytest.mark.parametrize("blocks", [0, 1, 13, 150])
def test_any_number_of_layers(page, blocks):
    html = page(summary_of(blocks))
    text = read(html)
    count = 3 * blocks + 1
    assert f"All {count} layers" in text
    spectra = re.search(r'<svg[^>]*aria-label="Spectra of.*?</svg>', html, re.DOTALL)[0]
    assert spectra.count("<polyline") == count
    labels = re.findall(r"rotate\(-40[^>]*>(.*?)</text>", html)
    assert len(labels) <= 2 * 4  # parts of the network have names below the charts, not layers


def test_drawings_stay_inside_their_frame(page):
    places = [layer(f"blocks.{i}.{'very' * 9}.{part}") for i in range(40) for part in ("a", "b", "c")]
    for html in (page(summary_of(layers=places)), page(summary_of(60))):
        for width, height, drawing in re.findall(r'viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', html, re.DOTALL):
            for x, y, anchor, words in re.findall(
                r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)"[^>]*var\(--ink\)">(.*?)</text>',
                drawing,
            ):
                long = svg.LETTER * len(words)
                left = float(x) - {"start": 0, "middle": long / 2, "end": long}[anchor]
                assert -8 <= left and left + long <= float(width) + 8, words
                assert 0 <= float(y) <= float(height), words


def test_a_landscape_keeps_one_scale_and_gaps_where_the_loss_is_not_finite():
    places = [-1.0, 0.0, 1.0]
    low, high = [[1.0] * 3] * 3, [[3.0] * 3] * 3
    drawing = flatten_charts.plane(places, low, [[None, 3.0, 3.0], *high[1:]])
    faint, strong = (drawing.count(f'fill-opacity="{shade}"') for shade in ("0.04", "0.94"))
    assert (faint, strong) == (9 + 1, 8 + 1)  # cells and their place in the scale
    assert drawing.count('stroke="var(--bad)"') == 1
    assert ">1<" in drawing and ">3<" in drawing and "equal ratios" not in drawing
    assert "equal ratios" in flatten_charts.plane(places, low, [[100.0] * 3] * 3)
    assert flatten_charts.plane(places, [[None] * 3] * 3, [[None] * 3] * 3) is None
    line = flatten_charts.line(places, [1.0, None, 1.0], [1.0, 2.0, float("inf")], "loss")
    assert line.count("<polyline") == 3


def test_logarithmic_axes_enclose_their_range_in_powers_of_ten():
    for low, high in ((3e-9, 0.2), (1e-5, 1e-5), (0.02, 0.03), (1e-16, 1.0)):
        axis = svg.logarithmic("", low, high)
        assert axis.low <= low * (1 + 1e-12) and high <= axis.high * (1 + 1e-12) and 2 <= len(axis.ticks) <= 7
        assert axis.share(axis.low) == 0 and axis.share(axis.high) == 1
    assert axis.name(axis.ticks[0]) == "1" and axis.name(1e-12) == "10\u207b\u00b9\u00b2"
    assert axis.share(0.0) == 0  # an eigenvalue of nothing lies on the edge


def test_parts_of_a_network():
    assert flatten_charts.parts_of(["model.layers.0.mlp.up", "lm_head", "model.layers.1.mlp.up"]) == {
        "up": [0, 2],
        "lm_head": [1],
    }
    assert flatten_charts.parts_of(["a.0.x", "b.0.x", "a.1.x"]) == {"a.*.x": [0, 2], "b.*.x": [1]}
    assert flatten_charts.parts_of(["0", "2"]) == {"*": [0, 1]}


def test_the_page_needs_no_large_library():
    code = (
        "import sys, galenic.report.flatten_page; "
        "print([name for name in ('torch', 'matplotlib', 'numpy') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
