"""Verb `synthesise`: questions, reasoning and texts made of trusted documents.

    documents --select--> seeds --pipeline--> drafts --judge <-> revision--> documents.parquet, sft.jsonl
                                     |                     |
                              answers into the cache    ledger.jsonl (every item that came to nothing, and why)

A killed run continues from its cache: what was answered is not asked again, and the files come out the same.
"""

import asyncio
import sys
import time
from collections.abc import Awaitable, Iterator
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from galenic.corpus.starter.holdout import stable_shuffle
from galenic.corpus.synthesis import cases, encyclopaedia, long_context, online_qa, papers, safety
from galenic.corpus.synthesis.asking import Watch, in_order
from galenic.corpus.synthesis.budget import Budget, BudgetSpent
from galenic.corpus.synthesis.cache import Cache
from galenic.corpus.synthesis.checks import Problem
from galenic.corpus.synthesis.client import Client, RequestFailed, count_tokens
from galenic.corpus.synthesis.knowledge_graph import KnowledgeGraph
from galenic.corpus.synthesis.outcome import (
    FILES,
    Outcome,
    Output,
    Tally,
    dropped,
    id_of,
    made,
    source_of,
    statistics,
)
from galenic.corpus.synthesis.seeds import Selection, select
from galenic.corpus.synthesis.steps import Ask, Draft, Dropped, Pipeline, Seed, load_prompts
from galenic.corpus.synthesis.synthesise_config import SynthesiseConfig
from galenic.corpus.synthesis.templates import offline
from galenic.runtime import Plan, human, progress, write_json

Row = dict[str, Any]
T = TypeVar("T")
_MODULES = {"encyclopaedia": encyclopaedia, "cases": cases, "papers": papers, "online-qa": online_qa}
_LOOK_AHEAD = 4  # seeds under way for each request under way: the slowest must not stop the others


def plan(config: SynthesiseConfig) -> Plan:
    """What the verb would do; reads the documents, asks nobody."""
    facts: dict[str, str] = {}
    requests = tokens = money = 0.0
    judge = config.judge or config.endpoint
    for selection in select(config):
        pipeline, seeds = selection.pipeline, selection.seeds
        label = source_of(pipeline) + (" (templates)" if pipeline.offline else "")
        if pipeline.asks_nobody or config.endpoint is None or judge is None:
            of = {"safety": "what prompts/safety.*.yaml says", "long-context": f"{len(seeds)} texts"}
            entities = f"{len(seeds)} entities"
            facts[label] = f"at most {pipeline.limit} items of {of.get(pipeline.name, entities)}, no request"
            continue
        items = sum(seed.most for seed in seeds)
        asked = sum(_pipeline(selection, config.seed).requests(seed.most) for seed in seeds)
        judged = items if config.rounds else 0
        mean = sum(count_tokens(seed.text) for seed in seeds) / len(seeds)
        prompt = (mean + 300) * asked, (mean + 600) * judged
        facts[label] = f"at most {items} items of {len(seeds)} seeds, about {asked + judged} requests"
        if selection.too_long:
            facts[label] += (
                f"; {len(selection.too_long)} documents are longer than {config.passage} characters"
            )
        requests += asked + judged
        tokens += sum(prompt)
        money += prompt[0] * config.endpoint.price_prompt / 1e6 + prompt[1] * judge.price_prompt / 1e6
        money += asked * config.endpoint.max_tokens * config.endpoint.price_completion / 1e6
        money += judged * judge.max_tokens * judge.price_completion / 1e6
    if config.endpoint is not None and judge is not None:
        facts["endpoint"] = f"{config.endpoint.model} at {config.endpoint.base_url}"
        facts["judge"] = (
            f"{judge.model} at {judge.base_url}, {config.rounds} rounds" if config.rounds else "none"
        )
        facts["requests"] = f"about {human(requests)}, each item judged once, without second tries"
        facts["tokens"] = (
            f"about {human(tokens)} of prompts, at most {config.endpoint.max_tokens} of each answer"
        )
        facts["cost"] = f"at most {money:.2f} for these requests"
        limits = (f"{name} {value:g}" for name, value in vars(config.budget).items() if value is not None)
        facts["budget"] = ", ".join(limits) or "no limit"
        facts["cache"] = f"{config.cache_folder}: what it holds is not asked again"
    return Plan(reads=config.reads(), writes=[f"{config.out}/{name}" for name in FILES], facts=facts)


