"""Verb `mixture` (`galenic corpus fit-mixture`): a mixture of sources from many small runs, and how sure it is.

    mixtures around a prior --small runs--> held-out losses --laws--> best mixture --more runs--> verdict

The report fits its ratios with many runs of small models (section 2.1.2) and tells neither form nor figures. Here: the
runs are those of RegMix (arXiv 2407.01492), the laws in `fit.py`; what the laws say of runs they never saw is told, the
bootstrap gives an interval for each share, and the mixture has to beat the prior on seeds the fit never saw. If it does
not, the prior is what `mixture.json` holds.

Each run is a unit of work that leaves one JSON file: a killed verb loses the runs under way.
"""

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from galenic.corpus.engine import map_units
from galenic.corpus.mixtures import fit
from galenic.corpus.mixtures.mixture_config import MixtureConfig
from galenic.corpus.mixtures.mixture_space import Space, draw_mixtures, make_space
from galenic.corpus.mixtures.mixture_table import table_lines, verdict
from galenic.corpus.mixtures.mixture_tree import mixture_preview, shard_sizes
from galenic.corpus.tokens.shards import read_meta, read_shard
from galenic.pretrain.config import (
    ArchitectureConfig,
    CheckpointConfig,
    GuardConfig,
    OptimConfig,
    PhaseConfig,
    PretrainConfig,
)
from galenic.runtime import (
    Plan,
    atomic_path,
    duration,
    human,
    progress,
    read_json,
    write_json,
    write_jsonl,
)

FLOPS_PER_SECOND = 3e10
"""Of one core on networks this small, for the plan's estimate: 33 GFLOP per CPU second measured on a 2-core machine."""


def read_space(config: MixtureConfig) -> Space:
    """Makes the space of a tokenizer folder's shards."""
    heldout = {s: counts["heldout"]["tokens"] for s, counts in read_meta(config.tokenizer)["sources"].items()}
    return make_space(config, shard_sizes(config.tokenizer), heldout)


# ---------------------------------------------------------------------------- one small run


