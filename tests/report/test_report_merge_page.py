import re

import pytest
from balanced import Balanced

from galenic.report.merge_page import write_merge_page


def summary_of(
    names, layers=4, scope="global", outside=("model.embed_tokens.weight", "lm_head.weight"), **changes
):
    units = [f"model.layers.{i}" for i in range(layers)] + list(outside)
    numbers = {name: float(t + 1) for t, name in enumerate(names)}
    shares = {name: value / sum(numbers.values()) for name, value in numbers.items()}
    return {
        "method": "metagpt",
        "base": "run/base",
        "experts": list(names),
        "norms": numbers,
        "cosines": [[1.0 if i == j else 0.1 for j in range(len(names))] for i in range(len(names))],
        "scope": scope,
        "coefficients": shares,
        "effective_models": 2.0,
        "units": {unit: {"norms": numbers, "coefficients": shares} for unit in units},
        "warnings": [],
    } | changes


INPUTS = [{"model": "run/base", "file": "model.safetensors", "bytes": 12_345, "identity": "ab" * 32}]


@pytest.fixture
def page(tmp_path):
    def write(summary, recipe="merge_method: metagpt\n", inputs=INPUTS):
        file = tmp_path / "merge-report.html"
        write_merge_page(file, summary, recipe, inputs)
        return file.read_text()

    return write


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("scope", ["global", "layer", "tensor"])
def test_pages_are_whole_and_name_everything(page, count, scope):
    names = [f"expert-{i}" for i in range(count)]
    html = page(summary_of(names, layers=40, scope=scope, warnings=["mind the gap"]))
    parser = Balanced()
    parser.feed(html)
    assert not parser.open and "script" not in parser.tags
    for text in (
        *names,
        "mind the gap",
        "model.embed_tokens.weight",
        "merge_method: metagpt",
        "abababababababab",
    ):
        assert text in html
    assert html.count("<svg") == (count > 1) + 1 + (scope != "global")
    assert not re.search(r"https?://(?!www\.w3\.org)", html)


def test_the_same_values_give_the_same_bytes(page):
    assert page(summary_of(["a", "b"], scope="layer")) == page(summary_of(["a", "b"], scope="layer"))


def test_names_cannot_break_out_of_the_page(page):
    evil = '<script>alert(1)</script>" onload="x'
    summary = summary_of([evil, "b"], outside=[evil], warnings=[evil], vocabulary=[evil])
    html = page(summary, recipe=evil, inputs=[INPUTS[0] | {"model": evil, "file": evil}])
    parser = Balanced()
    parser.feed(html)
    assert "script" not in parser.tags and "<script" not in html


def test_models_without_layers_or_differences(page):
    zero = summary_of(["a", "b"], layers=0, norms={"a": 0.0, "b": 0.0}, coefficients={"a": 0.0, "b": 0.0})
    html = page(zero)
    assert "Where in the network" in html and "not zero" not in html


def test_layers_stand_in_the_order_of_their_numbers(page):
    html = page(summary_of(["a", "b"], layers=12))
    assert "over 12 layers" in html and html.index("model.embed_tokens.weight") < html.index("lm_head.weight")


def test_what_was_kept_is_told(page):
    assert "55.0%" in page(summary_of(["a", "b"], kept={"a": 0.55, "b": 0.6}))
