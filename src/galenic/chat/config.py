"""What the verb `chat` can be told. Torch-free."""

from dataclasses import dataclass

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is drawn."""

    max_new_tokens: int = 200
    """Longest answer."""
    temperature: float = 0.7
    """0 always takes the likeliest token."""
    top_p: float = 0.9
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1: tokens that were said already become less likely (arXiv 1909.05858, section 4.1)."""
    seed: int | None = 0
    """The same questions give the same answers; None: they need not."""

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more")
        if not 0 < self.repetition_penalty < float("inf"):
            raise UserError(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 changes nothing"
            )


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """Talks to one model in the terminal or on a page."""

    model: str | None = None
    """Model folder; with `url` the model's name there, by default the first that the server lists."""
    url: str | None = None
    """Instead of a folder: address of an OpenAI-compatible server, such as http://127.0.0.1:8000/v1."""
    api_key_env: str = ""
    """Environment variable that holds the key for `url`; none: no key is sent."""
    web: bool = False
    """A page of this machine instead of the terminal."""
    port: int = 0
    """Of the page; 0: a free one."""
    system: str | None = None
    """System message; none takes the chat format's own."""
    max_new_tokens: int = 200
    """Longest answer; never more than half the model's context."""
    temperature: float = 0.7
    """Sampling temperature; 0 always takes the likeliest token."""
    top_p: float = 0.9
    """Sample from the smallest set of tokens that holds this probability."""
    top_k: int = 0
    """Sample from so many of the likeliest tokens; 0: from all."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that were said already become less likely."""
    seed: int = 0
    """Seeds the sampling: the same questions give the same answers."""

    def reads(self) -> list[str]:
        """Inputs, for the plan."""
        return [str(self.url or self.model)]

    def sampling(self) -> Sampling:
        """The options that say how an answer is drawn."""
        return Sampling(
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
        )

    def __post_init__(self) -> None:
        if self.model is None and self.url is None:
            raise UserError("chat: name a model folder, or an address with --url")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise UserError(f"url: {self.url} is no address; one looks like http://127.0.0.1:8000/v1")
        if self.api_key_env and self.url is None:
            raise UserError("api_key_env is the key for url, and no url is given")
        if not 0 <= self.port <= 65535:
            raise UserError(f"port is {self.port}; it must be 1 to 65535, or 0 for a free one")
        if self.port and not self.web:
            raise UserError("port is the page's; it needs --web")
        self.sampling()