def run(config: SynthesiseConfig) -> None:
    """Synthesises.

    Raises:
        UserError: bad input; the endpoint does not let us in; too many items fail.
    """
    asyncio.run(_run(config))


# ---------------------------------------------------------------------------- the run


async def _run(config: SynthesiseConfig) -> None:
    started = time.monotonic()
    selections = select(config)
    prompts = load_prompts(config.prompts)
    out, tallies = Path(config.out), [Tally(selection) for selection in selections]
    async with AsyncExitStack() as stack:
        cache = Cache(Path(config.cache_folder) / "answers.jsonl")
        stack.callback(cache.close)
        budget = Budget(config.budget)
        budget.add((cache.requests, cache.tokens, cache.money))
        writer = judge = None
        if config.endpoint is not None:
            writer = await stack.enter_async_context(Client(config.endpoint, cache, budget))
            judge = writer
            if config.judge is not None:
                judge = await stack.enter_async_context(Client(config.judge, cache, budget))
        with (
            Output(out) as output,
            progress(sum(len(s.seeds) for s in selections), "synthesise", "seeds") as bar,
        ):
            watch = Watch(config.failed_share, config.failed_minimum)
            for selection, tally in zip(selections, tallies, strict=True):
                pipeline = selection.pipeline
                for seed in selection.too_long:
                    detail = f"{len(seed.text)} characters, {config.passage} allowed"
                    tally.note(
                        output.write(dropped(pipeline, id_of(pipeline, seed), "too long", detail, seed.text))
                    )
                if pipeline.asks_nobody:
                    for outcome in _by_templates(selection, config):
                        tally.note(output.write(outcome))
                    bar.update(len(selection.seeds))
                    continue
                assert writer is not None and judge is not None
                work = _Work(config, selection, prompts, writer, judge, watch)
                many = _LOOK_AHEAD * writer.endpoint.concurrency
                async with aclosing(in_order(work.seed, selection.seeds, many)) as results:
                    async for outcomes in results:
                        for outcome in outcomes:
                            tally.note(output.write(outcome))
                        bar.update(1, f"{sum(t.passed for t in tallies)} items")
            counts = statistics(tallies, writer, judge, budget, time.monotonic() - started)
        write_json(out / "stats.json", counts)
    _say(counts)


