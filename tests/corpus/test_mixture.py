import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from galenic.corpus.mixtures import mixture
from galenic.corpus.mixtures.mixture import fit_mixture
from galenic.corpus.mixtures.mixture_config import MixtureConfig
from galenic.corpus.mixtures.mixture_space import draw_mixtures, make_space
from galenic.corpus.mixtures.mixture_table import verdict
from galenic.corpus.mixtures.mixture_tree import Size
from galenic.pretrain.config import ArchitectureConfig, OptimConfig
from galenic.runtime import UserError, read_json, read_jsonl

ARCHITECTURE = ArchitectureConfig(
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=1,
    num_key_value_heads=1,
    num_swa_attention_heads=2,
    num_swa_key_value_heads=1,
    sliding_window=8,
)
OUTPUTS = ("mixture.json", "fit.json", "runs.jsonl", "mixture.md")


def make_config(out, tokenizer, **changes):
    values = {
        "out": str(out),
        "tokenizer": str(tokenizer),
        "runs": 8,
        "tokens": 640,
        "context": 32,
        "rows": 2,
        "heldout_tokens": 100,
        "architecture": ARCHITECTURE,
        "optim": OptimConfig(lr=1e-2, warmup_steps=2),
        "bootstraps": 20,
        "verify_seeds": 2,
    }
    return MixtureConfig(**{**values, **changes})


def size(tokens, group="general"):
    return Size(
        group=group,
        documents=10,
        tokens=tokens,
        bytes=tokens,
        epoch=float(tokens),
        heaviest=1.0,
        fingerprint="",
    )


SIZES = {"web": size(600), "code": size(300), "cases": size(100, "medical"), "empty": size(0)}
HELDOUT = {"web": 50, "code": 50, "cases": 50, "empty": 0}


def space_of(**changes):
    return make_space(make_config("out", "tokenizer", **changes), SIZES, HELDOUT)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory, tokenizer_step):
    out = tmp_path_factory.mktemp("mixture") / "whole"
    mixture.run(make_config(out, tokenizer_step))
    return out


# ---------------------------------------------------------------------------- what is mixed


def test_by_default_every_source_at_its_natural_share_and_every_domain_alike():
    space = space_of()
    assert space.names == ("web", "code", "cases") == space.domains
    assert space.prior == pytest.approx([0.6, 0.3, 0.1]) and space.targets == pytest.approx([1 / 3] * 3)
    assert (space.cap == 1).all()


def test_groups_move_together_at_the_priors_proportions():
    space = space_of(parts="group")
    assert space.names == ("general", "medical")
    assert space.mixture(np.array([0.3, 0.7])) == pytest.approx({"web": 0.2, "code": 0.1, "cases": 0.7})


def test_the_cap_is_ten_readings_of_a_source_in_the_final_training():
    assert space_of(final_tokens=2000).cap == pytest.approx([1, 1, 0.5])
    groups = space_of(
        final_tokens=8000, parts="group", prior={"web": 1, "code": 1, "cases": 1}, most_repeats=20
    )
    assert groups.cap == pytest.approx([1, 0.25])
    with pytest.raises(UserError, match="these sources allow 10k"):
        space_of(final_tokens=20_000)
    with pytest.raises(UserError, match="two parts"):
        space_of(sources=["web"])
    capped = space_of(final_tokens=4000, prior={"web": 1, "cases": 1})
    assert capped.prior == pytest.approx(
        [0.75, 0.25]
    )  # a prior that may not be read is brought below the cap


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ["wep"]}, "unknown source 'wep'"),
        ({"targets": {"cases2": 1}}, "unknown source 'cases2'"),
        ({"targets": {"empty": 1}}, "'empty' has no held-out documents"),
        ({"prior": {"empty": 1, "web": 1}}, "no training documents"),
        ({"sources": ["web", "code"], "prior": {"cases": 1}}, "not among the sources"),
        ({"runs": 3}, "below 8"),
        ({"verify_seeds": 1}, "an interval needs two"),
        ({"tokens": 10}, "one batch"),
        ({"prior": {"web": 0}}, "above 0"),
        ({"flatten": 2.0}, "flatten: 2.0 is not in"),
        ({"keep": -0.1}, "keep: -0.1 is not in"),
    ],
)
def test_mistakes_are_refused_before_any_work(changes, message):
    with pytest.raises(UserError, match=message):
        space_of(**changes)


