"""Configuration of pre-training; torch-free. Fine-tuning shares `OptimConfig`."""

from dataclasses import dataclass, field
from typing import ClassVar, Literal

from galenic.runtime import UserError


@dataclass(frozen=True, kw_only=True)
class ArchitectureConfig:
    """Shape of the network; names as in the official config."""

    hidden_size: int = 256
    """Width."""
    intermediate_size: int = 704
    """Inner width of the gated MLP."""
    num_hidden_layers: int = 6
    """Layers; odd ones attend in a sliding window."""
    num_attention_heads: int = 2
    """Query heads of global layers (the report doubles the head dimension there)."""
    num_key_value_heads: int = 1
    """Key/value heads of global layers."""
    num_swa_attention_heads: int = 4
    """Query heads of sliding-window layers."""
    num_swa_key_value_heads: int = 2
    """Key/value heads of sliding-window layers."""
    sliding_window: int = 128
    """Tokens a sliding-window layer attends to, itself included."""
    conv_window: int = 2
    """Taps of the short convolution on keys and values; 1 switches it off."""
    initializer_range: float = 0.02
    """Standard deviation of the weights at the start."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, with the report's settings (section 4.2)."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon`: orthogonalised momentum for the layers' matrices, AdamW for the rest, both at `lr`."""
    lr: float = 4e-4
    """Peak learning rate."""
    warmup_steps: int = 100
    """Steps of linear warm-up to the peak."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of its first and second moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the layers' matrices; norms, convolution taps, embedding and head are spared."""
    clip: float = 1.0
    """Largest global gradient norm."""

    def __post_init__(self) -> None:
        for name in ("lr", "clip", "eps"):
            if getattr(self, name) <= 0:
                raise UserError(f"optim.{name}: {getattr(self, name)} is not above 0")
        if self.warmup_steps < 0:
            raise UserError(f"optim.warmup_steps: {self.warmup_steps} is negative")


