"""The experiment of alignment: each chain of stages goes on from one that is there, and stages are the recipe's."""

import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
alignment = pytest.importorskip("alignment")

from galenic.runtime import read_jsonl, write_jsonl  # noqa: E402


def test_every_unit_needs_what_it_goes_on_from():
    units = {
        name: (task, tuple(stages), seed, needs)
        for name, task, stages, seed, needs in alignment.plan_units(2)
    }
    for task, stages, seed, needs in units.values():
        needed = [units[name] for name in needs]
        assert all(other[0] == "train" and other[2] == seed for other in needed)
        chains = [other[1] for other in needed]
        if task == "train":
            assert chains == [
                *([stages[:-1]] if stages[1:] else []),
                *([alignment.REWARD] if stages[-1] == "ppo" else []),
            ]
        elif task == "measure":  # held against SFT of the same seed
            assert chains == [chain for chain in (stages, ("sft",)) if chain]
        else:
            assert task == "answers" and chains == [chain for chain in (stages,) if chain]
    trained = [(stages, seed) for task, stages, seed, _ in units.values() if task == "train"]
    measured = [(stages, seed) for task, stages, seed, _ in units.values() if task == "measure"]
    assert len(set(trained)) == len(trained) and trained[0][0] == ("sft",)  # what most others wait for
    assert set(measured) == {((), 0), *((arm, seed) for arm in alignment.ARMS if arm for seed in range(2))}


def test_the_arms_are_the_chain_and_each_stage_left_out():
    assert alignment.CHAIN in alignment.ARMS
    for stage in alignment.CHAIN:
        left = [other for other in alignment.CHAIN if other != stage]
        if stage == "sft":
            left[0] = "elo-30"
        assert tuple(left) in alignment.ARMS
    for one, other in alignment.COMPARED:
        assert one in alignment.ARMS and other in alignment.ARMS


@pytest.mark.parametrize("stage", list(alignment.STAGES))
def test_a_stage_is_the_recipes_step_with_its_changes(stage, tmp_path):
    recipes = ROOT / "recipes" / "starter"
    changes = {"model": "here", "out": str(tmp_path), "seed": 3}
    verb, config = alignment.configuration(stage, recipes, Path("/run"), changes)
    step, variant = alignment.STAGES[stage]
    written = yaml.safe_load((recipes / f"{step}.yaml").read_text())
    assert step.split("-")[1] == verb and config.model == "here" and config.seed == 3
    assert config.optim.lr == float(written["optim"]["lr"])
    assert all(getattr(config, name) == value for name, value in variant.items())
    assert all(not path.startswith("RUN/") for path in config.reads())
    assert any(path.startswith("/run/10-corpus/") for path in config.reads())


def test_chains_are_cut_out_of_answers(tmp_path):
    def row(text):
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text}]}

    path = tmp_path / "10-corpus" / "sft" / "alignment.train.jsonl"
    path.parent.mkdir(parents=True)
    write_jsonl(path, [row("8 + 5 = 13\nAnswer: 13 mg"), row("Aspirin")])
    found = list(read_jsonl(alignment._without_chains(tmp_path, tmp_path)))
    assert [r["messages"][1]["content"] for r in found] == ["13 mg", "Aspirin"]


def test_curves_hold_what_every_step_tells():
    rows = [
        {"kind": "train", "loss": 2.0, "reward": 1.0},
        {"kind": "heldout"},
        {"kind": "train", "loss": 1.0},
    ]
    assert alignment.curves(rows) == {"loss": [2.0, 1.0]}


@pytest.fixture
def results():
    """Two seeds of every chain; each stage adds one to every measure, the second seed a little more."""
    found = {}
    for _, task, stages, seed, _ in alignment.plan_units(2):
        measures = {name: len(stages) * (1 + 0.01 * seed) for name, *_ in alignment.COLUMNS}
        right = [float(place < len(stages) + seed) for place in range(4)]
        told = {
            "curves": {"reward": [-2.0 + seed, -1.0], "accuracy": [0.1, 0.2 + seed / 10]},
            "heldout": [{"kind": "heldout", "step": 5, "accuracy": 0.7 + seed / 10, "loss": 0.6}],
        }
        arm = found.setdefault(alignment.named(stages), {})
        arm.setdefault(task, []).append(
            {"train": told, "measure": measures, "answers": {"right": right}}[task]
        )
    return found


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_tables_tell_means_and_paired_differences(results):
    lines = list(alignment.arms_table(results))
    assert len(lines) == 2 + len(alignment.ARMS)
    base, sft = cells(lines[2]), cells(lines[3])
    assert base[:2] == ["base", "0.0"] and sft[0] == "sft" and sft[1].startswith("100.5 \u00b1 ")
    lines = list(alignment.differences_table(results))
    assert len(lines) == 2 + len(alignment.COMPARED)
    first = cells(lines[2])
    assert first[0] == "sft against base" and first[1].startswith("**+100.5 \u00b1 ")
    same = cells(lines[2 + alignment.COMPARED.index((("sft",), ("direct",)))])
    assert same[1] == "+0.0 \u00b1 0.0"  # as long, so no difference, which is not bold
    lines = list(alignment.tasks_table(results))
    row = "sft > elo against sft", "2", "0", "+25.0 +25.0", "0.5"
    assert cells(lines[2]) == list(row)  # one more of four, two seeds
    (row,) = list(alignment.rewards_table(results))[2:]
    assert cells(row)[1].startswith("0.750 \u00b1 ")


def test_the_figure_is_drawn_and_the_same_again(results, tmp_path):
    pytest.importorskip("matplotlib")
    for name in ("a.svg", "b.svg"):
        alignment.draw(results, tmp_path / name)
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text() and "sft &gt; elo" in drawn
