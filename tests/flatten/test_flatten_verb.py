import hashlib
from pathlib import Path

import pytest
import torch

from galenic.cli import parse_config
from galenic.flatten.config import FlattenConfig
from galenic.flatten.data import first_rows, read_rows
from galenic.flatten.flatten import plan, run
from galenic.flatten.proof import score
from galenic.model import load
from galenic.runtime import UserError, read_json


def config(inputs, out, **changes):
    out.mkdir(exist_ok=True)
    defaults = {
        "out": str(out),
        "model": str(inputs / "model"),
        "tokens": str(inputs / "tokenizer"),
        "train_tokens": 640,
        "heldout_tokens": 128,
        "row_length": 64,
        "batch_rows": 4,
        "probes": 3,
        "trace_rows": 2,
    }
    return FlattenConfig(**(defaults | changes))


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(Path(folder).iterdir())}


# ---------------------------------------------------------------------------- what comes out


@pytest.fixture(scope="module")
def ridge(inputs, tmp_path_factory):
    out = tmp_path_factory.mktemp("ridge") / "out"
    run(config(inputs, out))
    return out


def test_the_report_has_every_number_of_the_contract(ridge):
    result = read_json(ridge / "flatten.json")
    assert result["mode"] == "ridge" and result["output_budget"] == 0.01 and 300 < result["rows"] <= 640
    assert [layer["name"] for layer in result["layers"]][-1] == "lm_head" and len(result["layers"]) == 11
    for layer in result["layers"]:
        assert layer["relative_output_change_predicted"] == pytest.approx(0.01, rel=1e-6)
        assert layer["relative_output_change_measured"] == pytest.approx(0.01, rel=1e-3)  # float32 weights
        assert layer["norm_after"] < layer["norm_before"] and not layer["noop"] and not layer["rolled_back"]
        assert layer["dimension"] == (24 if "down_proj" in layer["name"] else 16) >= layer["rank"]
    assert set(result["loss"]) == {"train", "heldout"}
    assert {key: result["trace"][key]["probes"] for key in ("before", "after")} == {"before": 3, "after": 3}
    assert any("NormHead" in note for note in result["notes"])
    assert any("Hessian trace" in note for note in result["notes"])


def test_the_saved_model_is_the_measured_one(inputs, ridge):
    result = read_json(ridge / "flatten.json")
    settings = config(inputs, ridge)
    for split, tokens in (("train", 640), ("heldout", 128)):
        batches = read_rows(settings, split, tokens)
        before, after = (score(load(folder), batches).loss for folder in (inputs / "model", ridge / "model"))
        assert result["loss"][split] == pytest.approx([before, after], abs=1e-5)
    model = load(ridge / "model")
    assert model.config.norm_head is False and type(model.lm_head) is torch.nn.Linear
    modules = dict(model.named_modules())
    for layer in result["layers"]:
        assert float(modules[layer["name"]].weight.detach().norm()) == pytest.approx(
            layer["norm_after"], rel=1e-6
        )
    card = (ridge / "model/README.md").read_text()
    assert f'base_model: ["{inputs.name}/model"]' in card
    assert str(inputs) not in card  # nobody's folders are told


def test_a_run_again_gives_the_same_bytes(inputs, ridge):
    first, report = digest(ridge / "model"), (ridge / "flatten.json").read_bytes()
    (ridge / ".model.partial").mkdir()
    run(config(inputs, ridge))
    assert digest(ridge / "model") == first and (ridge / "flatten.json").read_bytes() == report


def test_exact_mode_with_enough_text_changes_nothing_but_the_head_form(inputs, tmp_path):
    run(config(inputs, tmp_path / "out", mode="exact", probes=0))
    result = read_json(tmp_path / "out/flatten.json")
    assert all(layer["noop"] and layer["rank"] == layer["dimension"] for layer in result["layers"])
    assert result["trace"] is None and result["output_budget"] == 0
    assert any(note.startswith("11 of 11 layers did not move") for note in result["notes"])
    before, after = load(inputs / "model"), load(tmp_path / "out/model")
    ids = torch.arange(10, 40)[None]
    with torch.no_grad():
        torch.testing.assert_close(after(ids).logits, before(ids).logits, rtol=1e-5, atol=1e-5)
    unit = torch.nn.functional.normalize(before.lm_head.weight.detach())
    torch.testing.assert_close(after.lm_head.weight.detach(), unit)


def test_exact_mode_with_little_text_shortens_weights_at_the_same_loss(inputs, tmp_path):
    run(
        config(inputs, tmp_path / "out", mode="exact", train_tokens=12, row_length=12, trace_rows=1, probes=0)
    )
    result = read_json(tmp_path / "out/flatten.json")
    assert result["rows"] <= 12 and all(layer["rank"] <= 12 for layer in result["layers"])
    assert not any(layer["noop"] for layer in result["layers"])
    assert result["loss"]["train"][1] == pytest.approx(result["loss"]["train"][0], abs=1e-5)
    assert all(layer["norm_after"] < 0.99 * layer["norm_before"] for layer in result["layers"])


def test_the_head_may_be_left_alone(inputs, tmp_path):
    run(config(inputs, tmp_path / "out", head="skip", probes=0, layers=["*"]))
    assert load(tmp_path / "out/model").config.norm_head is True
    names = [layer["name"] for layer in read_json(tmp_path / "out/flatten.json")["layers"]]
    assert len(names) == 10 and "lm_head" not in names


