"""Configuration of the verb `synthesise`; torch-free."""

import re
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from galenic.runtime import UserError, nearest

GENRES = ("qa", "question", "article", "paper", "dialogue")
"""What an endpoint makes of a knowledge-graph entity; `question` is the entity as the answer, among its siblings."""
OFFLINE_GENRES = ("choice", "term", "note", "card", "comparison")
"""What templates make of it."""
BY_TEMPLATES = ("long-context", "safety")
"""Pipelines that never ask an endpoint; what they make is for fine-tuning, not for pre-training."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """An OpenAI-compatible endpoint: where it is, how it is asked, how fast, at what price."""

    base_url: str
    """Such as `http://127.0.0.1:8000/v1`; nothing else is ever contacted."""
    model: str
    """The name the endpoint knows the model by."""
    api_key_env: str = ""
    """Environment variable that holds the key; none is sent if empty. The key is never written anywhere."""
    temperature: float | None = 0.7
    """Of sampling; judge and teacher are asked at 0. `null`: not sent, for models that allow none."""
    max_tokens: int = 2048
    """Most tokens of an answer."""
    max_tokens_name: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    """What the endpoint calls this limit."""
    json_mode: bool = False
    """Ask for `response_format: json_object` wherever JSON is wanted."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further fields of each request, such as `top_p` or `chat_template_kwargs`."""
    concurrency: int = 8
    """Requests under way at once."""
    requests_per_minute: float | None = None
    """Pace; no limit by default."""
    tokens_per_minute: float | None = None
    """Pace of prompt and answer tokens together; no limit by default."""
    timeout: float = 180.0
    """Seconds for a whole answer."""
    retries: int = 5
    """Of a request after 429, 5xx, a timeout or a lost connection."""
    backoff: float = 1.0
    """Seconds before the first retry, give or take a half; doubled each time, 60 at most."""
    price_prompt: float = 0.0
    """Money for a million prompt tokens."""
    price_completion: float = 0.0
    """Money for a million answer tokens."""
    environment_proxies: bool = False
    """Go through the proxies that environment variables name."""

    def __post_init__(self) -> None:
        parts = urlsplit(self.base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint.base_url: '{self.base_url}' is not http://... or https://...")
        if parts.username or parts.password or parts.query:
            raise UserError(
                "endpoint.base_url: leave keys out of the address; name their variable in api_key_env"
            )
        if self.api_key_env and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise UserError(
                "endpoint.api_key_env: give the name of an environment variable, not the key itself"
            )
        for name in ("max_tokens", "concurrency", "timeout", "requests_per_minute", "tokens_per_minute"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"endpoint.{name}: {value} is not above 0")
        for name in ("retries", "backoff", "price_prompt", "price_completion", "temperature"):
            if not (getattr(self, name) or 0) >= 0:
                raise UserError(f"endpoint.{name}: {getattr(self, name)} is negative")
        taken = {
            "model",
            "messages",
            "stream",
            "n",
            "temperature",
            "max_tokens",
            "max_completion_tokens",
        } & set(self.extra)
        if taken:
            raise UserError(f"endpoint.extra: {', '.join(sorted(taken))} cannot be set here")


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """One pipeline and the documents it takes."""

    name: Literal[
        "encyclopaedia", "cases", "knowledge-graph", "papers", "online-qa", "long-context", "safety"
    ]
    """Which one."""
    sources: list[str] = field(default_factory=list)
    """Sources it takes; all but synthetic ones by default."""
    categories: list[str] = field(default_factory=list)
    """Categories it takes; all by default."""
    limit: int = 100
    """Most items."""
    points: int = 3
    """Encyclopaedia: most knowledge points, so questions, of one passage."""
    genres: list[str] = field(default_factory=list)
    """Knowledge graph: what each entity becomes; all genres by default."""
    offline: bool = False
    """Knowledge graph: by templates, without an endpoint."""
    tokenizer: str = ""
    """Long context: folder of the tokenizer, or of a model, that counts tokens."""
    tokens: int = 8192
    """Long context: tokens of a conversation, its answer included; never more, and fewer only if texts run out."""
    conversations: str = ""
    """Long context: JSON lines of conversations with the id of their `document`, such as another run's `sft.jsonl`, to
    be asked amid other texts. Default: templates ask for quotations, titles and facts."""

    def __post_init__(self) -> None:
        if self.limit < 1 or self.points < 1:
            raise UserError(f"pipelines: limit and points of '{self.name}' must be 1 or more")
        if self.name != "knowledge-graph" and (self.offline or self.genres):
            raise UserError(f"pipelines: offline and genres belong to knowledge-graph, not to '{self.name}'")
        if self.name != "long-context" and (self.tokenizer or self.conversations):
            raise UserError(
                f"pipelines: tokenizer and conversations belong to long-context, not to '{self.name}'"
            )
        if self.name == "long-context" and not self.tokenizer:
            raise UserError("pipelines: 'long-context' counts tokens; name a tokenizer's or a model's folder")
        if self.tokens < 64:
            raise UserError(f"pipelines: tokens of 'long-context' are {self.tokens}; 64 or more")
        known = OFFLINE_GENRES if self.offline else GENRES
        for genre in self.genres:
            if genre not in known:
                hint = f"{nearest(genre, known)}; there are {', '.join(known)}"
                raise UserError(f"pipelines: unknown genre '{genre}'{hint}")

    @property
    def per_seed(self) -> int:
        """Most items of one seed."""
        if self.name == "knowledge-graph":
            return len(self.every_genre)
        return self.points if self.name == "encyclopaedia" else 1

    @property
    def asks_nobody(self) -> bool:
        """Whether it works without an endpoint."""
        return self.offline or self.name in BY_TEMPLATES

    @property
    def every_genre(self) -> tuple[str, ...]:
        """The genres, defaults filled in."""
        return tuple(self.genres) or (OFFLINE_GENRES if self.offline else GENRES)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What all runs on one cache folder may spend together; no limit by default."""

    requests: int | None = None
    """Requests sent."""
    tokens: int | None = None
    """Prompt and answer tokens."""
    money: float | None = None
    """By the prices of the endpoints."""

    def __post_init__(self) -> None:
        for name in ("requests", "tokens", "money"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"budget.{name}: {value} is not above 0")


@dataclass(frozen=True, kw_only=True)
class SynthesiseConfig:
    """Make questions, reasoning and texts of a corpus, by an endpoint or by templates."""

    out: str
    """Folder for documents.parquet, sft.jsonl, ledger.jsonl and stats.json."""
    pipelines: list[PipelineConfig]
    """What to make; each name once, or once more offline."""
    corpus: str = ""
    """Folder with documents.parquet (a file, or a folder of parts)."""
    documents: list[str] = field(default_factory=list)
    """Instead, or besides: Parquet or JSONL files with columns id, text, source, licence."""
    endpoint: EndpointConfig | None = None
    """Who writes."""
    judge: EndpointConfig | None = None
    """Who judges; the writer by default."""
    pass_score: float = 7.0
    """Least score that passes, of 10."""
    rounds: int = 3
    """Judgements of an item at most: a failing one is revised with the feedback and judged again. 0: no judge."""
    attempts: int = 2
    """Answers to one request for which an unusable one is sent back with what is wrong."""
    passage: int = 8000
    """Characters of a passage of a textbook; of other documents the longest that is taken."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What may be spent."""
    failed_share: float = 0.5
    """Stop when requests of more than this share of the items have failed for good ..."""
    failed_minimum: int = 20
    """... and at least so many items are over."""
    cache: str = ""
    """Folder of answers, so that nothing is paid twice; by default OUT.cache, beside OUT, which `build` may empty."""
    prompts: str = ""
    """Folder whose files replace the prompts, and what is known of safety, of the same name."""
    seed: int = 1
    """Of which documents are taken."""

    def __post_init__(self) -> None:
        if not self.pipelines:
            raise UserError("pipelines: name at least one")
        names = [(pipeline.name, pipeline.offline) for pipeline in self.pipelines]
        for name, offline in names:
            if names.count((name, offline)) > 1:
                raise UserError(f"pipelines: '{name}' stands twice; list its sources and genres together")
        if not (
            self.corpus or self.documents or all(pipeline.name == "safety" for pipeline in self.pipelines)
        ):
            raise UserError("corpus: give a corpus folder, or files as documents")
        if self.endpoint is None and not all(pipeline.asks_nobody for pipeline in self.pipelines):
            raise UserError("endpoint: needed by every pipeline that is not offline")
        if self.attempts < 1 or self.rounds < 0 or self.passage < 200:
            raise UserError("attempts must be 1 or more, rounds 0 or more, passage 200 or more")
        if not 0 <= self.pass_score <= 10 or not 0 <= self.failed_share <= 1:
            raise UserError("pass_score must be in [0, 10], failed_share in [0, 1]")

    def reads(self) -> list[str]:
        """Files and folders the verb reads."""
        others = (
            path for pipeline in self.pipelines for path in (pipeline.tokenizer, pipeline.conversations)
        )
        return [path for path in (self.corpus, *self.documents, self.prompts, *others) if path]

    @property
    def cache_folder(self) -> str:
        """Where answers are kept."""
        return self.cache or f"{self.out.rstrip('/')}.cache"
