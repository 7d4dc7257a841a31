r"""What the pipelines share: seeds, drafts, prompts, and one way to ask that sends unusable answers back.

seed (document) --Pipeline.works--> works --Pipeline.draft--> Draft(question, answer, reference)
                             \____ Ask ____/   prompt with an ID -> client -> checks -> feedback, again, or Dropped
"""

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from galenic.corpus.synthesis.asking import ask
from galenic.corpus.synthesis.checks import Problem, fields_problem, read_reply, text_problem
from galenic.corpus.synthesis.client import Client, Reply
from galenic.corpus.synthesis.filling import PLACE, fill, require_places
from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Seed:
    """A document, or a passage of one, that something is made of."""

    id: str
    text: str
    source: str
    licence: str
    language: str
    """`en` or `zh`: of prompts and answers."""
    category: str
    department: str
    value: float
    most: int
    """Items it may become."""


@dataclass(frozen=True, kw_only=True)
class Draft:
    """An item before it is judged."""

    question: str
    """Empty where the answer is a text by itself."""
    answer: str
    reference: str
    """What the judge holds it against."""


class Dropped(Exception):
    """An item, or a whole seed, comes to nothing."""

    def __init__(self, reason: str, detail: str = "", text: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail, self.text = reason, detail, text


class Pipeline(Protocol):
    """What a pipeline module offers."""

    async def works(self, seed: Seed, ask: "Ask") -> list[dict[str, Any]]:
        """Returns what there is to make of a seed, `seed.most` at most."""
        ...

    async def draft(self, seed: Seed, work: dict[str, Any], ask: "Ask") -> Draft:
        """Makes one of them."""
        ...


# ---------------------------------------------------------------------------- prompts


def load_prompts(folder: str = "") -> dict[tuple[str, str], dict[str, str]]:
    """Reads the prompts: (pipeline, language) -> step -> text.

    Args:
        folder: its files replace those of the same name here.

    Raises:
        UserError: a file there has another name, or a section other `{places}`.
    """
    own = {path.name: _sections(path) for path in sorted((Path(__file__).parent / "prompts").glob("*.md"))}
    for path in sorted(Path(folder).glob("*.md")) if folder else []:
        if path.name not in own:
            raise UserError(f"{path}: no such prompt file; there are {', '.join(own)}")
        given = _sections(path)
        for step, text in own[path.name].items():
            places = PLACE.findall(text)
            require_places(f"{path}: section '# {step}'", given.get(step, ""), places, places)
        own[path.name] = given
    return {(name.split(".")[0], name.split(".")[1]): steps for name, steps in own.items()}


def _sections(path: Path) -> dict[str, str]:
    parts = re.split(r"^# (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {parts[i].strip(): parts[i + 1].strip() for i in range(1, len(parts), 2)}


# ---------------------------------------------------------------------------- asking


@dataclass(frozen=True, kw_only=True)
class Ask:
    """Asks the steps of one pipeline, in one language, for one item."""

    client: Client
    prompts: Mapping[str, str]
    item: str
    """Id of the item: the part of the cache key that tells equal prompts apart."""
    language: str
    attempts: int
    sampling: Mapping[str, Any]

    def about(self, item: str) -> "Ask":
        """The same for another item."""
        return replace(self, item=item)

    async def json(
        self,
        step: str,
        fields: Mapping[str, Any],
        check: Callable[[dict[str, Any]], Problem | None] = lambda _: None,
        **values: str,
    ) -> dict[str, Any]:
        """Asks for a JSON object with `fields`, `check` having nothing against it.

        Raises:
            Dropped: no usable answer in all attempts.
        """
        return await self._ask(
            step, True, lambda found: fields_problem(found, fields) or check(found), values
        )

    async def text(self, step: str, *, novel: str = "", numbers_of: str = "", **values: str) -> str:
        """Asks for a text.

        Args:
            step: of the prompt file.
            novel: text that the answer must not merely repeat.
            numbers_of: a question whose numbers the answer has to use.
            **values: of the prompt's places.

        Raises:
            Dropped: no usable answer in all attempts.
        """

        def check(text: str) -> Problem | None:
            return text_problem(text, self.language, prompt=novel, question=numbers_of)

        return await self._ask(step, False, check, values)

    async def _ask(
        self, step: str, as_json: bool, check: Callable[[Any], Problem | None], values: Any
    ) -> Any:
        identity = hashlib.sha256(f"{self.item}\n{step}".encode()).hexdigest()[:8]
        prompt = fill(self.prompts[step], {**values, "id": identity})
        sampling = dict(self.sampling)
        if as_json and self.client.endpoint.json_mode:
            sampling["response_format"] = {"type": "json_object"}

        def read(reply: Reply) -> Any:
            content, problem = read_reply(reply.text, reply.finish, identity, as_json)
            return problem or check(content) or content

        key = f"{self.item}/{step}"
        found, reply = await ask(
            self.client, prompt, read, key=key, attempts=self.attempts, language=self.language, **sampling
        )
        if isinstance(found, Problem):
            raise Dropped(found.reason, f"{step}: {found.detail}".rstrip(": "), reply.text)
        return found


def choice_text(question: str, options: list[str]) -> str:
    """Writes a question with its options, lettered."""
    return "\n".join([question, *(f"{'ABCDEFGH'[i]}. {option}" for i, option in enumerate(options))])