def test_a_layer_that_breaks_the_loss_budget_goes_back(inputs, tmp_path):
    run(config(inputs, tmp_path / "out", output_budget=0.9, loss_budget=1e-3, probes=0))
    result = read_json(tmp_path / "out/flatten.json")
    back = [layer for layer in result["layers"] if layer["rolled_back"]]
    assert back and all(abs(layer["loss_change"]) > 1e-3 for layer in back)
    before, after = load(inputs / "model"), load(tmp_path / "out/model")
    before.materialize_norm_head()
    old, new = before.state_dict(), after.state_dict()
    for layer in result["layers"]:
        assert (
            torch.equal(old[f"{layer['name']}.weight"], new[f"{layer['name']}.weight"])
            == layer["rolled_back"]
        )
        if layer["rolled_back"]:
            assert layer["norm_after"] == layer["norm_before"]
    assert any(f"{len(back)} layers went back" in note for note in result["notes"])
    kept = [layer["loss_change"] for layer in result["layers"] if not layer["rolled_back"]]
    assert all(abs(change) <= 1e-3 for change in kept)


# ---------------------------------------------------------------------------- text


def test_rows_hold_whole_documents_and_filling_does_not_count(inputs, tmp_path):
    settings = config(inputs, tmp_path / "out")
    batches = read_rows(settings, "train", 640)
    assert sum(len(batch.labels) for batch in batches) <= 10
    for batch in batches:
        ids, positions = batch.inputs["input_ids"], batch.inputs["position_ids"]
        assert ids.shape == batch.labels.shape == batch.mask.shape and ids.shape[1] == 64
        assert torch.equal(batch.mask, ids != 3) and batch.tokens == int((ids != 3).sum())
        assert (positions[ids == 1] == 0).all()  # every document begins at position 0
        assert (batch.labels[ids == 1] == -100).all() and (batch.labels[~batch.mask] == -100).all()
    again = read_rows(settings, "train", 640)
    assert all(torch.equal(x.labels, y.labels) for x, y in zip(batches, again, strict=True))
    few = first_rows(batches, 5)
    assert [len(batch.labels) for batch in few] == [4, 1]


def test_sources_choose_the_text(inputs, tmp_path):
    def tokens(sources, budget=320):
        batches = read_rows(config(inputs, tmp_path / "out", sources=sources), "train", budget)
        return torch.cat([batch.inputs["input_ids"][batch.mask] for batch in batches]).tolist()

    assert tokens(["drugs"]) != tokens(["wikipedia"])
    assert sorted(tokens(["drugs", "wikipedia"])) == sorted(tokens([]))
    assert tokens({"drugs": 1.0}) == tokens({"drugs": 5.0})
    everything = tokens(["drugs"], 10**6)  # more than there is: no document twice
    assert everything.count(1) <= 30


# ---------------------------------------------------------------------------- plan and refusals


def test_plan_does_nothing(inputs, tmp_path):
    settings = config(inputs, tmp_path / "out")
    told = plan(settings)
    assert not list((tmp_path / "out").iterdir())
    assert told.facts["head"] == "NormHead: becomes a plain head" and "parameters" in told.facts
    assert settings.reads() == [str(inputs / "model"), str(inputs / "tokenizer")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "exact", "output_budget": 0.1}, "output_budget: mode: exact does not move outputs"),
        ({"output_budget": 1.0}, "output_budget: 1.0 is not between 0 and 1"),
        ({"output_budget": float("nan")}, "output_budget: nan"),
        ({"loss_budget": 0.0}, "loss_budget: 0.0 is not positive"),
        ({"probes": 1}, "probes: 1 gives no standard error"),
        ({"layers": []}, "layers: name at least one"),
        ({"sources": {"drugs": 0.0}}, "sources.drugs: 0.0 is not a positive share"),
        ({"train_tokens": 10}, "less than one row"),
        ({"row_length": 1}, "nothing to predict"),
        ({"trace_rows": 11}, "trace_rows: 11 is more than"),
        ({"batch_rows": 0}, "batch_rows: 0 is less than 1"),
    ],
)
def test_contradictions_are_refused(inputs, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        config(inputs, tmp_path / "out", **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ["drgus"]}, "'drgus' is not a source .* \\(did you mean 'drugs'"),
        ({"model": "nowhere"}, "nowhere: no such model folder"),
        ({"tokens": "nowhere"}, "nowhere: no token shards"),
    ],
)
def test_missing_inputs_are_refused_by_plan_and_run(inputs, tmp_path, changes, message):
    for act in (plan, run):
        with pytest.raises(UserError, match=message):
            act(config(inputs, tmp_path / "out", **changes))
    assert not list((tmp_path / "out").iterdir())


def test_unknown_layers_are_refused(inputs, tmp_path):
    with pytest.raises(UserError, match=r"did you mean 'model.layers.0.mlp.down_proj'"):
        run(config(inputs, tmp_path / "out", layers=["model.layers.0.mlp.down_porj"]))
    with pytest.raises(UserError, match="NormHead"):
        run(config(inputs, tmp_path / "out", layers=["lm_head"], head="skip"))


def test_the_command_line_takes_sources_in_both_forms():
    values = {"out": "out", "model": "m", "tokens": "t"}
    assert parse_config("flatten", values)[0].sources == []
    assert parse_config("flatten", values | {"sources": ["a", "b"]})[0].sources == ["a", "b"]
    assert parse_config("flatten", values | {"sources": {"a": 0.5}})[0].sources == {"a": 0.5}
    with pytest.raises(UserError):
        parse_config("flatten", values | {"mode": "sideways"})
