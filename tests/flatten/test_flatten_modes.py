"""The verb in every mode: what each leaves alone, what it moves, and what is told of it."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from galenic.cli import main
from galenic.flatten.config import FlattenConfig
from galenic.flatten.data import Batch
from galenic.flatten.flatten import preview, run
from galenic.flatten.prepare import halves, softmax_head
from galenic.flatten.words import verdict
from galenic.model import load
from galenic.runtime import UserError, read_json

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")


@pytest.fixture
def flatten(inputs, tmp_path):
    """Runs the verb with the given changes and returns what it told and the model."""

    def act(**changes):
        out = tmp_path / "out"
        run(make_config(inputs, out, **changes))
        return read_json(out / "flatten.json"), load(out / "model")

    return act


def make_config(inputs, out, **changes):
    out.mkdir(exist_ok=True)
    defaults = {
        "out": str(out),
        "model": str(inputs / "model"),
        "tokens": str(inputs / "tokenizer"),
        "train_tokens": 640,
        "heldout_tokens": 256,
        "row_length": 64,
        "batch_rows": 4,
        "probes": 0,
        "loss_budget": 10.0,
    }
    return FlattenConfig(**(defaults | changes))


@pytest.fixture
def original(inputs):
    model = load(inputs / "model")
    model.materialize_norm_head()
    return model


def weight(model, name):
    return model.get_parameter(f"{name}.weight").detach()


# ---------------------------------------------------------------------------- modes


def test_truncation_leaves_so_many_directions(flatten):
    told, model = flatten(mode="truncate", rank=5)
    assert told["settings"] == {"rank": 5}
    for row in told["layers"]:
        assert row["action"] == "shift"
        assert int(torch.linalg.matrix_rank(weight(model, row["name"]).double(), rtol=1e-5)) <= 5
        assert row["relative_output_change_measured"] == pytest.approx(
            row["relative_output_change_predicted"], rel=1e-3
        )


def test_truncation_by_energy_keeps_that_share_of_the_outputs(flatten):
    told, _ = flatten(mode="truncate", energy=0.9)
    assert all(row["relative_output_change_predicted"] ** 2 <= 0.1 for row in told["layers"])
    assert any(row["relative_output_change_predicted"] ** 2 > 0.01 for row in told["layers"])


def test_stochastic_shifts_keep_the_outputs_of_their_samples_only(flatten):
    told, _ = flatten(mode="stochastic", samples=1, row_length=12, train_tokens=240, heldout_tokens=48)
    assert all(row["rank"] <= 12 and row["rows"] <= 12 for row in told["layers"])
    assert all(row["relative_output_change_measured"] > 0.01 for row in told["layers"])
    assert all(row["relative_output_change_predicted"] < 1e-6 for row in told["layers"])


def test_curvature_mode_moves_the_head_alone_and_keeps_its_outputs(flatten, original):
    told, model = flatten(
        mode="curvature", train_tokens=12, row_length=12, trace_rows=1, probes=8, curvature="gauss-newton"
    )
    assert [row["name"] for row in told["layers"]] == ["lm_head"] and told["layers"][0]["action"] == "shift"
    assert told["loss"]["train"][1] == pytest.approx(told["loss"]["train"][0], abs=1e-5)
    moved = {n for n, p in model.state_dict().items() if not torch.equal(p, original.state_dict()[n])}
    assert moved == {"lm_head.weight"}
    assert told["trace"]["kind"] == "Gauss-Newton"


def test_anchored_shifts_go_towards_the_base_and_shorten_the_task_vector(inputs, flatten, tmp_path, original):
    from galenic.model import save

    base = load(inputs / "model")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter += 0.05 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())
            )
    save(base, tmp_path / "base", tokenizer=inputs / "model", provenance={}, parents=[])
    told, model = flatten(
        mode="exact", base=str(tmp_path / "base"), train_tokens=12, row_length=12, trace_rows=1
    )
    base.materialize_norm_head()
    assert told["anchored_to"].endswith("/base")
    assert told["loss"]["train"][1] == pytest.approx(told["loss"]["train"][0], abs=1e-5)
    for row in told["layers"]:
        before = float((weight(original, row["name"]) - weight(base, row["name"])).norm())
        after = float((weight(model, row["name"]) - weight(base, row["name"])).norm())
        assert row["norm_before"] == pytest.approx(before, rel=1e-5)
        assert row["norm_after"] == pytest.approx(after, rel=1e-4) and after < before
    assert any("distance to the base" in note for note in told["notes"])


def test_an_anchored_budget_is_a_share_of_what_fine_tuning_added(inputs, flatten, tmp_path, original):
    from galenic.model import save

    base = load(inputs / "model")
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if "mlp" in name:  # a task vector a hundred times smaller than the weights
                parameter += 0.01 * parameter.roll(1, -1)
    save(base, tmp_path / "base", tokenizer=inputs / "model", provenance={}, parents=[])
    told, model = flatten(output_budget=0.1, base=str(tmp_path / "base"), layers=["*.mlp.*"])
    for row in told["layers"]:
        assert row["relative_output_change_predicted"] == pytest.approx(0.1, rel=1e-6)
        assert row["relative_output_change_measured"] == pytest.approx(0.1, rel=1e-2)
        moved = float((weight(model, row["name"]) - weight(original, row["name"])).norm())
        assert 0 < moved < 0.5 * row["norm_before"] and row["norm_after"] > 0.5 * row["norm_before"]


def test_the_gauge_changes_no_probability_on_any_text(flatten, original):
    told, model = flatten(mode="exact", gauge=True)
    ids = torch.randint(4, 60, (2, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        old, new = original(ids).logits.softmax(-1), model(ids).logits.softmax(-1)
    torch.testing.assert_close(new, old, rtol=1e-5, atol=1e-7)
    assert float(weight(model, "lm_head").mean(0).abs().max()) < 1e-6
    assert any("mean over classes" in note for note in told["notes"])


# ---------------------------------------------------------------------------- choosing by validation


def test_validation_leaves_a_model_that_no_candidate_improves(flatten, original):
    told, model = flatten(mode="truncate", select="validation", candidates=[1, 2])
    tried = told["selection"]["candidates"]
    assert [c["settings"]["rank"] for c in tried] == [1, 2]
    if told["selection"]["chosen"] is None:
        assert told["layers"] == [] and "nothing was changed" in " ".join(told["notes"])
        assert all(torch.equal(p, original.state_dict()[n]) for n, p in model.state_dict().items())
    else:
        assert tried[told["selection"]["chosen"]]["difference"] < 0


def test_validation_takes_what_helps(inputs, flatten, monkeypatch):
    """Errors are made so that the second candidate is best: what is applied is what was chosen."""
    from galenic.flatten import proof

    answers = iter([torch.ones(8), torch.full((8,), 0.9), torch.full((8,), 0.5), torch.ones(8)])
    monkeypatch.setattr(proof, "sample_errors", lambda model, batches: next(answers))
    told, _ = flatten(select="validation", candidates=[0.01, 0.05, 0.2], loss_budget=1e-9)
    assert not any(row["rolled_back"] for row in told["layers"])  # validation judged all layers together
    assert told["selection"]["chosen"] == 1 and told["settings"]["output_budget"] == 0.05
    for row in told["layers"]:
        assert row["relative_output_change_predicted"] == pytest.approx(0.05, rel=1e-6)
    assert any("validation chose output_budget 0.05" in note for note in told["notes"])


def test_the_verdict_tells_a_choice_that_moved_nothing_from_no_choice():
    row = {"action": "no-op", "reason": "the shift is below one step of bfloat16 everywhere"}
    chosen = {"layers": [row], "selection": {"chosen": 0}}
    assert verdict(chosen) == "Nothing was changed: the shift is below one step of bfloat16 everywhere."
    none = {"layers": [], "selection": {"chosen": None}}
    assert (
        verdict(none) == "Nothing was changed: no candidate was better on validation data beyond its error."
    )


def test_halves_share_no_row():
    batches = [
        Batch(inputs={"x": torch.arange(a, b)}, labels=torch.arange(a, b), mask=None, task="class")
        for a, b in ((0, 3), (3, 4), (4, 9))
    ]
    even, odd = (torch.cat([b.labels for b in part]).tolist() for part in halves(batches))
    assert even == [0, 2, 4, 6, 8] and odd == [1, 3, 5, 7]
    with pytest.raises(UserError, match="at least two"):
        halves([batches[1]])


# ---------------------------------------------------------------------------- proof


def test_curvature_is_told_before_after_and_at_equal_loss(flatten):
    told, _ = flatten(output_budget=0.3, probes=4, trace_rows=2, eigenvalue_steps=4, landscape=5, plane=True)
    trace = told["trace"]
    assert trace["kind"] == "Hessian" and trace["scale"] != 1
    for name in ("before", "after", "difference", "matched", "matched_difference"):
        assert trace[name]["probes"] == 4
    assert trace["matched"]["mean"] != trace["after"]["mean"]
    assert trace["scaled"] in ("before", "after")
    moved = trace["after"]["mean"] - trace["matched"]["mean"]
    if trace["scaled"] == "after":
        moved = trace["matched"]["mean"] - trace["before"]["mean"]
    assert trace["matched_difference"]["mean"] == pytest.approx(moved)
    assert set(told["eigenvalue"]) == {"before", "after", "matched", "matched_difference"}
    assert told["adaptive_sharpness"]["before"] != told["adaptive_sharpness"]["after"]
    line = told["landscape"]["line"]
    assert told["landscape"]["places"] == [-1, -0.5, 0, 0.5, 1]
    plane = told["landscape"]["plane"]
    assert [len(row) for row in plane["before"]] == [5] * 5
    assert plane["after"][2][2] == pytest.approx(line["after"][2])  # the model itself is in the middle
    assert len(set(line["before"])) == 5
    assert told["verdict"].endswith(".") and "trace at equal loss" in told["verdict"]


def test_the_comparison_at_equal_loss_scales_the_original_if_its_loss_is_the_smaller(
    inputs, flatten, original, monkeypatch
):
    """And the shifted weights are the ones that are saved."""
    from galenic.flatten import proof

    seen = []

    def remember(model, rows, loss):
        seen.append((loss, {n: p.detach().clone() for n, p in model.named_parameters()}))
        return 0.5

    monkeypatch.setattr(proof, "scale_to", remember)
    told, model = flatten(mode="truncate", rank=1, probes=2, trace_rows=1)
    assert told["trace"]["scaled"] == "before"
    ((_, parameters),) = seen
    assert all(torch.equal(p, parameters[n]) for n, p in original.named_parameters())
    assert not torch.equal(model.lm_head.weight, original.lm_head.weight)


def test_spectra_and_bounds_are_told(flatten):
    told, _ = flatten()
    for row in told["layers"]:
        assert row["spectrum"][0] == 1.0 and row["spectrum"] == sorted(row["spectrum"], reverse=True)
        assert len(row["spectrum"]) == min(64, row["dimension"])
    bounds = {row["name"]: row["loss_bound"] for row in told["layers"]}
    assert bounds["lm_head"] > 0 and all(b is None for n, b in bounds.items() if n != "lm_head")
    head = told["layers"][-1]
    assert abs(head["loss_change"]) < head["loss_bound"]


def test_the_preview_tells_of_every_layer_and_changes_nothing(inputs, tmp_path):
    lines = preview(make_config(inputs, tmp_path / "out", mode="exact"))
    assert lines[0].split()[:2] == ["layer", "rank"] and len(lines) == 12
    assert all("no-op: its inputs span all" in line for line in lines[1:])
    assert not list((tmp_path / "out").iterdir())


def test_the_command_line_prints_plan_and_table(inputs, tmp_path, capsys):
    words = [
        "--model",
        str(inputs / "model"),
        "--tokens",
        str(inputs / "tokenizer"),
        "--out",
        str(tmp_path / "o"),
    ]
    words += [
        "--train_tokens",
        "640",
        "--heldout_tokens",
        "128",
        "--row_length",
        "64",
        "--layers",
        "[lm_head]",
    ]
    assert main(["flatten", *words, "--plan"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "galenic flatten" and any(line.split()[:1] == ["memory"] for line in lines)
    table = lines[lines.index("") + 1 :]
    assert table[0].split()[:2] == ["layer", "rank"] and table[1].split()[:2] == ["lm_head", "16/16"]
    assert len(table) == 2 and not (tmp_path / "o").exists()


# ---------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "truncate"}, "needs a rank or an energy"),
        ({"mode": "truncate", "rank": 3, "energy": 0.9}, "needs a rank or an energy"),
        ({"rank": 3}, "rank: mode: ridge decides that itself; remove it or use mode: truncate"),
        ({"mode": "truncate", "rank": 0}, "rank: 0 keeps nothing"),
        ({"mode": "truncate", "energy": 1.5}, "energy: 1.5"),
        ({"mode": "exact", "samples": 5}, "samples: mode: exact"),
        ({"mode": "stochastic", "samples": 0}, "samples: 0 is less than 1"),
        ({"min_rows": -1}, "min_rows: -1 is negative"),
        ({"mode": "curvature", "layers": ["lm_head"]}, "layers: mode: curvature shifts the last layer"),
        ({"candidates": [0.1]}, "candidates: are for select: validation"),
        ({"select": "validation", "mode": "exact"}, "select: chooses a budget or a rank"),
        ({"select": "validation", "output_budget": 0.1}, "output_budget: is what select"),
        ({"select": "validation", "candidates": [2]}, "candidates: 2 is not between 0 and 1"),
        (
            {"select": "validation", "mode": "truncate", "candidates": [2.5]},
            "an energy below 1 or a whole rank",
        ),
        ({"landscape": 4}, "landscape: 4; an odd number"),
        ({"plane": True}, "plane: needs landscape"),
        ({"eigenvalue_steps": 1}, "eigenvalue_steps: 1"),
        ({"gauge": True, "base": "x"}, "gauge: moves the last layer away from the base"),
    ],
)
def test_contradictions_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        make_config(inputs, tmp_path / "out", **changes)


def test_a_tied_head_has_no_gauge_of_its_own():
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    ids = torch.arange(10)[None]
    batch = Batch(inputs={"input_ids": ids}, labels=ids, mask=torch.ones_like(ids))
    assert softmax_head(LlamaForCausalLM(config).eval(), batch) is None
    config.tie_word_embeddings = False
    assert softmax_head(LlamaForCausalLM(config).eval(), batch) == "lm_head"
