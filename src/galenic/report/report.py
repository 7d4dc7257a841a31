"""The verb `report`: reads a run's step folders and writes one HTML page."""

from pathlib import Path
from typing import Any

from galenic.runtime import Plan, UserError, human

from . import alignment, learning, page, scores, sections, summary, weights
from .config import ReportConfig
from .inputs import Run, read_run


def plan(config: ReportConfig) -> Plan:
    """Says which steps there are to report on."""
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
    """Writes `report.html`.

    Raises:
        UserError: a step folder holds something else than its step writes.
    """
    page.write(Path(config.out) / "report.html", render(config, read_run(config)))


def render(config: ReportConfig, run: Run) -> str:
    """Returns the page.

    Raises:
        UserError: see `run`.
    """
    filters = {
        "human": human,
        "spell": sections.spell,
        "size": _size,
        "percent": _percent,
        "fixed": _fixed,
    }
    return page.render("template.html", filters, title=config.title, **_content(run))


def _size(value: float) -> str:
    return f"{value / 1e9:.2f} GB"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%"


def _fixed(value: float | None, digits: int = 3) -> str:
    """Formats a number with fixed digits, a dash for none."""
    return "\u2013" if value is None else f"{value:.{digits}f}"


def _content(run: Run) -> dict[str, Any]:
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
