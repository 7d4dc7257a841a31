"""Judging: a model behind an endpoint says whether written answers are right.

In: items of a benchmark with a model's answers. Out: a verdict each, and how far the judge can be trusted.

    item --prompts/NAME.md--> question --endpoint--> {"reason": ..., "select": "A"} --> Verdict(score, reason, raw)
                                                                                          |
    a rule's verdict, where there is one; the judge's own, asked in another order --------+--> agreement, kappa

`config` is what a user can say, `prompt_files` what a prompt is, `questions` what is asked about an item and what the
reply is worth, `judge` asks, `agreement` measures. Baichuan-M1 (arXiv 2502.12671), section 6 and appendix D, scores all
its medical benchmarks with such a judge.
"""

from typing import Any

NAMES = {
    "Judge": "judge",
    "JudgeConfig": "config",
    "Verdict": "judge",
    "facts": "judge",
    "kappa": "agreement",
    "summary": "agreement",
}
"""What is used from elsewhere -> the file it is in."""


def __getattr__(name: str) -> Any:
    """Imports a file only when something of it is used: configurations are read without its libraries."""
    if name not in NAMES:
        raise AttributeError(f"module 'galenic.evaluate.judging' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"galenic.evaluate.judging.{NAMES[name]}"), name)
