"""Verb `pretrain`: token shards in, a model folder at each phase's end out.

Source: Baichuan-M1 report, section 4.2: three phases (general; medical basic; medical advanced) under one optimizer
state, warm-up then constant learning rate, cosine decay, longer context and a larger RoPE base in the last phase,
AdamW (0.9, 0.95), weight decay 0.1, clip 1.0, Algorithm 1's gradient guard.
"""

from pathlib import Path
from typing import Any

from galenic.corpus.mixtures.mixture_tree import mixture_preview
from galenic.corpus.tokens.shards import Shard, read_meta, read_shard, special_tokens
from galenic.pretrain.config import ArchitectureConfig, PhaseConfig, PretrainConfig
from galenic.runtime import (
    Plan,
    UserError,
    append_jsonl,
    human,
    human_bytes,
    progress,
    sha256_file,
    torch_setup,
)

# ---------------------------------------------------------------------------- plan


def plan(config: PretrainConfig) -> Plan:
    """What the verb would do: parameters, steps, repeats per source, FLOPs, memory."""
    import torch

    meta = read_meta(config.tokenizer)
    with torch.device("meta"):
        model = build_model(config.architecture, meta, config.phases[0])
    total = sum(parameter.numel() for parameter in model.parameters())
    matmul = total - model.get_input_embeddings().weight.numel()
    tokens = sum(phase.tokens for phase in config.phases)
    facts = {
        "parameters": f"{human(total)} ({human(matmul)} in matrix products)",
        "tokens": human(tokens),
        "FLOPs": f"{human(6 * matmul * tokens)} (6 x parameters x tokens)",
        "state": f"{human_bytes(16 * total)} (weights, gradients, two moments in float32)",
    }
    for phase in config.phases:
        steps = phase.tokens // (phase.context * phase.rows)
        shares = sum(phase.mixture.values())
        repeats = []
        for source, share in phase.mixture.items():
            if source not in meta["sources"]:
                raise UserError(
                    f"phases: '{phase.name}' names source '{source}', which the shards do not have"
                )
            size = meta["sources"][source]["train"]["tokens"]
            repeats.append(f"{source} {phase.tokens * share / shares / max(size, 1):.2g}x")
        end = phase.final_lr if phase.final_lr is not None else config.optim.lr
        facts[phase.name] = (
            f"{steps} steps of {phase.rows} x {phase.context} tokens, RoPE base {phase.rope_theta:g}, "
            f"learning rate {config.optim.lr:g} to {end:g}; {', '.join(repeats)}; "
            f"{_packing(config, phase)}"
        )
    return Plan(
        reads=config.reads(),
        writes=[f"{config.out}/{phase.name}" for phase in config.phases],
        facts=facts,
    )


# ---------------------------------------------------------------------------- model and data


def build_model(architecture: ArchitectureConfig, meta: dict[str, Any], phase: PhaseConfig) -> Any:
    """Makes a randomly initialised network for the shards' vocabulary and a phase's context and RoPE base."""
    from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM

    layers, special = architecture.num_hidden_layers, special_tokens(meta)
    config = BaichuanM1Config(
        vocab_size=meta["vocab_size"],
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=architecture.num_attention_heads,
        num_key_value_heads=architecture.num_key_value_heads,
        num_swa_attention_heads=architecture.num_swa_attention_heads,
        num_swa_key_value_heads=architecture.num_swa_key_value_heads,
        sliding_window=architecture.sliding_window,
        sliding_window_layers=list(range(1, layers, 2)),
        conv_window=architecture.conv_window,
        max_position_embeddings=phase.context,
        rope_theta=phase.rope_theta,
        initializer_range=architecture.initializer_range,
        bos_token_id=special["bos"],
        eos_token_id=special["eos"],
        pad_token_id=special["pad"],
    )
    return BaichuanM1ForCausalLM(config)


def set_context(model: Any, phase: PhaseConfig) -> None:
    """Gives a model the context length and RoPE base of a phase; weights stay."""
    model.config.max_position_embeddings = phase.context
    model.config.rope_theta = phase.rope_theta


def packed_rows(config: PretrainConfig, phase: PhaseConfig, shards: dict[str, Shard]) -> Any:
    """Returns the rows of a phase in training order."""
    from galenic.pretrain.packing import phase_rows

    return phase_rows(
        shards, phase.mixture, tokens=phase.tokens, context=phase.context, seed=config.seed, name=phase.name
    )