@dataclass(frozen=True)
class _Work:
    """Everything one pipeline needs to make items of seeds."""

    config: SynthesiseConfig
    selection: Selection
    prompts: dict[tuple[str, str], dict[str, str]]
    writer: Client
    judge: Client
    watch: Watch

    async def seed(self, seed: Seed) -> list[Outcome]:
        """Makes all items of a seed."""
        name = id_of(self.selection.pipeline, seed)
        ask = self._ask(self.selection.pipeline.name.replace("-", "_"), seed, name, self.writer)
        module = _pipeline(self.selection, self.config.seed)
        works, outcome = await self._guarded(name, module.works(seed, ask))
        if outcome is not None or works is None:
            return [outcome] if outcome else []

        async def item(numbered: tuple[int, Row]) -> Outcome:
            return await self._item(module, seed, numbered[1], ask.about(f"{name}/{numbered[0]}"))

        async with aclosing(in_order(item, enumerate(works, start=1), len(works) + 1)) as items:
            return [outcome async for outcome in items]

    async def _item(self, module: Pipeline, seed: Seed, work: Row, ask: Ask) -> Outcome:
        async def make() -> Outcome:
            draft, score, number = await self._judged(await module.draft(seed, work, ask), seed, ask)
            return made(self.selection.pipeline, seed, ask.item, draft, score, number)

        passed, outcome = await self._guarded(ask.item, make())
        if passed is not None:
            self.watch.note(None)
            return passed
        assert outcome is not None
        return outcome

    async def _judged(self, draft: Draft, seed: Seed, ask: Ask) -> tuple[Draft, float, int]:
        """Judges and revises until the draft passes; returns it with its score in [0, 1] and the round."""
        if not self.config.rounds:
            return draft, 1.0, 0
        strict = {} if self.judge.endpoint.temperature is None else {"temperature": 0}
        judge = self._ask("judge", seed, ask.item, self.judge, **strict)
        improve = self._ask("judge", seed, ask.item, self.writer)
        told: Row = {}

        def check(found: Row) -> Problem | None:
            low = found["score"] < self.config.pass_score
            if not 0 <= found["score"] <= 10:
                return Problem("missing field", "score (0 to 10)")
            empty = not str(found.get("feedback") or "").strip()
            return Problem("missing field", "feedback") if low and empty else None

        for number in range(1, self.config.rounds + 1):
            values = {"question": draft.question or "-", "answer": draft.answer, "reference": draft.reference}
            at = f"{ask.item}/round-{number}"
            told = await judge.about(at).json("judge", {"score": (int, float)}, check, **values)
            if told["score"] >= self.config.pass_score:
                return draft, told["score"] / 10, number
            if number < self.config.rounds:
                values["feedback"] = str(told["feedback"])
                draft = replace(draft, answer=await improve.about(at).text("improve", **values))
        raise Dropped("not passed", f"score {told['score']:g}: {told['feedback']}", draft.answer)

    def _ask(self, file: str, seed: Seed, item: str, client: Client, **sampling: Any) -> Ask:
        return Ask(
            client=client,
            prompts=self.prompts[file, seed.language],
            item=item,
            language=seed.language,
            attempts=self.config.attempts,
            sampling=sampling,
        )

    async def _guarded(self, name: str, work: Awaitable[T]) -> tuple[T | None, Outcome | None]:
        """Returns what the work returns, or the ledger's row of why it came to nothing."""
        pipeline = self.selection.pipeline
        try:
            return await work, None
        except Dropped as error:
            self.watch.note(None)
            return None, dropped(pipeline, name, error.reason, error.detail, error.text)
        except BudgetSpent:
            return None, dropped(pipeline, name, "budget spent", "", "")
        except RequestFailed as error:
            self.watch.note(error)
            return None, dropped(pipeline, name, "request failed", str(error), "", failed=True)


def _by_templates(selection: Selection, config: SynthesiseConfig) -> Iterator[Outcome]:
    name = selection.pipeline.name
    if name == "safety":
        return safety.outcomes(selection.pipeline, config.prompts, config.seed)
    if name == "long-context":
        return long_context.outcomes(selection, config.seed)
    return _offline(selection, config.seed)


def _offline(selection: Selection, seed: int) -> Iterator[Outcome]:
    """Fills templates until there are enough items; they come in the order of their ids."""
    pipeline, tree = selection.pipeline, selection.tree
    assert tree is not None
    found: list[Outcome] = []
    for one in stable_shuffle(selection.seeds, lambda s: s.id, seed, "offline"):
        for genre in pipeline.every_genre:
            draft = offline(tree, one.id, genre, one.language, seed) if len(found) < pipeline.limit else None
            if draft is not None:
                found.append(made(pipeline, one, f"{id_of(pipeline, one)}/{genre}", draft, 1.0, 0))
    yield from sorted(found, key=lambda outcome: outcome.id)


def _pipeline(selection: Selection, seed: int) -> Any:
    if selection.tree is not None:
        return KnowledgeGraph(selection.tree, selection.pipeline.every_genre, seed)
    return _MODULES[selection.pipeline.name]


def _say(numbers: Row) -> None:
    run, counts = numbers["this_run"], numbers["pipelines"].values()
    passed, items = sum(c["passed"] for c in counts), sum(c["items"] for c in counts)
    rate = run["cache_hit_rate"]
    asked = (
        f", {run['requests_sent']} requests, {rate:.0%} of the answers from the cache"
        if rate is not None
        else ""
    )
    print(f"  synthesise: {passed} of {items} items passed{asked}", file=sys.stderr)