def test_mixtures_start_at_the_prior_stay_below_the_cap_and_spread_with_the_concentration():
    config = make_config("out", "tokenizer", runs=400, final_tokens=2000)
    space = make_space(config, SIZES, HELDOUT)
    drawn = draw_mixtures(space, config)
    assert drawn[0].tolist() == space.prior.tolist()
    assert (
        drawn.sum(axis=1) == pytest.approx(1.0) and (drawn <= space.cap + 1e-12).all() and (drawn >= 0).all()
    )
    assert (drawn == draw_mixtures(space, config)).all()
    tight = draw_mixtures(space, dataclasses.replace(config, concentration=100.0, flatten=1.0))
    assert tight.mean(axis=0) == pytest.approx(space.prior, abs=0.01)
    assert (tight.std(axis=0) < drawn.std(axis=0) / 3).all()


# ---------------------------------------------------------------------------- the fit


def simulated(space, noise, seed=0):
    """Every domain is helped by its own source, `cases` most."""
    config = make_config("out", "tokenizer", runs=30)
    shares = draw_mixtures(space, config)
    generator = np.random.default_rng(seed)

    def truth(shares):
        return 1.0 + np.exp(-np.array([1.0, 2.0, 4.0]) * shares)

    return shares, truth(shares) + noise * generator.standard_normal(shares.shape), truth


def test_the_fitted_mixture_is_the_best_one_and_its_intervals_hold_it():
    space = space_of()
    shares, losses, truth = simulated(space, noise=0.01)
    result = fit_mixture(space, shares, losses, bootstraps=60, seed=0)
    grid = np.array([(a, b, 1 - a - b) for a in np.arange(0, 1, 0.01) for b in np.arange(0, 1 - a, 0.01)])
    values = truth(grid) @ space.targets
    chosen = np.array(list(result["shares"].values()))
    assert (truth(chosen[None]) @ space.targets)[0] <= values.min() + 0.003
    gain = ((truth(space.prior[None]) - truth(chosen[None])) @ space.targets)[0]
    assert result["predicted_gain"]["low"] <= gain <= result["predicted_gain"]["high"]
    assert result["target"]["r2"] > 0.8 and result["target"]["spearman"] > 0.8
    for name, best in zip(space.names, grid[values.argmin()], strict=True):
        low, high = result["intervals"][name]
        assert low - 0.03 <= best <= high + 0.03


def test_a_part_keeps_what_it_is_told_to_even_if_nothing_speaks_for_it():
    for keep in (0.0, 0.3):
        space = space_of(keep=keep, targets={"cases": 1})
        shares, _, truth = simulated(space, noise=0.0)
        chosen = fit_mixture(space, shares, truth(shares)[:, 2:], bootstraps=20, seed=0)["shares"]
        rest = chosen["web"] + chosen["code"]
        largest = shares[:, 2].max()  # beyond what was tried the laws are not followed
        assert rest == pytest.approx(max(1 - largest, keep * 0.9), abs=0.02)
        assert chosen["web"] >= keep * 0.6 - 1e-9 and chosen["code"] >= keep * 0.3 - 1e-9


def test_noise_gives_wide_intervals_and_no_ranks():
    space = space_of()
    shares, _, _ = simulated(space, noise=0.0)
    losses = np.random.default_rng(5).normal(2.0, 0.1, (30, 3))
    result = fit_mixture(space, shares, losses, bootstraps=40, seed=0)
    assert result["target"]["r2"] < 0.2
    assert max(high - low for low, high in result["intervals"].values()) > 0.4


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.01, 0.03, "beats the prior by"),
        (-0.01, 0.03, "cannot be told from noise"),
        (-0.03, -0.01, "worse than"),
    ],
)
def test_the_verdict_follows_the_interval(low, high, words):
    gain = {"mean": (low + high) / 2, "low": low, "high": high}
    assert words in verdict({"check": {"gain": gain, "seeds": 5}})
    assert "not checked" in verdict({"check": None})


# ---------------------------------------------------------------------------- the verb


