"""Configuration of alignment: what the methods share, then one class a method; torch-free."""

import math
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from galenic.corpus.synthesis.synthesise_config import BudgetConfig, EndpointConfig
from galenic.evaluate.config import model_parts
from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig, ParallelConfig, WatchConfig
from galenic.runtime import UserError


def _require(
    section: str, config: object, *, above: tuple[str, ...] = (), least: tuple[tuple[str, float], ...] = ()
) -> None:
    """Refuses numbers that mean nothing: those of `above` must be above 0, those of `least` not below a bound."""
    for name in above:
        if not getattr(config, name) > 0:
            raise UserError(f"{section}{name}: {getattr(config, name)} is not above 0")
    for name, bound in least:
        if getattr(config, name) < bound:
            raise UserError(f"{section}{name}: {getattr(config, name)} is below {bound:g}")


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """A LoRA adapter (PEFT) instead of the whole model."""

    rank: int = 8
    """Columns of the thin factors."""
    alpha: float = 16
    """The update is multiplied by alpha / rank."""
    targets: list[str] = field(default_factory=list)
    """Ends of the names of the layers that are adapted. Default: all linear layers but the head."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"lora: rank {self.rank} and alpha {self.alpha:g} must be above 0")


@dataclass(frozen=True, kw_only=True)
class ShiftConfig:
    """Optimum shifting (arXiv 2405.14111) in the course of training; see `galenic.flatten`."""

    layers: list[str] = field(default_factory=lambda: ["*"])
    """Names of linear layers, with `*` for any text. `*` takes every layer that can be shifted."""
    every: int = 100
    """Steps from one shift to the next."""
    start: float = 0.5
    """Share of the steps that are done before the first one."""
    batches: int = 8
    """Last training batches whose inputs decide a shift."""
    method: Literal["gram", "qr"] = "gram"
    """How inputs are summed up: `gram`, or `qr` where the rank must be exact."""
    output_budget: float | None = None
    """How far a layer's outputs may move on these batches, relative to their norm; 0 is the exact shift. Default: 0.01,
    without a rank."""
    rank: int | None = None
    """Instead, truncation to so many directions of the inputs."""
    anchored: bool = False
    """Towards the model that fine-tuning starts from instead of zero: an expert's task vector gets shorter, never
    longer."""

    def __post_init__(self) -> None:
        if not self.layers:
            raise UserError("shift.layers: name at least one; '*' takes all")
        for name in ("every", "batches"):
            if getattr(self, name) < 1:
                raise UserError(f"shift.{name}: {getattr(self, name)} is less than 1")
        if not 0 <= self.start <= 1:
            raise UserError(f"shift.start: {self.start} is not in [0, 1]")
        if self.output_budget is not None and not 0 <= self.output_budget < 1:
            raise UserError(f"shift.output_budget: {self.output_budget} is not in [0, 1)")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"shift.rank: {self.rank} keeps nothing; at least 1")
        if self.rank is not None and self.output_budget:
            raise UserError("shift: give output_budget or rank; each decides the whole shift")

    def steps(self, total: int) -> range:
        """The steps of a run of `total` after which layers are shifted."""
        return range(max(1, math.ceil(self.start * total)), total + 1, self.every)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every method is told."""

    incidental: ClassVar[tuple[str, ...]] = ("parallel", "checkpoints", "watch")
    """Fields that may change when a run continues: they say how, not what."""

    out: str
    """Output folder: `model/` (with `lora`: an adapter of the model) and `metrics.jsonl`."""
    model: str
    """Model folder to start from: ours, or of any causal language model that transformers knows."""
    optim: OptimConfig = field(default_factory=lambda: OptimConfig(lr=2e-5, warmup_steps=10))
    """Optimizer; the report starts from the learning rate at which annealing ended, 2e-5."""
    final_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    lora: LoraConfig | None = None
    """Train an adapter; needs PEFT (`pip install 'galenic[lora]'`). Default: the whole model is trained."""
    guard: GuardConfig = field(default_factory=lambda: GuardConfig(max_skips=0))
    """Gradient guard; the report uses it in early pre-training only, so it is off here."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights, moments and reductions are float32. `auto`: bfloat16 on CUDA."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the work is spread over devices; rows by FSDP2, `context` and `tensor` stay 1."""
    checkpoints: CheckpointConfig = field(default_factory=lambda: CheckpointConfig(asynchronous=False))
    """When the run is written down."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is told about the run."""
    seed: int = 0
    """Seed of the data order and of what is sampled."""

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model]


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """The model that the policy is held against; with `lora` and no `model`, the base under the adapter."""

    model: str | None = None
    """Its folder; of the same tokenizer. Default: the model that training starts from."""
    offload: bool = False
    """Keep it in the CPU's memory and bring it to the device for each batch."""


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """When a run has gone astray: it stops with advice, and the last checkpoint stays."""

    kl: float | None = None
    """Largest mean KL divergence from the reference, nats a token, over `steps`. Default: no limit."""
    length: float | None = None
    """Largest mean length of what is sampled, in shares of the most it may be, over `steps`. Default: no limit."""
    constant: int = 0
    """Steps in a row in which every reward may be the same: nothing can be learnt then. 0: any number."""
    steps: int = 10
    """Steps over which means are taken."""

    def __post_init__(self) -> None:
        _require("limits.", self, least=(("constant", 0), ("steps", 1)))
        for name in ("kl", "length"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"limits.{name}: {getattr(self, name)} is not above 0")


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is sampled from the policy."""

    max_new_tokens: int = 128
    """Tokens at most; what has not ended by then is cut and counts as such."""
    temperature: float = 1.0
    """Of the distribution that is sampled. Other than 1, the objectives are those of the tempered distribution."""
    batch: int = 64
    """Sequences sampled at a time."""
    endpoint: EndpointConfig | None = None
    """An OpenAI-compatible server (vLLM, `transformers serve`) that samples instead of this process."""

    def __post_init__(self) -> None:
        _require("sampling.", self, above=("temperature",), least=(("max_new_tokens", 1), ("batch", 1)))


@dataclass(frozen=True, kw_only=True)
class SftConfig(TrainingConfig):
    """Fine-tune an expert on conversations, loss on answers only."""

    conversations: str
    """JSON lines of {"messages": [{"role", "content"}, ...]} to train on; `category` in a line is what losses are told
    by."""
    heldout: str | None = None
    """JSON lines of conversations whose answers are scored before and after."""
    tokens: int | None = None
    """Training tokens, questions and answers together; the conversations are repeated as needed. Default: 300,000,
    without rounds."""
    rounds: int | None = None
    """Instead, times that each conversation is read; the report's five rounds may mean this."""
    context: int = 512
    """Tokens in a row; longer conversations are left out and named in `ledger.jsonl`."""
    bad_lines: Literal["refuse", "skip"] = "refuse"
    """What becomes of a line of `conversations` that is none: the run ends, or it is left out and named in
    `ledger.jsonl`. One of `heldout` always ends the run."""
    rows: int = 8
    """Rows in a batch."""
    shift: ShiftConfig | None = None
    """Shift linear layers to smaller norm while training. Default: none is shifted."""
    heldout_conversations: int = 200
    """Held-out conversations scored at most."""

    def __post_init__(self) -> None:
        if self.tokens is not None and self.rounds is not None:
            raise UserError("tokens, rounds: give one of them; each says how long to train")
        if self.rounds is not None and self.rounds < 1:
            raise UserError(f"rounds: {self.rounds} is below 1")
        if self.rounds is None and self.budget < self.context * self.rows:
            raise UserError(f"tokens: {self.budget} is fewer than one batch of {self.rows} x {self.context}")
        if self.lora and self.shift:
            raise UserError("shift: an adapter's layers are not the model's; leave out shift or lora")

    @property
    def budget(self) -> int:
        """Training tokens; 0 where `rounds` decides."""
        return 0 if self.rounds is not None else 300_000 if self.tokens is None else self.tokens

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model, self.conversations, *([self.heldout] if self.heldout else [])]