def train_run(unit: dict[str, Any]) -> dict[str, Any]:
    """Trains one small network on one mixture and scores it: a function of the unit alone, on one thread.

    Args:
        unit: `config` (of the verb, JSON values), `domains`, `name`, `mixture` (source -> share), `seed`.

    Returns:
        {"name", "seed", "mixture", "bits_per_byte": domain -> bits}; the same is in OUT/runs/NAME.json.
    """
    import torch

    from galenic.evaluate.bits_per_byte import bits_per_byte
    from galenic.pretrain.checkpoints.checkpoints import Checkpoints
    from galenic.pretrain.data.curriculum import PhaseBatches
    from galenic.pretrain.loop import Silent, Trainer
    from galenic.pretrain.pretrain import build_model
    from galenic.pretrain.schedules import cosine_decay, warmup
    from galenic.pretrain.watching.heldout import heldout_texts
    from galenic.runtime import torch_setup

    values = dict(unit["config"])
    values["architecture"] = ArchitectureConfig(**values["architecture"])
    values["optim"] = OptimConfig(**values["optim"])
    config = MixtureConfig(**values)
    path = Path(config.out) / "runs" / f"{unit['name']}.json"
    if path.exists():
        return read_json(path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster on networks this small, and the same bits for any number of workers
    try:
        torch_setup(unit["seed"])
        phase = PhaseConfig(
            name="run",
            tokens=config.tokens,
            mixture=unit["mixture"],
            context=config.context,
            rows=config.rows,
        )
        small = PretrainConfig(
            out=config.out,
            tokenizer=config.tokenizer,
            phases=[phase],
            architecture=config.architecture,
            optim=config.optim,
            seed=unit["seed"],
        )
        shards = {
            s: read_shard(config.tokenizer, s, "train") for s, share in unit["mixture"].items() if share
        }
        batches = PhaseBatches(small, phase, shards)
        model = build_model(config.architecture, read_meta(config.tokenizer), phase)

        def lr(step: int) -> float:
            if step < config.optim.warmup_steps:
                return config.optim.lr * warmup(step, config.optim.warmup_steps)
            return cosine_decay((step + 1) / batches.steps, start=config.optim.lr, end=config.optim.lr / 20)

        with tempfile.TemporaryDirectory() as work:  # its metrics are not kept
            never = Checkpoints(Path(work), CheckpointConfig(seconds=1e9))
            trainer = Trainer(model, config.optim, GuardConfig(), Path(work), checkpoints=never)
            trainer.train(batches, first=0, last=batches.steps, lr=lr, bar=Silent())
            trainer.finish()
        model.eval()
        bits = {}
        for domain in unit["domains"]:
            texts = heldout_texts(config.tokenizer, domain, config.heldout_tokens)
            bits[domain], _ = bits_per_byte(model, texts, context=config.context, batch_tokens=4096)
    finally:
        torch.set_num_threads(threads)
    row = {"name": unit["name"], "seed": unit["seed"], "mixture": unit["mixture"], "bits_per_byte": bits}
    write_json(path, row)
    return row


def train_all(
    config: MixtureConfig, space: Space, runs: list[tuple[str, int, np.ndarray]], label: str
) -> list[dict[str, Any]]:
    """Trains (name, seed, shares) runs, those not done, and returns their rows in that order."""
    units = [
        {
            "config": asdict(config),
            "domains": space.domains,
            "name": name,
            "seed": seed,
            "mixture": space.mixture(shares),
        }
        for name, seed, shares in runs
    ]
    rows = {}
    with progress(len(units), label, "runs") as bar:
        for row in map_units(train_run, units, workers=config.workers):
            rows[row["name"]] = row
            bar.update(1)
    return [rows[name] for name, _, _ in runs]


# ---------------------------------------------------------------------------- plan


def plan(config: MixtureConfig) -> Plan:
    """What the verb would do: runs, tokens, FLOPs, an estimate of the time, the prior."""
    import torch

    from galenic.pretrain.pretrain import build_model

    space = read_space(config)
    phase = PhaseConfig(
        name="run", tokens=config.tokens, mixture={"x": 1}, context=config.context, rows=config.rows
    )
    with torch.device("meta"):
        model = build_model(config.architecture, read_meta(config.tokenizer), phase)
    total = sum(parameter.numel() for parameter in model.parameters())
    matmul = total - model.get_input_embeddings().weight.numel()
    runs = config.runs + 2 * config.verify_seeds
    # A scored token costs a third of a trained one.
    flops = 6 * matmul * runs * (config.tokens + config.heldout_tokens * len(space.domains) / 3)
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/{name}" for name in ("mixture.json", "fit.json", "runs.jsonl", "mixture.md")],
        facts={
            "parts": f"{len(space.names)} ({', '.join(space.names)})",
            "prior": ", ".join(f"{n} {p:.1%}" for n, p in zip(space.names, space.prior, strict=True)),
            "caps": ", ".join(f"{n} {c:.1%}" for n, c in zip(space.names, space.cap, strict=True) if c < 1)
            or "none",
            "targets": ", ".join(f"{n} {t:.1%}" for n, t in zip(space.domains, space.targets, strict=True)),
            "runs": f"{config.runs} to fit, 2 x {config.verify_seeds} to check, {human(config.tokens)} tokens each",
            "parameters": f"{human(total)} ({human(matmul)} in matrix products)",
            "FLOPs": f"{human(flops)}",
            "time": f"about {duration(flops / FLOPS_PER_SECOND / config.workers)} with {config.workers} "
            f"worker{'s' * (config.workers > 1)}, at {FLOPS_PER_SECOND / 1e9:g} GFLOP/s each",
        },
    )


def preview(config: MixtureConfig) -> list[str]:
    """The prior as a tree: what the final training (or one small run) would read of it."""
    space = read_space(config)
    phase = PhaseConfig(
        name="prior",
        tokens=config.final_tokens or config.tokens,
        mixture=space.mixture(space.prior),
        context=1,
        rows=1,
    )
    return mixture_preview(config.tokenizer, [phase])


# ---------------------------------------------------------------------------- run


def run(config: MixtureConfig) -> None:
    """Trains the small runs, fits, checks, and writes the mixture; goes on after a kill."""
    out = Path(config.out)
    space = read_space(config)

    # ---- many small runs, one seed: they differ in their mixture only
    shares = draw_mixtures(space, config)
    fit_rows = train_all(
        config, space, [(f"fit-{i:03d}", config.seed, row) for i, row in enumerate(shares)], "small runs"
    )
    losses = np.array([[row["bits_per_byte"][d] for d in space.domains] for row in fit_rows])
    result = fit_mixture(space, shares, losses, bootstraps=config.bootstraps, seed=config.seed)

    # ---- the fitted mixture against the prior, on other seeds
    chosen = np.array(list(result["shares"].values()))
    pairs = [
        (f"check-{k:03d}-{name}", config.seed + 1 + k, mixture)
        for k in range(config.verify_seeds)
        for name, mixture in (("prior", space.prior), ("fitted", chosen))
    ]
    rows = train_all(config, space, pairs, "checking runs") if pairs else []
    checked = np.array([[row["bits_per_byte"][d] for d in space.domains] for row in rows])
    result["check"] = check_gain(space, checked[0::2], checked[1::2]) if rows else None
    result["verdict"] = verdict(result)

    # ---- what is written
    better = result["check"] is None or result["check"]["gain"]["low"] > 0
    result["mixture"] = space.mixture(chosen if better else space.prior)
    write_jsonl(out / "runs.jsonl", [*fit_rows, *rows])
    write_json(out / "fit.json", result)
    table = table_lines(space, result)
    with atomic_path(out / "mixture.md") as temporary:
        temporary.write_text("\n".join(table) + "\n", encoding="utf-8")
    write_json(out / "mixture.json", result["mixture"])
    print("\n".join(table))