@dataclass(frozen=True, kw_only=True)
class GuardConfig:
    """The report's gradient guard (Algorithm 1)."""

    history: int = 100
    """Accepted norms it looks back on."""
    factor: float = 1.2
    """A step is suspicious above factor * mean + offset."""
    offset: float = 0.1
    """See `factor`."""
    max_skips: int = 1
    """Steps discarded in a row at most; 0 switches the guard off."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """One phase of the curriculum."""

    name: str
    """Name of its model folder: `phase-1-general`."""
    tokens: int
    """Training tokens."""
    mixture: dict[str, float]
    """Source -> share of the phase's tokens; shares are normalised."""
    context: int = 512
    """Tokens in a row."""
    rows: int = 8
    """Rows in a batch, of all devices together."""
    rope_theta: float = 1e5
    """Base of the rotary positions in this phase."""
    lr: float | None = None
    """Learning rate in this phase; not given: `optim.lr`."""
    final_lr: float | None = None
    """Learning rate at the phase's end, reached along `decay`; not given: constant."""
    decay: Literal["cosine", "1-sqrt", "linear"] = "cosine"
    """Way down to `final_lr`: half a cosine (the report's), 1 - sqrt(progress), or a line."""
    order: Literal["shuffled", "easy-to-hard"] = "shuffled"
    """Order of documents: by chance, or in `stages` from easy to hard by quality and difficulty."""
    stages: int = 8
    """Stages of `easy-to-hard`; in each, every source has its share of the mixture."""

    def __post_init__(self) -> None:
        if (
            not self.mixture
            or any(share < 0 for share in self.mixture.values())
            or not sum(self.mixture.values())
        ):
            raise UserError(f"phases: mixture of '{self.name}' needs shares above 0")
        if self.tokens < self.context * self.rows:
            raise UserError(
                f"phases: '{self.name}' has {self.tokens} tokens, fewer than one batch of {self.rows} x {self.context}"
            )
        if "/" in self.name or self.name.startswith("."):
            raise UserError(f"phases: name '{self.name}' is not a folder name")
        for name in ("lr", "final_lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"phases: {name} of '{self.name}' is {value}, not above 0")
        if self.stages < 1:
            raise UserError(f"phases: stages of '{self.name}' is {self.stages}, not above 0")


# ---------------------------------------------------------------------------- how it is computed, not what


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How the work is spread over devices. The processes of the launcher are replicate x shard x context x tensor."""

    replicate: int = 1
    """Whole copies of the model (hybrid sharding): one for each group of machines with a fast network between them."""
    shard: int = 0
    """Devices that share a copy's weights, gradients and moments (FSDP2); 0: all that are left."""
    context: int = 1
    """Devices that share each row: every one takes a part of the tokens and gathers keys and values."""
    tensor: int = 1
    """Devices that share each matrix; attention is split where the key/value heads allow."""
    micro_rows: int = 0
    """Rows a device computes at a time, accumulating gradients; 0: all of its own at once."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What is computed again instead of kept: nothing, all but matrix products and attention, or whole layers."""
    compile: bool = False
    """Compile each layer (torch.compile)."""
    attention: Literal["auto", "sdpa", "flex_attention", "eager"] = "auto"
    """Attention kernel; `auto`: flex on CUDA, whose block masks skip what documents hide, else sdpa."""
    timeout_seconds: float = 600.0
    """Seconds after which a process that waits for another gives up."""

    def __post_init__(self) -> None:
        for name in ("replicate", "context", "tensor"):
            if getattr(self, name) < 1:
                raise UserError(f"parallel.{name}: {getattr(self, name)} is not above 0")
        for name in ("shard", "micro_rows"):
            if getattr(self, name) < 0:
                raise UserError(f"parallel.{name}: {getattr(self, name)} is negative")
        if self.timeout_seconds <= 0:
            raise UserError(f"parallel.timeout_seconds: {self.timeout_seconds} is not above 0")


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the run is written down, so that it can continue."""

    seconds: float = 60.0
    """Seconds between checkpoints."""
    keep: int = 1
    """Newest checkpoints that stay; more survive a disk that loses the newest."""
    keep_phase_ends: bool = False
    """Keep the checkpoint of each phase's end for good, to branch from it."""
    asynchronous: bool = True
    """Write while training goes on, from a copy of the state."""

    def __post_init__(self) -> None:
        if self.seconds < 0:
            raise UserError(f"checkpoints.seconds: {self.seconds} is negative")
        if self.keep < 1:
            raise UserError(f"checkpoints.keep: {self.keep} is not above 0")


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """What is told about the run, and where. `metrics.jsonl` is always written."""

    to: list[Literal["tensorboard", "wandb", "trackio"]] = field(default_factory=list)
    """Where else the same rows go; wandb and trackio stay offline unless their own settings say otherwise."""
    project: str = "galenic"
    """Project under which wandb and trackio show the run."""
    heldout_steps: int = 0
    """Steps between scorings of the held-out documents; 0: at the phases' ends only."""
    peak_tflops: float | None = None
    """What MFU is measured against, TFLOP/s of one device; not given: a matrix product, timed when the run starts."""

    def __post_init__(self) -> None:
        if self.heldout_steps < 0:
            raise UserError(f"watch.heldout_steps: {self.heldout_steps} is negative")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"watch.peak_tflops: {self.peak_tflops} is not above 0")


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The machines a plan is for, where they are not at hand."""

    devices: int
    """Accelerators in all."""
    device: str
    """What they are, for the reader: `H100 SXM`."""
    peak_tflops: float
    """TFLOP/s of one in bfloat16, dense."""
    memory_gb: float
    """Memory of one, in 10^9 bytes."""
    mfu: float = 0.4
    """Share of the peak that training is expected to reach."""


@dataclass(frozen=True, kw_only=True)
class ExpectedCorpus:
    """The token shards a plan is for, where they do not exist yet."""

    vocab_size: int
    """Entries of the tokenizer."""
    tokens: dict[str, float]
    """Source -> training tokens it will have."""


# ---------------------------------------------------------------------------- the verb


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Train a model from scratch through the curriculum's phases."""

    incidental: ClassVar[tuple[str, ...]] = ("parallel", "checkpoints", "watch", "cluster", "expected")
    """Fields that may change when a run continues: they say how, not what."""

    out: str
    """Output folder: a model folder per phase and `metrics.jsonl`."""
    tokenizer: str
    """Folder of the tokenizer step, with its token shards."""
    phases: list[PhaseConfig]
    """The curriculum, in order; one optimizer state goes through all of it."""
    architecture: ArchitectureConfig = field(default_factory=ArchitectureConfig)
    """Shape of the network."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """Optimizer."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """After warm-up, `wsd`: each phase's own rate, constant or decaying; `cosine`: one cosine over all phases, to the
    last one's `final_lr`; `constant`: the peak throughout."""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """Gradient guard."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights, moments and reductions are float32. `auto`: bfloat16 on CUDA."""
    most_repeats: float = 10.0
    """A source read more often than this over all phases is refused (report, section 2.1.2)."""
    heldout_tokens: int = 8000
    """Held-out tokens per source scored at each phase's end."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """How the work is spread over devices."""
    checkpoints: CheckpointConfig = field(default_factory=CheckpointConfig)
    """When the run is written down."""
    watch: WatchConfig = field(default_factory=WatchConfig)
    """What is told about the run."""
    cluster: ClusterConfig | None = None
    """Machines that `--plan` is for; not given: this one."""
    expected: ExpectedCorpus | None = None
    """Token shards that `--plan` is for, while there are none."""
    seed: int = 0
    """Seed of the weights and of the data order."""

    def __post_init__(self) -> None:
        if not self.phases:
            raise UserError("phases: the curriculum needs at least one phase")
        names = [phase.name for phase in self.phases]
        if len(set(names)) < len(names):
            raise UserError(f"phases: names must differ, got {', '.join(names)}")
        if self.schedule == "cosine" and self.phases[-1].final_lr is None:
            raise UserError(f"schedule: cosine ends at the final_lr of '{names[-1]}', which has none")

    def reads(self) -> list[str]:
        """Inputs, for the fingerprint and the plan."""
        return [self.tokenizer]
