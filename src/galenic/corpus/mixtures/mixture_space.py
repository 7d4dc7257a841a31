"""What a mixture is made of: the parts that a fit moves, their bounds, and the mixtures that small runs try."""

from dataclasses import dataclass

import numpy as np

from galenic.corpus.mixtures import fit
from galenic.corpus.mixtures.mixture_config import MixtureConfig
from galenic.corpus.mixtures.mixture_tree import Size
from galenic.runtime import UserError, human, nearest


@dataclass(frozen=True, kw_only=True)
class Space:
    """The parts that the fit moves, their bounds, and what is made small."""

    names: tuple[str, ...]
    """Of the d parts: sources or groups."""
    within: dict[str, dict[str, float]]
    """Part -> source -> share of the part."""
    prior: np.ndarray
    """(d,)."""
    least: np.ndarray
    """(d,) least shares of the fitted mixture."""
    cap: np.ndarray
    """(d,) greatest shares."""
    domains: tuple[str, ...]
    """Held-out domains that are scored."""
    targets: np.ndarray
    """(domains,) weights, of sum 1."""

    @property
    def own(self) -> list[int]:
        """For each domain the part that holds its own text, -1 if none does."""
        return [
            next((i for i, name in enumerate(self.names) if domain in self.within[name]), -1)
            for domain in self.domains
        ]

    def mixture(self, shares: np.ndarray) -> dict[str, float]:
        """Returns source -> share."""
        return {
            source: float(share) * inner
            for name, share in zip(self.names, shares, strict=True)
            for source, inner in self.within[name].items()
        }


def make_space(config: MixtureConfig, sizes: dict[str, Size], heldout: dict[str, int]) -> Space:
    """Works out what is mixed.

    Args:
        config: of the verb.
        sizes: source -> what its training shard holds.
        heldout: source -> held-out tokens.

    Raises:
        UserError: unknown or empty sources, fewer than two parts, or a cap that leaves no mixture.
    """
    for name in ("sources", "prior", "targets"):
        for source in getattr(config, name):
            if source not in sizes:
                raise UserError(
                    f"{name}: unknown source '{source}'{nearest(source, sizes)}; known: {', '.join(sizes)}"
                )
    mixed = [s for s in sizes if sizes[s].tokens and s in (config.sources or config.prior or sizes)]
    for source in [*config.sources, *config.prior]:
        if source not in mixed:
            empty = not sizes[source].tokens
            raise UserError(
                f"prior.{source}: {'has no training documents' if empty else 'is not among the sources'}"
            )
    mass = {s: config.prior.get(s, 0.0) if config.prior else sizes[s].tokens for s in mixed}
    if not sum(mass.values()):
        raise UserError("prior: none of the sources has a share above 0")
    groups: dict[str, list[str]] = {}
    for source in mixed:
        groups.setdefault(source if config.parts == "source" else sizes[source].group, []).append(source)
    within, prior, cap = {}, [], []
    for name, members in groups.items():
        total = sum(mass[s] for s in members)
        if config.parts == "group" and not total:
            continue  # no proportions are known
        inner = {s: mass[s] / total if total else 1.0 for s in members}
        within[name] = inner
        prior.append(total / sum(mass.values()))
        reach = (config.most_repeats * sizes[s].tokens / share for s, share in inner.items() if share)
        cap.append(min(1.0, min(reach) / config.final_tokens) if config.final_tokens else 1.0)
    if len(within) < 2:
        raise UserError(f"sources: a mixture needs at least two parts, got {', '.join(within) or 'none'}")
    if sum(cap) < 1:
        raise UserError(
            f"final_tokens: {human(config.final_tokens)} cannot be had with at most {config.most_repeats:g} "
            f"repetitions; these sources allow {human(config.final_tokens * sum(cap))}"
        )
    start, most = np.array(prior), np.array(cap)
    if (start > most).any():
        start = fit.project(
            start, np.zeros(len(most)), most
        )  # a prior that the repetitions forbid is no rival
    domains = tuple(s for s in sizes if heldout.get(s) and (not config.targets or config.targets.get(s)))
    for source in config.targets:
        if config.targets[source] and not heldout.get(source):
            raise UserError(f"targets: '{source}' has no held-out documents")
    weights = np.array([config.targets.get(s, 0.0) if config.targets else 1.0 for s in domains])
    if not domains:
        raise UserError(
            f"{config.tokenizer}: no held-out documents to score; see the corpus step's heldout_share"
        )
    return Space(
        names=tuple(within),
        within=within,
        prior=start,
        least=config.keep * start,
        cap=most,
        domains=domains,
        targets=weights / weights.sum(),
    )


def draw_mixtures(space: Space, config: MixtureConfig) -> np.ndarray:
    """Draws the runs' mixtures, (runs, d): the prior, then a Dirichlet distribution around the flattened prior.

    Draws above the cap are brought back to the nearest mixture below it. Source: RegMix (arXiv 2407.01492).
    """
    mean = space.prior**config.flatten if config.flatten else np.ones(len(space.prior))
    alpha = np.maximum(config.concentration * len(mean) * mean / mean.sum(), 1e-3)
    drawn = np.random.Generator(np.random.Philox(key=config.seed)).dirichlet(alpha, config.runs - 1)
    return np.array([space.prior, *(fit.project(row, np.zeros(len(mean)), space.cap) for row in drawn)])
