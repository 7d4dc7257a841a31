"""What a judge of written answers can be told. Torch-free."""

from dataclasses import dataclass, field
from typing import Literal

from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model behind an OpenAI-compatible endpoint that says whether answers are right, asked at temperature 0."""

    endpoint: EndpointConfig
    """Where it is, how it is asked, how fast, at what price."""
    prompts: str = ""
    """Folder of one's own prompt files: NAME.md, or NAME.en.md and NAME.zh.md; they come before the package's."""
    json: Literal["find-out", "schema", "object", "plain"] = "find-out"
    """How the endpoint is held to JSON: by a schema, to any object, or by the prompt alone. `find-out`: the strictest
    of these that it accepts, tried once and kept; `endpoint.json_mode` means `object`."""
    attempts: int = 2
    """Replies about one answer for which an unusable one is sent back with what is wrong."""
    answer_characters: int = 12000
    """Of a longer answer the judge reads the beginning and the end, which is where conclusions stand."""
    swapped_share: float = 0.1
    """Share of the items with options, or with two answers, that are asked about once more in another order."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What all runs on one folder may spend together."""
    failed_share: float = 0.5
    """Stop when requests about more than this share of the items have failed for good ..."""
    failed_minimum: int = 20
    """... and at least so many items are over; or when the first so many replies are of no use."""
    seed: int = 0
    """Of which items are asked about twice, and which of two answers comes first."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.prompts] if self.prompts else []

    def __post_init__(self) -> None:
        for name in ("swapped_share", "failed_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"judge.{name}: {getattr(self, name)} is not in [0, 1]")
        for name, least in (("attempts", 1), ("failed_minimum", 1), ("answer_characters", 200)):
            if getattr(self, name) < least:
                raise UserError(f"judge.{name}: {getattr(self, name)} is below {least}")
        if self.json != "find-out" and self.endpoint.json_mode:
            raise UserError(f"judge: json is {self.json} and endpoint.json_mode is on; give one of them")
        if "response_format" in self.endpoint.extra:
            raise UserError("judge: leave response_format out of endpoint.extra; `json` sets it")
