"""The verb `report`: reads a run's step folders and writes one HTML page."""

from pathlib import Path
from typing import Any

from galenic.runtime import Plan, UserError, human

from . import (
    alignment,
    benchmarks,
    cards,
    compare,
    cost,
    data,
    failures,
    learning,
    page,
    probes,
    scores,
    sections,
    summary,
    weights,
)
from .config import ReportConfig
from .inputs import Run, read_run, read_runs, resolve


def plan(config: ReportConfig) -> Plan:
    """Says which steps there are to report on."""
    if config.card:
        cards.card(config)
        return Plan(reads=config.reads(), writes=[f"{config.out}/README.md"])
    if config.compare:
        return Plan(reads=config.reads(), writes=[f"{config.out}/report.html"], facts=_chosen(config))
    run = read_run(config)
    states = {
        "corpus": run.corpus.state,
        "tokenizer": run.tokenizer.state,
        "pretrain": run.pretrain.state,
        **{f"expert {name}": step.state for name, step in run.experts.items()},
        **{f"merge {name}": step.state for name, step in run.merges.items()},
        **{f"alignment {name}": step.state for name, step in run.alignment.items()},
        "flatten": run.flatten.state,
        "evaluate": run.evaluate.state,
    }
    return Plan(reads=config.reads(), writes=[f"{config.out}/report.html"], facts=states)


def run(config: ReportConfig) -> None:
    """Writes `report.html`, or the `README.md` of a model card.

    Raises:
        UserError: a step folder holds something else than its step writes.
    """
    if config.card:
        page.write(Path(config.out) / "README.md", cards.card(config))
        return
    html = render_comparison(config) if config.compare else render(config, read_run(config))
    page.write(Path(config.out) / "report.html", html)


def render(config: ReportConfig, run: Run) -> str:
    """Returns the page.

    Raises:
        UserError: see `run`.
    """
    config = resolve(config)
    return page.render("template.html", FILTERS, title=config.title, **_content(config, run))


def render_comparison(config: ReportConfig) -> str:
    """Returns the page that sets models side by side.

    Raises:
        UserError: see `run`; also a model that no run has, or none at all.
    """
    runs = read_runs(config)
    try:
        found = compare.content(config, runs)
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"runs: a step of {', '.join(runs)} is not what its verb writes ({error!r}); "
            "`galenic report RUN` says which"
        ) from error
    return page.render("compare.html", FILTERS, **found)


def _chosen(config: ReportConfig) -> dict[str, str]:
    runs = read_runs(config)
    return {
        "runs": ", ".join(runs),
        "models": ", ".join(model.name for model in compare.choose(config, runs)),
    }


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _fixed(value: float | None, digits: int = 3) -> str:
    """Formats a number with fixed digits, a dash for none."""
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _counted(rows: list[tuple[str, float, str, str]]) -> str:
    """Returns the CSV file of bars, as a link."""
    return data.csv_uri(("name", "number"), [(name, number) for name, number, *_ in rows])


def _measured(rows: list[tuple[Any, ...]]) -> str:
    """Returns the CSV file of scores, as a link."""
    return data.csv_uri(("model", "kind", "right", "low", "high", "questions"), rows)


def _signed(value: float) -> str:
    """Formats points: the sign always, and a true minus."""
    return f"{value:+.1f}".replace("-", "\u2212")


FILTERS = {
    "human": human,
    "spell": sections.spell,
    "size": _size,
    "percent": _percent,
    "fixed": _fixed,
    "slug": data.slug,
    "signed": _signed,
    "counted": _counted,
    "measured": _measured,
}
"""Of the templates: name -> function."""


def _content(config: ReportConfig, run: Run) -> dict[str, Any]:
    """Computes every section; a step that does not hold what it should is named."""
    makers = {
        "corpus": (run.corpus, sections.corpus),
        "tokens": (run.tokenizer, sections.tokens),
        "training": (run.pretrain, learning.training),
        "experts": (None, learning.experts),
        "merging": (None, weights.merging),
        "alignment": (None, alignment.alignment),
        "said": (run.evaluate, alignment.said),
        "flattening": (run.flatten, weights.flattening),
        "evaluation": (run.evaluate, scores.evaluation),
        "shown": (run.evaluate, scores.shown),
        "timings": (None, sections.timings),
        "benchmarks": (run.evaluate, lambda run: benchmarks.benchmarks(_models(run))),
        "probes": (run.evaluate, lambda run: probes.probes(_models(run))),
        "probed": (run.evaluate, _probed),
        "failures": (run.evaluate, lambda run: _failures(run, config.failures)),
        "cost": (None, lambda run: cost.cost(run, config.watts)),
    }
    content: dict[str, Any] = {"recipe": run.recipe}
    for name, (step, make) in makers.items():
        try:
            content[name] = make(run)
        except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
            where = step.name if step else name
            raise UserError(f"{where}: not what its step writes ({error!r}); run that step again") from error
    content["pipeline"] = sections.pipeline(run, content)
    content["tiles"] = summary.tiles(run, content)
    content["summary"] = summary.sentences(run, content)
    return content


def _models(run: Run) -> dict[str, Any]:
    return (run.evaluate.get("results.json") or {}).get("models", {})


def _probed(run: Run) -> list[tuple[str, str, data.Chart]]:
    results = run.evaluate.get("results.json")
    if results is None:
        return []
    name, _ = scores.headline(results)
    return probes.drawings({name: results["models"][name]})


def _failures(run: Run, most: int) -> dict[str, Any] | None:
    results = run.evaluate.get("results.json")
    return failures.failures(run, scores.headline(results)[0], most) if results else None