@dataclass(frozen=True, kw_only=True)
class PairsConfig(TrainingConfig):
    """What the methods are told that learn from preference pairs."""

    pairs: str
    """JSON lines of {"prompt", "chosen", "rejected"}; prompt is text or messages, a line may have a "margin"."""
    heldout: str | None = None
    """Pairs that are measured before and after. Default: `heldout_share` of `pairs`."""
    heldout_share: float = 0.05
    """Share of the pairs that is set aside where no file is given."""
    heldout_pairs: int = 1000
    """Held-out pairs measured at most."""
    epochs: float = 1.0
    """Times that each pair is read."""
    rows: int = 16
    """Pairs in a batch."""
    context: int = 512
    """Tokens at most in a prompt with its answer; longer ones are left out and counted."""

    def __post_init__(self) -> None:
        _require("", self, above=("epochs",), least=(("rows", 1), ("heldout_pairs", 1), ("context", 2)))
        if not 0 < self.heldout_share < 1:
            raise UserError(f"heldout_share: {self.heldout_share} is not in (0, 1)")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.model, self.pairs, *([self.heldout] if self.heldout else [])]


@dataclass(frozen=True, kw_only=True)
class RewardConfig(PairsConfig):
    """Train a reward model on preference pairs (Bradley-Terry)."""

    centre: float = 0.01
    """Weight of (r_chosen + r_rejected)^2, which keeps rewards around 0 (arXiv 2312.09244)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("", self, least=(("centre", 0),))


@dataclass(frozen=True, kw_only=True)
class EloConfig(TrainingConfig):
    """Exploratory Log-likelihood Optimization (Baichuan-M1 report, section 5.3, eq. 1-3)."""

    tasks: str
    """JSON lines of {"prompt", "answer"} or {"question", "options", "answer"}; see `galenic.align.data.tasks`."""
    heldout: str | None = None
    """Tasks on which the answers' likelihood and accuracy are measured before and after."""
    steps: int = 100
    """Steps; each samples anew."""
    rows: int = 8
    """Questions in a batch."""
    samples: int = 4
    """Chains of thought sampled for each question; at least 2, as each one's baseline is the mean of the others."""
    context: int = 512
    """Tokens at most in a question, its chain and its answer; questions without room for `sampling` are left out."""
    marker: str = "\nAnswer:"
    """Text with which a chain ends and an answer begins."""
    answer_term: bool = False
    """Add the derivative of the answer's likelihood itself, which the printed gradient (eq. 3) leaves out."""
    reduction: Literal["sum", "mean"] = "sum"
    """Of the log-likelihood over the answer's tokens; the report does not say."""
    kl: float = 0.0
    """Weight of the KL divergence of chains from the reference; the report names none."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How chains are sampled."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What `kl` is measured against."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """When to stop."""
    heldout_tasks: int = 200
    """Held-out tasks measured at most."""

    def __post_init__(self) -> None:
        _require("", self, least=(("steps", 1), ("rows", 1), ("samples", 2), ("context", 2), ("kl", 0)))
        if not self.marker:
            raise UserError("marker: is empty; without it no one can tell a chain from its answer")
        if self.marker != self.marker.rstrip():
            raise UserError(
                f"marker: {self.marker!r} ends in white space, which tokenizers join with the answer"
            )

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        others = (self.heldout, self.reference.model)
        return [self.model, self.tasks, *(path for path in others if path)]


@dataclass(frozen=True, kw_only=True)
class TdpoConfig(PairsConfig):
    """Token-level direct preference optimization (arXiv 2404.11999)."""

    method: Literal["tdpo1", "tdpo2"] = "tdpo2"
    """Which of the two losses; the report does not say. `alpha: 0` with tdpo2 is DPO."""
    beta: float = 0.1
    """Scale of the implicit reward (the authors' code)."""
    alpha: float = 0.5
    """Weight of the difference of sequential KL divergences in tdpo2 (the authors' code)."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What the policy is held against."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """When to stop."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require("", self, above=("beta",), least=(("alpha", 0),))

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [*super().reads(), *([self.reference.model] if self.reference.model else [])]


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """A model behind an endpoint that gives points for answers; it is asked at temperature 0."""

    endpoint: EndpointConfig
    """Where it is and how it is asked."""
    prompt: str | None = None
    """File of one's own prompt with the places {question}, {answer}, {points} and {truth}, the true answer. Default:
    the package's."""
    points: int = 10
    """Most points of an answer; what counts is the share of them."""

    def __post_init__(self) -> None:
        _require("rewards.judge.", self, least=(("points", 1),))


@dataclass(frozen=True, kw_only=True)
class RewardsConfig:
    """What an answer is worth: rules where the right answer is known, a model where it is not."""

    model: str | None = None
    """Folder of a reward model (verb `reward`), or `base+adapter`."""
    judge: JudgeConfig | None = None
    """A model behind an OpenAI-compatible endpoint."""
    weights: dict[str, dict[str, float]] = field(default_factory=dict)
    """Domain of a task (`*`: any other) -> weights of `rule`, `model` and `judge` in its reward. Default: rule where a
    task has one, else model, where none is named judge."""
    tolerance: float = 0.01
    """Relative error that a number may have, where a task does not say."""
    cut_off: float = 0.0
    """Reward of an answer that did not end, or that the reward model's chat format cannot hold."""
    code_seconds: float = 2.0
    """Processor time that the tests of an answer in code may take."""
    code_memory_mb: int = 512
    """Memory they may take."""

    def __post_init__(self) -> None:
        _require("rewards.", self, above=("code_seconds",), least=(("tolerance", 0), ("code_memory_mb", 32)))
        for domain, parts in self.weights.items():
            unknown = set(parts) - {"rule", "model", "judge"}
            if unknown:
                raise UserError(
                    f"rewards.weights: '{domain}' weighs {', '.join(sorted(unknown))}; known: rule, model, judge"
                )


@dataclass(frozen=True, kw_only=True)
class PpoConfig(TrainingConfig):
    """Proximal policy optimization (arXiv 1707.06347) with a per-token KL penalty (arXiv 2203.02155)."""

    incidental: ClassVar[tuple[str, ...]] = (*TrainingConfig.incidental, "budget")

    tasks: str
    """JSON lines of {"prompt", "answer", ...}; see `galenic.align.data.tasks`."""
    heldout: str | None = None
    """Tasks whose rewards are measured before and after."""
    rewards: RewardsConfig = field(default_factory=RewardsConfig)
    """What an answer is worth."""
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    """What requests to the judge may cost, those before a restart included; each process counts its own."""
    rollouts: int = 50
    """Times that answers are sampled."""
    rows: int = 32
    """Answers sampled each time."""
    epochs: int = 2
    """Times that each batch of answers is learnt from."""
    minibatches: int = 2
    """Steps in such an epoch."""
    context: int = 512
    """Tokens at most in a prompt and its answer."""
    kl: float = 0.05
    """Weight of the per-token penalty log(policy / reference) in the reward; the report names none."""
    kl_target: float | None = None
    """Adapt `kl` so that the divergence stays near so many nats an answer (arXiv 1909.08593). Default: fixed."""
    clip: float = 0.2
    """How far the ratio of new to old probability may leave 1 and still gain."""
    value_clip: float = 0.2
    """How far a value may leave the old one and still gain, in units of reward: more, where rewards are far from 1."""
    value_weight: float = 0.1
    """Weight of the value's loss."""
    entropy_weight: float = 0.0
    """Weight of the policy's entropy as a bonus."""
    discount: float = 1.0
    """Gamma of generalised advantage estimation (arXiv 1506.02438)."""
    lam: float = 0.95
    """Lambda of generalised advantage estimation."""
    whiten_rewards: bool = False
    """Divide rewards by their standard deviation in each batch of rollouts; advantages always are whitened."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How answers are sampled."""
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    """What the KL penalty is measured against."""
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    """When to stop."""
    heldout_tasks: int = 200
    """Held-out tasks measured at most."""

    def __post_init__(self) -> None:
        least = (("rollouts", 1), ("rows", 2), ("epochs", 1), ("minibatches", 1), ("context", 2), ("kl", 0))
        _require(
            "", self, above=("clip", "value_clip"), least=(*least, ("value_weight", 0), ("entropy_weight", 0))
        )
        for name in ("discount", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name}: {getattr(self, name)} is not in [0, 1]")
        if self.rows % self.minibatches:
            raise UserError(f"rows: {self.rows} answers do not divide into {self.minibatches} minibatches")
        if self.kl_target is not None and not (self.kl_target > 0 and self.kl > 0):
            raise UserError(
                f"kl_target: {self.kl_target} and kl {self.kl}, which is adapted to it, must be above 0"
            )
        if self.sampling.max_new_tokens >= self.context:
            raise UserError(
                f"context: {self.context} tokens leave no room for a prompt beside sampling.max_new_tokens "
                f"{self.sampling.max_new_tokens}"
            )

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        prompt = self.rewards.judge.prompt if self.rewards.judge else None
        scorer = model_parts(self.rewards.model) if self.rewards.model else []
        others = (self.heldout, self.reference.model, *scorer, prompt)
        return [self.model, self.tasks, *(path for path in others if path)]
