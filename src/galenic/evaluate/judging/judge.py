"""A judge of written answers behind an OpenAI-compatible endpoint.

    items --prompt files--> questions --(cache, budget, retries)--> replies --> Verdict(score, reason, raw), one an item
                some in another order too -^                           |
                                           ^--what cannot be used------+

Folder: `answers.jsonl` (every reply, so that nothing is asked twice), `endpoint.json` (how it is held to JSON), and
`unusable.jsonl` (answers without a score, and why).
"""

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from galenic.corpus.synthesis.asking import Watch, ask, in_order
from galenic.corpus.synthesis.budget import Budget, BudgetSpent
from galenic.corpus.synthesis.cache import Cache
from galenic.corpus.synthesis.checks import Problem, json_object
from galenic.corpus.synthesis.client import Client, RequestFailed, count_tokens
from galenic.runtime import UserError, human, read_json, read_jsonl, write_json, write_jsonl

from .config import JudgeConfig
from .prompt_files import Value, read_reply, schema
from .questions import Case, Item, Question, case, score, unturned

FORMS = ("schema", "object", "plain")
"""How an endpoint is held to JSON, the strictest first."""
_PROBE = 'Reply with one JSON object and nothing else: {"ready": "yes"}'
_PROBE_SCHEMA = {
    "type": "object",
    "properties": {"ready": {"type": "string", "enum": ["yes", "no"]}},
    "required": ["ready"],
    "additionalProperties": False,
}
_REFUSALS = (400, 415, 422, 500, 501)  # what endpoints answer to a response_format they do not know
_AHEAD = 2  # questions under way for each request under way: the slowest must not stop the others
_RAW = 2000  # characters of a reply that are kept in a verdict


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the judge said of one answer."""

    score: float | None
    """In [0, 1]; None if there is no usable verdict."""
    reason: str
    """The judge's own, or why there is no score."""
    raw: str
    """The last reply."""
    said: str | None = None
    """The verdict in the judge's word: a letter, a number, `none`; of a pair, `first` is the item's answer."""
    again: str | None = None
    """The same, asked with options or answers in another order; None if that was not asked or cannot be used."""
    blank: bool = False
    """The answer is empty: wrong without asking."""
    shortened: bool = False
    """The judge read the beginning and the end only."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    said: Value | None
    reason: str
    raw: str
    failed: RequestFailed | None = None


class Judge:
    """Judges answers.

    Args:
        config: who is asked, and how.
        folder: where replies are kept; appears with the first of them.

    Raises:
        UserError: there is no folder of prompts.
    """

    def __init__(self, config: JudgeConfig, folder: str | Path) -> None:
        self.config, self.folder = config, Path(folder)
        self._who = f"judge: {config.endpoint.model} at {config.endpoint.base_url}"
        if config.prompts and not Path(config.prompts).is_dir():
            raise UserError(f"judge.prompts: {config.prompts} is no folder")

    def judge(self, items: Sequence[Item], advance: Callable[[int], Any] = lambda _: None) -> list[Verdict]:
        """Returns a verdict of each item.

        Args:
            items: `id`, `prompt` (name of a judge prompt), `question`, `answer`, `truth` (one, or a list of which each
                is right); `options` where the prompt shows them, truth being a letter or its place, from 0; `lower` and
                `upper` where they are not the truth; `other`, the second answer where two are compared; `language`
                (`en`, `zh`) where it is not that of the question.
            advance: told how many items more are done.

        Raises:
            UserError: an item lacks what its prompt shows; the endpoint lets no one in, or nothing that it says can be
                used; the budget is spent.
        """
        cases = [case(self.config, item) for item in items]
        asked = list(dict.fromkeys(question for one in cases for question in one.questions))
        told = 0

        def done(number: int) -> None:
            nonlocal told
            share = len(items) * number // len(asked)
            advance(share - told)
            told = share

        outcomes = asyncio.run(self._all(asked, done)) if asked else {}
        verdicts = [_verdict(one, outcomes) for one in cases]
        self._keep_unusable(cases, verdicts)
        self._require_any(outcomes)
        advance(len(items) - told)
        return verdicts

    def _require_any(self, outcomes: dict[Question, _Outcome]) -> None:
        if outcomes and all(outcome.said is None for outcome in outcomes.values()):
            last = list(outcomes.values())[-1]
            reason = " ".join(last.reason.split())
            raise UserError(
                f"{self._who} gave no usable verdict of {len(outcomes)} answers, all there were so far, at last: "
                f"{reason} ({last.raw[:200]!r}); mend the endpoint, or give another judge or prompt"
            )

    # ------------------------------------------------------------------------ asking

    async def _all(self, asked: list[Question], done: Callable[[int], None]) -> dict[Question, _Outcome]:
        cache = Cache(self.folder / "answers.jsonl")
        try:
            budget = Budget(self.config.budget)
            budget.add((cache.requests, cache.tokens, cache.money))
            async with Client(self.config.endpoint, cache, budget) as client:
                return await self._each(client, asked, done)
        except BudgetSpent:
            raise UserError(
                f"{self._who}: the budget is spent; raise judge.budget and run the same command: what was judged is "
                f"kept in {cache.path}"
            ) from None
        finally:
            cache.close()

    async def _each(
        self, client: Client, asked: list[Question], done: Callable[[int], None]
    ) -> dict[Question, _Outcome]:
        form = await self._form(client)
        watch = Watch(self.config.failed_share, self.config.failed_minimum)
        outcomes: dict[Question, _Outcome] = {}

        async def one(question: Question) -> _Outcome:
            return await self._one(client, form, question)

        async with aclosing(in_order(one, asked, _AHEAD * client.endpoint.concurrency)) as results:
            async for outcome in results:
                outcomes[asked[len(outcomes)]] = outcome
                watch.note(outcome.failed)
                if len(outcomes) == self.config.failed_minimum:
                    self._require_any(outcomes)
                done(len(outcomes))
        return outcomes

    async def _one(self, client: Client, form: str, question: Question) -> _Outcome:
        prompt = question.prompt
        try:
            found, reply = await ask(
                client,
                question.text,
                lambda reply: read_reply(reply, prompt.field, question.values),
                key="judge",
                attempts=self.config.attempts,
                language=prompt.language,
                **self._sampling(form, schema(prompt, question.values)),
            )
        except RequestFailed as error:
            return _Outcome(said=None, reason=f"request failed: {error}", raw="", failed=error)
        if isinstance(found, Problem):
            reason = f"{found.reason}: {found.detail}" if found.detail else found.reason
            return _Outcome(said=None, reason=reason, raw=reply.text[:_RAW])
        return _Outcome(said=found[0], reason=found[1], raw=reply.text[:_RAW])

    async def _form(self, client: Client) -> str:
        """Finds out how the endpoint can be held to JSON, once: what was found is kept."""
        endpoint, place = self.config.endpoint, self.folder / "endpoint.json"
        if endpoint.json_mode or self.config.json != "find-out":
            return "object" if endpoint.json_mode else self.config.json
        who = {"base_url": endpoint.base_url, "model": endpoint.model}
        if place.exists() and (kept := read_json(place)).items() >= who.items() and kept.get("json") in FORMS:
            return kept["json"]
        for form in FORMS:
            messages, sampling = [{"role": "user", "content": _PROBE}], self._sampling(form, _PROBE_SCHEMA)
            try:
                reply = await client.complete(messages, key="judge/form", **sampling)
            except RequestFailed as error:
                if form != "plain" and error.status in _REFUSALS:
                    continue
                raise UserError(f"{self._who} failed ({error}); mend it and run the same command") from None
            if form == "plain" or json_object(reply.text):
                write_json(place, {**who, "json": form})
                return form
        raise AssertionError  # plain is the last

    def _sampling(self, form: str, wanted: dict[str, Any]) -> dict[str, Any]:
        sampling: dict[str, Any] = {} if self.config.endpoint.temperature is None else {"temperature": 0}
        if form == "object":
            sampling["response_format"] = {"type": "json_object"}
        if form == "schema":
            named = {"name": "verdict", "strict": True, "schema": wanted}
            sampling["response_format"] = {"type": "json_schema", "json_schema": named}
        return sampling

    def _keep_unusable(self, cases: Sequence[Case], verdicts: Sequence[Verdict]) -> None:
        """Writes the answers without a score; those of other calls on the folder stay."""
        place, names = self.folder / "unusable.jsonl", {_name(one) for one in cases}
        others = [row for row in read_jsonl(place) if row["name"] not in names] if place.exists() else []
        rows = {
            _name(one): {
                "id": one.item["id"],
                "prompt": one.item["prompt"],
                "reason": verdict.reason,
                "raw": verdict.raw,
                "answer": str(one.item["answer"])[:_RAW],
            }
            for one, verdict in zip(cases, verdicts, strict=True)
            if verdict.score is None
        }
        if rows or place.exists():
            write_jsonl(place, [*others, *({"name": name, **row} for name, row in rows.items())])


def _name(one: Case) -> str:
    """Names an item together with its answer: another model answers the same items."""
    parts = (one.item["prompt"], one.item["id"], one.item["answer"])
    return hashlib.sha256(repr(parts).encode("utf-8", "replace")).hexdigest()[:16]


def _verdict(one: Case, outcomes: dict[Question, _Outcome]) -> Verdict:
    if one.first is None:
        return Verdict(score=0.0, reason="the answer is empty", raw="", blank=True)
    first, again = outcomes[one.first], None
    if one.again is not None and (second := outcomes[one.again].said) is not None:
        again = str(unturned(second, one.first.prompt.pair and not one.turned))
    if first.said is None:
        return Verdict(score=None, reason=first.reason, raw=first.raw, again=again, shortened=one.shortened)
    said = unturned(first.said, one.turned)
    return Verdict(
        score=score(one.first.prompt, said, one.truth),
        reason=first.reason,
        raw=first.raw,
        said=str(said),
        again=again,
        shortened=one.shortened,
    )


def facts(config: JudgeConfig, items: Sequence[Item], answer_tokens: int) -> dict[str, str]:
    """Returns what judging would take, for a plan; asks nobody.

    Args:
        config: who would be asked.
        items: as for `Judge.judge`, answers not yet known left out.
        answer_tokens: of such an answer.

    Raises:
        UserError: as `Judge.judge`, of items that cannot be judged.
    """
    endpoint, prompts, requests = config.endpoint, 0, 0
    for item in items:
        unknown = 0 if item.get("answer") else answer_tokens
        for question in case(config, {**item, "answer": item.get("answer") or "-"}).questions:
            requests += 1
            prompts += count_tokens(question.text) + unknown
    most = requests * endpoint.max_tokens
    money = (prompts * endpoint.price_prompt + most * endpoint.price_completion) / 1e6
    limits = (f"{name} {value:g}" for name, value in vars(config.budget).items() if value is not None)
    return {
        "judge": f"{endpoint.model} at {endpoint.base_url}",
        "judge's requests": f"at most {requests}, without second tries",
        "judge's tokens": f"about {human(prompts)} of prompts, at most {endpoint.max_tokens} of each reply",
        "judge's cost": f"at most {money:.2f} for these requests",
        "judge's budget": ", ".join(limits) or "no limit",
    }