def test_outputs_hold_together(fitted):
    assert sorted(p.name for p in fitted.iterdir()) == sorted([*OUTPUTS, "runs"])
    rows = list(read_jsonl(fitted / "runs.jsonl"))
    assert [row["name"] for row in rows][::8] == ["fit-000", "check-000-prior"] and len(rows) == 12
    result, chosen = read_json(fitted / "fit.json"), read_json(fitted / "mixture.json")
    assert sum(chosen.values()) == pytest.approx(1.0) and sum(result["shares"].values()) == pytest.approx(1.0)
    pairs = [(rows[i]["bits_per_byte"], rows[i + 1]["bits_per_byte"]) for i in (8, 10)]
    gains = [sum(prior[d] - fitted[d] for d in prior) / 2 for prior, fitted in pairs]
    assert result["check"]["gain"]["mean"] == pytest.approx(np.mean(gains), abs=1e-12)
    assert rows[8]["seed"] == rows[9]["seed"] != rows[0]["seed"] == rows[1]["seed"]
    proven = result["check"]["gain"]["low"] > 0
    assert chosen == pytest.approx(result["shares"] if proven else result["prior"])
    assert (fitted / "mixture.md").read_text().startswith(result["verdict"])


def test_text_of_a_domain_lowers_its_loss(tokenizer_step, tmp_path):
    config = make_config(tmp_path, tokenizer_step, tokens=6400)
    rows = [
        mixture.train_run(
            {
                "config": dataclasses.asdict(config),
                "domains": ["general", "medical"],
                "name": name,
                "seed": 0,
                "mixture": {"general": float(name == "general"), "medical": float(name == "medical")},
            }
        )["bits_per_byte"]
        for name in ("general", "medical")
    ]
    assert rows[0]["general"] < rows[1]["general"] and rows[1]["medical"] < rows[0]["medical"]


def test_a_killed_fit_goes_on_to_the_same_bytes(fitted, tokenizer_step, tmp_path):
    config = make_config(tmp_path / "killed", tokenizer_step)
    script = (
        "import sys, json; from galenic.corpus.mixtures import mixture; "
        "from galenic.corpus.mixtures.mixture_config import MixtureConfig; "
        "from galenic.pretrain.config import ArchitectureConfig, OptimConfig; v = json.loads(sys.argv[1]); "
        "v['architecture'] = ArchitectureConfig(**v['architecture']); v['optim'] = OptimConfig(**v['optim']); "
        "mixture.run(MixtureConfig(**v))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, json.dumps(dataclasses.asdict(config))],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    runs = Path(config.out) / "runs"
    deadline = time.monotonic() + 120
    while len(list(runs.glob("fit-*.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert len(before) >= 3 and not (Path(config.out) / "mixture.json").exists()
    mixture.run(config)
    after = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert before.items() <= after.items()  # no finished run was trained again
    for name in OUTPUTS:
        assert (Path(config.out) / name).read_bytes() == (fitted / name).read_bytes()


@pytest.mark.slow  # each worker imports torch
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # pipes of Daft's workers
def test_two_workers_give_the_bytes_of_one(fitted, tokenizer_step, tmp_path):
    config = make_config(tmp_path, tokenizer_step, workers=2)
    rows = list(read_jsonl(fitted / "runs.jsonl"))[:4]
    space = mixture.read_space(config)
    runs = [(row["name"], row["seed"], np.array(list(row["mixture"].values()))) for row in rows]
    assert mixture.train_all(config, space, runs, "runs") == rows
    for row in rows:
        name = f"runs/{row['name']}.json"
        assert (tmp_path / name).read_bytes() == (fitted / name).read_bytes()


def test_the_plan_counts_what_would_be_trained(tokenizer_step, tmp_path):
    config = make_config(tmp_path / "x", tokenizer_step)
    facts = mixture.plan(config).facts
    assert facts["runs"] == "8 to fit, 2 x 2 to check, 640 tokens each"
    assert facts["parts"] == "2 (general, medical)" and facts["caps"] == "none"
    drawn = mixture.preview(dataclasses.replace(config, final_tokens=5000))
    assert [line.split()[-7] for line in drawn[1:5]] == ["curriculum", "prior", "general", "general"]
    assert not (tmp_path / "x").exists()