def phase_batches(config: PretrainConfig, phase: PhaseConfig, shards: dict[str, Shard]) -> tuple[int, Any]:
    """Returns (steps, step -> batch) of a phase: a pure function of the seed, so a resume needs only the step."""
    from galenic.pretrain.packing import collate

    pad = special_tokens(read_meta(config.tokenizer))["pad"]
    rows = packed_rows(config, phase, shards)
    steps = len(rows) // phase.rows

    def batch(step: int) -> dict[str, Any]:
        chosen = rows[step * phase.rows : (step + 1) * phase.rows]
        laid = []
        for row in chosen:
            documents = []
            for piece in row:
                ids = shards[piece.source].document(piece.document)[piece.start : piece.start + piece.length]
                documents.append((ids, ids))
            laid.append(documents)
        return collate(laid, phase.context, pad)

    return steps, batch


def heldout_bits(model: Any, config: PretrainConfig, context: int) -> dict[str, float]:
    """Scores held-out documents of every source, at most `heldout_tokens` each."""
    from galenic.evaluate.bits_per_byte import bits_per_byte, document

    scores = {}
    sources = read_meta(config.tokenizer)["sources"]
    with progress(len(sources), "held-out bits per byte", "sources") as bar:
        for source in sources:
            shard = read_shard(config.tokenizer, source, "heldout")
            texts, tokens = [], 0
            for index in range(len(shard)):
                ids = shard.document(index)
                tokens += len(ids)
                if texts and tokens > config.heldout_tokens:
                    break
                texts.append(document(ids, int(shard.bytes[index])))
            if texts:
                scores[source], _ = bits_per_byte(model, texts, context=context, batch_tokens=8192)
            bar.update(1)
    return scores


def preview(config: PretrainConfig) -> list[str]:
    """The mixture of all phases as a tree: tokens, documents, repeats and fingerprints of groups and sources."""
    return mixture_preview(config.tokenizer, config.phases)


def _packing(config: PretrainConfig, phase: PhaseConfig) -> str:
    """Packs a phase as training will and tells what that costs."""
    from galenic.pretrain.packing import packing_report

    shards = {source: read_shard(config.tokenizer, source, "train") for source in phase.mixture}
    return str(packing_report(packed_rows(config, phase, shards), phase.context))


# ---------------------------------------------------------------------------- run


def run(config: PretrainConfig) -> None:
    """Trains through the phases; continues where a killed run stopped, to the same bytes."""
    from galenic.model import save
    from galenic.pretrain.loop import Trainer, cosine_decay, warmup_stable_decay

    torch_setup(config.seed)
    out = Path(config.out)
    meta = read_meta(config.tokenizer)
    shards = {}
    for phase in config.phases:
        for source in phase.mixture:
            shards.setdefault(source, read_shard(config.tokenizer, source, "train"))
    if all((out / phase.name).exists() for phase in config.phases):
        return

    model = build_model(config.architecture, meta, config.phases[0])
    trainer = Trainer(model, config.optim, config.guard, out, config.checkpoints.seconds)
    if not trainer.resume():
        trainer.save()  # the seeded start itself, so that a resume never draws weights again

    first = 0
    learned: dict[str, str] = {}  # source -> licence, of what the network has read so far
    for phase in config.phases:
        for source in sorted(source for source, share in phase.mixture.items() if share):
            learned[source] = meta["sources"][source].get("licence", "unknown")
        steps, batches = phase_batches(config, phase, shards)
        last = first + steps
        if trainer.step <= last and not (out / phase.name).exists():
            set_context(model, phase)

            # ---- learning rate: warm-up-stable, and a cosine where the phase names its end
            def lr(step: int, phase: PhaseConfig = phase, steps: int = steps, first: int = first) -> float:
                if phase.final_lr is None:
                    optim = config.optim
                    return warmup_stable_decay(first + step, peak=optim.lr, warmup=optim.warmup_steps)
                return cosine_decay((step + 1) / steps, start=config.optim.lr, end=phase.final_lr)

            with progress(steps * phase.rows * phase.context, phase.name, "tokens") as bar:
                bar.update((trainer.step - first) * phase.rows * phase.context)
                trainer.train(batches, first=first, last=last, lr=lr, bar=bar, phase=phase.name)

            # ---- the phase's end: held-out losses, checkpoint, model folder
            model.eval()
            scored = {row["phase"] for row in trainer.rows() if row["kind"] == "heldout"}
            if phase.name not in scored:
                bits = heldout_bits(model, config, phase.context)
                row = {"kind": "heldout", "phase": phase.name, "step": last, "bits_per_byte": bits}
                append_jsonl(out / "metrics.jsonl", row)
            trainer.save()
            provenance = {
                "verb": "pretrain",
                "phase": phase.name,
                "tokens": trainer.tokens,
                "steps": trainer.step,
                "data": sha256_file(Path(config.tokenizer) / "tokens" / "meta.json"),
                "licences": dict(sorted(learned.items())),
            }
            save(model, out / phase.name, tokenizer=config.tokenizer, provenance=provenance)
        first = last
    trainer.finish()
