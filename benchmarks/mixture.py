"""What stands behind docs/corpus-mixtures.md: which laws predict small runs they never saw, and how equal shares do.

    python benchmarks/mixture.py TOKENIZER_FOLDER MIXTURE_FOLDER [--tokens 60000 --rows 2]

MIXTURE_FOLDER is the output of `galenic corpus fit-mixture`; tokens and rows are those of its runs.
"""

import argparse
import dataclasses
import tempfile

import numpy as np

from galenic.corpus.mixtures import fit
from galenic.corpus.mixtures.mixture import train_run
from galenic.corpus.mixtures.mixture_config import MixtureConfig
from galenic.runtime import read_json, read_jsonl

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("tokenizer")
parser.add_argument("mixture")
parser.add_argument("--tokens", type=int, default=60_000)
parser.add_argument("--rows", type=int, default=2)
args = parser.parse_args()

result = read_json(f"{args.mixture}/fit.json")
rows = list(read_jsonl(f"{args.mixture}/runs.jsonl"))
fits = [row for row in rows if row["name"].startswith("fit-")]
parts, domains = list(fits[0]["mixture"]), list(result["targets"])
targets = np.array([result["targets"][domain] for domain in domains])
own = [parts.index(domain) if domain in parts else -1 for domain in domains]


def losses_of(chosen):
    return np.array([[row["bits_per_byte"][domain] for domain in domains] for row in chosen])


shares, losses = np.array([[row["mixture"][part] for part in parts] for row in fits]), losses_of(fits)
print("| runs | law | own part | error | R2 | Spearman | mean R2 of domains |\n|---|---|---|---|---|---|---|")
for n in (len(fits) // 2, len(fits)):
    for law in ("exponential", "quadratic"):
        for name, indices in (("like others", [-1] * len(own)), ("freer", own)):
            predicted = np.array(
                [
                    fit.fit(shares[:n][keep], losses[:n][keep], indices, [law])[0].predict(shares[i : i + 1])[
                        0
                    ]
                    for i, keep in enumerate(~np.eye(n, dtype=bool))
                ]
            )
            found = fit.agreement(predicted @ targets, losses[:n] @ targets)
            mean = np.mean([fit.agreement(predicted[:, i], losses[:n, i])["r2"] for i in range(len(own))])
            figures = f"{found['rmse']:.4f} | {found['r2']:.2f} | {found['spearman']:.2f} | {mean:.2f}"
            print(f"| {n} | {law} | {name} | {figures} |")

# ---- equal shares on the seeds of the check
checks = [row for row in rows if row["name"].endswith("-fitted")]
with tempfile.TemporaryDirectory() as out:
    config = MixtureConfig(out=out, tokenizer=args.tokenizer, tokens=args.tokens, rows=args.rows)
    equal = [
        train_run(
            {
                "config": dataclasses.asdict(config),
                "domains": domains,
                "name": f"equal-{row['seed']}",
                "seed": row["seed"],
                "mixture": dict.fromkeys(parts, 1 / len(parts)),
            }
        )
        for row in checks
    ]
priors = losses_of([row for row in rows if row["name"].endswith("-prior")]) @ targets
for name, worse, better in (
    ("equal shares over the prior", priors, losses_of(equal) @ targets),
    ("the fitted mixture over equal shares", losses_of(equal) @ targets, losses_of(checks) @ targets),
):
    mean, low, high = fit.paired_interval(worse - better)
    print(f"\nGain of {name}: {mean:+.4f} bits per byte (95% {low:+.4f} to {high:+.4f}, {len(checks)} pairs)")