def fit_mixture(
    space: Space, shares: np.ndarray, losses: np.ndarray, *, bootstraps: int, seed: int
) -> dict[str, Any]:
    """Fits the laws, finds the mixture, says how sure it is: JSON values.

    The mixture is the mean of the best mixtures of the bootstrap's laws: under convex losses (the exponential law's)
    it is at least as good as they are on average, and it does not hang on one run.

    Args:
        space: what is mixed.
        shares: (n, d) mixtures of the runs.
        losses: (n, domains) bits per byte.
        bootstraps: refits.
        seed: of the redrawn losses.
    """
    laws, left_out = fit.fit(shares, losses, space.own)
    predicted = fit.cross_predict(shares, losses, space.own)
    target = losses @ space.targets
    # Laws are not trusted beyond what was tried: no share above the largest one of a run.
    low, high = space.least, np.minimum(space.cap, shares.max(axis=0))
    generator = np.random.Generator(np.random.Philox(key=[seed, 1]))
    fitted = laws.predict(shares)
    best, gains = [], []
    drawn = []
    with progress(bootstraps, "bootstrap", "refits") as bar:
        for _ in range(bootstraps):
            again, _ = fit.fit(shares, fit.wild_losses(fitted, losses - left_out, generator), space.own)
            best.append(fit.minimise(again, space.targets, low, high, shares))
            drawn.append(again)
            bar.update(1)
    chosen = np.mean(best, axis=0)
    both = np.array([space.prior, chosen])
    for again in drawn:
        prior_loss, chosen_loss = again.predict(both) @ space.targets
        gains.append(prior_loss - chosen_loss)
    intervals = np.quantile(best, [0.025, 0.975], axis=0)
    expected = laws.predict(both)
    return {
        "runs": len(shares),
        "parts": list(space.names),
        "prior": dict(zip(space.names, space.prior.tolist(), strict=True)),
        "shares": dict(zip(space.names, chosen.tolist(), strict=True)),
        "intervals": dict(zip(space.names, intervals.T.tolist(), strict=True)),
        "cap": dict(zip(space.names, space.cap.tolist(), strict=True)),
        "targets": dict(zip(space.domains, space.targets.tolist(), strict=True)),
        "predicted_gain": {
            "mean": float((expected[0] - expected[1]) @ space.targets),
            "low": float(np.quantile(gains, 0.025)),
            "high": float(np.quantile(gains, 0.975)),
        },
        "target": {"mean": float(target.mean()), "sd": float(target.std(ddof=1))}
        | fit.agreement(predicted @ space.targets, target),
        "domains": {
            domain: {
                **fit.agreement(predicted[:, i], losses[:, i]),
                "prior": float(expected[0, i]),
                "fitted": float(expected[1, i]),
            }
            for i, domain in enumerate(space.domains)
        },
        "law": "exponential" if laws.exponential[0] else "quadratic",
        "laws": {name: value.tolist() for name, value in asdict(laws).items()},
    }


def check_gain(space: Space, prior: np.ndarray, fitted: np.ndarray) -> dict[str, Any]:
    """Compares runs of the prior and of the fitted mixture, seed by seed; both (seeds, domains) bits per byte."""

    def interval(differences: np.ndarray) -> dict[str, float]:
        return dict(zip(("mean", "low", "high"), fit.paired_interval(differences), strict=True))

    return {
        "seeds": len(prior),
        "prior": float((prior @ space.targets).mean()),
        "fitted": float((fitted @ space.targets).mean()),
        "gain": interval((prior - fitted) @ space.targets),
        "domains": {d: interval(prior[:, i] - fitted[:, i]) for i, d in enumerate(space.domains)},
    }
