"""Time and memory of a step of each method of alignment, and of pre-training, at 1.5B parameters on one CUDA device.

    python benchmarks/alignment_cuda.py --out OUT                  sft, reward, elo, tdpo, ppo: an adapter and whole
    python benchmarks/alignment_cuda.py --out OUT --pretrain       tokens/s, MFU, memory against the plan
    python benchmarks/alignment_cuda.py --out OUT --size tiny      a network of nothing, on a CPU too: that it runs

Each method is its verb: configuration, batches, objective and loop are those of `galenic sft` and so on. Only what is
not a step is left out: the model is drawn in memory instead of read, nothing is written at the end. The architecture is
that of recipes/m1-1.5b/30-pretrain.yaml with random weights, which hardly ever end a text: what is sampled has the most
tokens it may have. Products are in bfloat16, weights, gradients and moments in float32 (the verbs' default on CUDA).

A step of ppo is a rollout: answers are sampled, scored (policy, reference, values) and learnt from in 2 x 2
minibatches. Its rewards are rules', there is no reward model beside it. Tokens learnt from are places of the batches,
padding included, as often as they are learnt from.

A case that does not fit is taken again with whole layers recomputed, one that fails again with `sdpa` attention.
Seconds include everything from asking for a batch to the optimizer's end, the GPU's work too: median (least to most).
`peak GB` is the most that tensors took in these steps, `reserved GB` what torch's allocator held for them.
"""

import argparse
import importlib
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cuda_runs
import yaml
from cuda_runs import UNCONNECTED, UNTRIED, Cases, Peak, short, timed

import galenic.runtime  # before torch

RECIPE = Path(__file__).parents[1] / "recipes" / "m1-1.5b" / "30-pretrain.yaml"
METHODS = ("sft", "reward", "elo", "tdpo", "ppo")
BF16_PEAK = 989e12
"""FLOP/s of an H100 SXM or an H200 in bfloat16, dense, as the maker tells."""

SIZES: dict[str, dict[str, Any]] = {
    "1.5b": {
        "sft": {"rows": 8, "context": 1024},
        "pairs": {"rows": 8, "context": 512},
        "elo": {"rows": 4, "samples": 8, "context": 512},
        "ppo": {"rows": 16, "context": 512, "minibatches": 2, "epochs": 2},
        "sampled": 128,
        "steps": {"sft": (2, 5), "reward": (2, 5), "tdpo": (2, 5), "elo": (1, 2), "ppo": (1, 2)},
        "pretrain": ((4, 4096, 1024), (1, 32768, 32768)),
    },
    "tiny": {
        "sft": {"rows": 2, "context": 256},
        "pairs": {"rows": 2, "context": 128},
        "elo": {"rows": 2, "samples": 2, "context": 128},
        "ppo": {"rows": 4, "context": 128, "minibatches": 2, "epochs": 2},
        "sampled": 8,
        "steps": {"sft": (1, 2), "reward": (1, 2), "tdpo": (1, 2), "elo": (1, 2), "ppo": (1, 2)},
        "pretrain": ((2, 128, 32), (1, 256, 256)),
    },
}
"""`steps`: those that warm up and those that are timed, of ppo rollouts; `pretrain`: rows, context, document."""


# ---------------------------------------------------------------------------- the model, in memory


def shape(size: str) -> dict[str, Any]:
    """Architecture and vocabulary."""
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))
    found = {**recipe["architecture"], "vocab_size": int(recipe["expected"]["vocab_size"])}
    if size == "tiny":
        found |= {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "vocab_size": 2048}
        found |= {"num_attention_heads": 2, "num_key_value_heads": 1, "sliding_window": 64}
        found |= {"num_swa_attention_heads": 4, "num_swa_key_value_heads": 2}
    return found


class Weights:
    """One draw of the weights, made on the device, kept on the CPU; every case begins with it."""

    def __init__(self, size: str) -> None:
        self.shape, self.state = shape(size), {}

    def config(self, context: int) -> Any:
        from galenic.model import BaichuanM1Config

        return BaichuanM1Config(**self.shape, max_position_embeddings=context, rope_theta=1e5)

    def model(self, context: int = 8192) -> Any:
        """Makes a model of them on the CPU, as `load` makes one of a folder."""
        import torch

        from galenic.model import BaichuanM1ForCausalLM

        place, config = galenic.runtime.device(), self.config(context)
        if not self.state:
            torch.manual_seed(0)
            with torch.device(place):
                drawn = BaichuanM1ForCausalLM(config)
            self.state = {name: tensor.cpu() for name, tensor in drawn.state_dict().items()}
            del drawn
        with torch.device("meta"):
            model = BaichuanM1ForCausalLM._from_config(
                config, dtype=torch.float32, attn_implementation="sdpa"
            )
        # Training on a GPU leaves what lies on the CPU as it is.
        state = self.state if place == "cuda" else {n: t.clone() for n, t in self.state.items()}
        model.load_state_dict(state, assign=True)
        return model.eval()

    def parameters(self) -> int:
        """How many there are."""
        from galenic.pretrain.planning.budget import parameters

        return parameters(self.config(8192)).total


# ---------------------------------------------------------------------------- what is trained on


class Inputs:
    """Synthetic questions and answers in a folder, and a tokenizer for them: a token for each word."""

    WORDS = tuple(
        "the patient child adult has had mild severe acute chronic fever cough pain rash asthma anaemia diabetes of in "
        "with without for since three seven days weeks lung heart kidney liver skin blood pressure glucose dose drug "
        "daily treatment with antibiotic insulin aspirin risk test shows raised low normal which is most likely now "
        "first next step diagnosis consider then review after before until improve worsen clinic hospital".split()
    )

    def __init__(self, folder: Path, size: str) -> None:
        from galenic.corpus.tokens.tokenizer import save_tokenizer, train_bpe

        self.folder, self.random = folder, random.Random(0)
        texts = [f"So\nAnswer: {self.text(40)}\nQuestion: {self.text(40)}?" for _ in range(300)]
        tokenizer = train_bpe(texts, vocab_size=1024, character_coverage=1.0, max_characters=200)
        self.model = folder / "base" / "model"
        self.model.mkdir(parents=True)
        save_tokenizer(tokenizer, self.model, "")
        room = SIZES[size]["pairs"]["context"]
        self.conversations = self.lines(
            "conversations", ({"messages": self.turns(20, room // 3)} for _ in range(400))
        )
        longest = room - 60
        self.pairs, self.heldout = (
            self.lines(
                name,
                (
                    {"prompt": self.text(30), "chosen": self.text(longest), "rejected": self.text(longest)}
                    for _ in range(count)
                ),
            )
            for name, count in (("pairs", 64), ("heldout", 2))
        )
        self.tasks = self.lines(
            "tasks", ({"prompt": self.text(40), "answer": self.text(3)} for _ in range(64))
        )

    def text(self, words: int) -> str:
        """So many words."""
        return " ".join(self.random.choices(self.WORDS, k=words))

    def turns(self, asked: int, answered: int) -> list[dict[str, str]]:
        """A question and its answer, about as long."""
        answer = self.text(self.random.randint(answered // 2, answered))
        return [
            {"role": "user", "content": self.text(asked)},
            {"role": "assistant", "content": answer},
        ]

    def lines(self, name: str, rows: Any) -> str:
        """Writes JSON lines."""
        path = self.folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)


def configuration(method: str, inputs: Inputs, size: str, lora: bool, out: str, **more: Any) -> Any:
    """Returns the configuration of a verb: its defaults, but for sizes and what would write."""
    from galenic.align import config as configs
    from galenic.pretrain.config import CheckpointConfig, OptimConfig

    sizes, (warm, count) = SIZES[size], SIZES[size]["steps"][method]
    steps = warm + count
    common: dict[str, Any] = {
        "out": out,
        "model": str(inputs.model),
        "optim": OptimConfig(lr=1e-5, warmup_steps=1),
        "lora": configs.LoraConfig(rank=16, alpha=32) if lora else None,
        "precision": "bfloat16",  # on a CPU too: the same path
        "checkpoints": CheckpointConfig(seconds=1e9, asynchronous=False),
        **more,
    }
    if method == "sft":
        rows, context = sizes["sft"]["rows"], sizes["sft"]["context"]
        tokens = steps * rows * context
        return configs.SftConfig(
            conversations=inputs.conversations, tokens=tokens, rows=rows, context=context, **common
        )
    if method in ("reward", "tdpo"):
        rows = sizes["pairs"]["rows"]
        made = configs.RewardConfig if method == "reward" else configs.TdpoConfig
        epochs = (steps * rows + 0.5) / 64
        return made(pairs=inputs.pairs, heldout=inputs.heldout, epochs=epochs, **sizes["pairs"], **common)
    sampling = configs.SamplingConfig(max_new_tokens=sizes["sampled"])
    if method == "elo":
        return configs.EloConfig(tasks=inputs.tasks, steps=steps, sampling=sampling, **sizes["elo"], **common)
    return configs.PpoConfig(tasks=inputs.tasks, rollouts=steps, sampling=sampling, **sizes["ppo"], **common)


# ---------------------------------------------------------------------------- a step


class Steps:
    """What is remembered of each step of the loop; the most memory is that of the steps after the first `warm`."""

    def __init__(self, warm: int) -> None:
        self.warm, self.rows, self.now = warm, [], {}
        self.peak: Peak | None = None

    def begin(self, parts: list[dict[str, Any]]) -> None:
        """Looks at a step's batch."""
        self.now |= {
            "shape": " + ".join("x".join(map(str, part["input_ids"].shape)) for part in parts),
            "tokens": sum(part["input_ids"].numel() for part in parts),
        }

    def add(self, name: str, seconds: float) -> None:
        """Counts seconds of a part of the step."""
        self.now[name] = self.now.get(name, 0.0) + seconds

    def end(self, seconds: float, row: Mapping[str, Any]) -> None:
        """Finishes a step."""
        self.rows.append({**self.now, "seconds": seconds, "loss": row["loss"], "length": row.get("length")})
        self.now = {}
        if len(self.rows) == self.warm:
            self.peak = Peak()

    def watched(self) -> ExitStack:
        """Watches the loop while it is entered."""
        from galenic.align.rollouts.experience import Experiences
        from galenic.align.rollouts.sampling import Sampler
        from galenic.pretrain.loop import Trainer

        stack = ExitStack()
        for owner, name, told in (
            (Trainer, "train_step", self.end),
            (Trainer, "_micro_batches", lambda _, parts: self.begin(parts)),
            (Sampler, "__call__", lambda seconds, found: self.sampled(seconds, found)),
            (Experiences, "_sampled", lambda seconds, _: self.add("rollout", seconds)),
        ):
            stack.enter_context(timed(owner, name, told))
        return stack

    def sampled(self, seconds: float, found: Sequence[Sequence[Any]]) -> None:
        """Counts what was sampled."""
        self.add("sampling", seconds)
        self.add("new tokens", sum(len(rollout.ids) for copies in found for rollout in copies))


def span(values: Sequence[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def align(
    method: str, weights: Weights, inputs: Inputs, size: str, lora: bool, **more: Any
) -> dict[str, Any]:
    """Runs a verb and returns what a line of the table says."""
    from galenic.align.training import Run
    from galenic.model import foreign
    from galenic.model.folder import as_scorer

    warm, count = SIZES[size]["steps"][method]
    each = SIZES[size]["ppo"]["minibatches"] * SIZES[size]["ppo"]["epochs"] if method == "ppo" else 1
    steps, trained = Steps(warm * each), []

    def unwritten(run: Any, *_: Any, **__: Any) -> None:
        trained.append(sum(p.numel() for p in run.model.parameters() if p.requires_grad))
        run.trainer.watch.close()

    with tempfile.TemporaryDirectory() as out, ExitStack() as stack:
        stack.enter_context(patch.object(foreign, "load_any", lambda *_, **__: weights.model()))
        stack.enter_context(patch.object(foreign, "load_scorer", lambda *_, **__: as_scorer(weights.model())))
        stack.enter_context(patch.object(Run, "write", unwritten))
        stack.enter_context(steps.watched())
        config = configuration(method, inputs, size, lora, out, **more)
        importlib.import_module(f"galenic.align.{method}").run(config)
    # ---- a step of ppo is a rollout with all that is learnt from it
    rows = steps.rows[warm * each :]
    groups = [rows[first : first + each] for first in range(0, len(rows), each)]
    assert len(groups) == count, f"{len(groups)} steps were timed, not {count}"

    def sums(name: str) -> list[float]:
        return [sum(row.get(name, 0.0) for row in group) for group in groups]

    seconds, sampling, new = sums("seconds"), sums("sampling"), sums("new tokens")
    outside = sums("rollout") if method == "ppo" else sampling
    learning = [a - b for a, b in zip(seconds, outside, strict=True)]
    tokens = sums("tokens")
    told: dict[str, Any] = {
        "trained": f"{trained[0]:,}",
        "batch": f"{each} x ({groups[-1][-1]['shape']})" if each > 1 else groups[-1][-1]["shape"],
        "tokens learnt from": round(statistics.mean(tokens)),
        "s a step": span(seconds),
        "of it learning": span(learning),
        "tokens/s learning": round(statistics.mean(tokens) / statistics.median(learning)),
    }
    if any(sampling):
        told |= {
            "of it sampling": span(sampling),
            "new tokens": round(statistics.mean(new)),
            "new tokens/s": round(statistics.mean(new) / statistics.median(sampling)),
        }
    if method == "ppo":
        told["of it scoring"] = span([a - b for a, b in zip(outside, sampling, strict=True)])
    assert steps.peak is not None
    return {**told, **steps.peak.told(), "last loss": f"{rows[-1]['loss']:.4f}"}


def alignment(cases: Cases, given: argparse.Namespace) -> None:
    """Measures all methods, adapters first."""
    from galenic.align.config import ReferenceConfig
    from galenic.pretrain.config import ParallelConfig

    weights = Weights(given.size)
    with tempfile.TemporaryDirectory() as folder:
        inputs = Inputs(Path(folder), given.size)
        for lora in (True, False):
            for method in given.methods:
                name = f"{method}, {'LoRA 16' if lora else 'full'}"

                def measure(
                    how: str, name: str = name, method: str = method, lora: bool = lora, **more: Any
                ) -> str:
                    case = f"{name}{how}"
                    return cases.take(
                        "Alignment", case, lambda: align(method, weights, inputs, given.size, lora, **more)
                    )

                status = measure("")
                if status == "failed" and method == "sft":
                    status = measure(", sdpa", parallel=ParallelConfig(attention="sdpa"))
                if status == "memory":
                    measure(", recomputed", parallel=ParallelConfig(activation_checkpointing="full"))
                if method == "tdpo" and not lora:
                    measure(", reference on the CPU", reference=ReferenceConfig(offload=True))


# ---------------------------------------------------------------------------- pre-training


class Packed:
    """Rows of random tokens in documents of one length (`galenic.pretrain.loop.Batches`)."""

    def __init__(self, vocabulary: int, rows: int, context: int, document: int) -> None:
        import torch

        self.steps, self.rows, self.context = 10**9, rows, context
        self.domains: list[str] = []
        ids = torch.randint(vocabulary, (rows, context), generator=torch.Generator().manual_seed(1))
        places = (torch.arange(context) % document).expand(rows, -1).contiguous()
        labels = ids.masked_fill(places == 0, -100)
        self.made = {"input_ids": ids, "position_ids": places, "labels": labels}

    def batch(self, step: int, rows: Sequence[int]) -> dict[str, Any]:
        return {name: tensor[list(rows)] for name, tensor in self.made.items()}

    def documents(self, step: int) -> list[str]:
        return []

    def state(self, step: int) -> dict[str, Any]:
        return {"step": step}


def pretrain(
    weights: Weights, rows: int, context: int, document: int, *, peak: float, **parallel: Any
) -> dict[str, Any]:
    """Takes steps of pre-training and returns what a line of the table says."""
    import torch

    from galenic.pretrain.checkpoints.checkpoints import Checkpoints
    from galenic.pretrain.config import CheckpointConfig, GuardConfig, OptimConfig, ParallelConfig
    from galenic.pretrain.loop import Silent, Trainer
    from galenic.pretrain.parallelism.parallel import Parallel
    from galenic.pretrain.planning.budget import flops
    from galenic.pretrain.planning.memory import ALONE, memory

    warm, count = 2, 4
    torch._dynamo.utils.counters.clear()
    galenic.runtime.torch_setup(0)
    config, place = weights.config(context), galenic.runtime.device()
    how = ParallelConfig(**parallel)
    spread = Parallel(how, precision="bfloat16", device=place)
    model = weights.model(context)
    spread.apply(model)
    steps = Steps(warm)
    with tempfile.TemporaryDirectory() as folder, steps.watched():
        out = Path(folder)
        trainer = Trainer(
            model,
            OptimConfig(lr=1e-5),
            GuardConfig(),
            out,
            parallel=spread,
            checkpoints=Checkpoints(out, CheckpointConfig(seconds=1e9)),
            micro_rows=how.micro_rows,
        )
        batches = Packed(config.vocab_size, rows, context, document)
        trainer.train(batches, first=0, last=warm + count, lr=lambda _: 1e-5, bar=Silent())
        trainer.watch.close()
    seconds = [row["seconds"] for row in steps.rows[warm:]]
    speed = rows * context / statistics.median(seconds)
    cost = flops(config, context, document).trained
    planned = memory(
        config,
        ALONE,
        rows=rows,
        micro=how.micro_rows or rows,
        context=context,
        recompute=how.activation_checkpointing,
        kernel="flex" if place == "cuda" else "documents",
        document=document,
    ).peak
    assert steps.peak is not None
    found = {
        "s a step": span(seconds),
        "first step, s": f"{steps.rows[0]['seconds']:.1f}",
        "tokens/s": round(speed),
        "GFLOP a token": f"{cost / 1e9:.2f}",
        "MFU of 989 TFLOP/s": f"{cost * speed / BF16_PEAK:.1%}",
        f"MFU of {peak / 1e12:.0f} TFLOP/s": f"{cost * speed / peak:.1%}",
        **steps.peak.told(),
        "planned GB": f"{planned / 1e9:.2f}",
        "graphs": dict(torch._dynamo.utils.counters["stats"]).get("unique_graphs", 0),
        "last loss": f"{steps.rows[-1]['loss']:.4f}",
    }
    if found["peak GB"] != "-":
        found["planned / peak"] = f"{planned / 1e9 / float(found['peak GB']):.3f}"
    return found


def pretraining(cases: Cases, given: argparse.Namespace) -> None:
    """Measures the pre-training step: two contexts, with and without the compiler."""
    import torch

    from galenic.pretrain.watching.watch import matmul_peak

    weights = Weights(given.size)
    place = galenic.runtime.device()
    peak = matmul_peak(place, torch.bfloat16, size=None if place == "cuda" else 256)
    print(f"a matrix product reaches {peak / 1e12:.3g} TFLOP/s in bfloat16", flush=True)
    recipe = yaml.safe_load(RECIPE.read_text(encoding="utf-8"))["parallel"]
    recompute = recipe["activation_checkpointing"]
    short_one, long_one = SIZES[given.size]["pretrain"]
    for compiled, (rows, context, document) in (
        (False, short_one),
        (True, short_one),
        (True, long_one),
        (False, long_one),
    ):
        case = f"{rows} x {context}, documents of {document}, {'compiled' if compiled else 'not compiled'}"

        def measure(how: str, case: str = case, sizes: Any = (rows, context, document), **more: Any) -> str:
            return cases.take(
                "Pre-training", case + how, lambda: pretrain(weights, *sizes, peak=peak, **more)
            )

        words = {"compile": compiled, "activation_checkpointing": recompute}
        status = measure(f", {recompute}", **words)
        if status == "memory":
            measure(", full", **{**words, "activation_checkpointing": "full"})
        elif status == "failed":
            measure(f", {recompute}, sdpa", attention="sdpa", **words)


# ---------------------------------------------------------------------------- all


def conditions(weights: Weights) -> dict[str, Any]:
    """Where it was measured; makes the process group first, which every case needs."""
    import platform
    from datetime import date
    from importlib.metadata import version

    import torch

    from galenic.pretrain.config import ParallelConfig
    from galenic.pretrain.parallelism.parallel import Parallel

    place = galenic.runtime.device()
    Parallel(ParallelConfig(), precision="bfloat16", device=place)
    if UNTRIED not in os.environ:
        one = torch.ones(1, device=place)
        torch.distributed.all_reduce(one)
        assert float(one) == 1.0
    name, total = "CPU", 0.0
    if place == "cuda":
        name, total = torch.cuda.get_device_name(), torch.cuda.get_device_properties(0).total_memory
    return {
        "date": f"{date.today()}",
        "device": f"{name}, {total / 1e9:.1f} GB",
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "peft")},
        "cuda": str(torch.version.cuda),
        "parameters": f"{weights.parameters():,}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda_runs.arguments(parser)
    parser.add_argument("--size", choices=SIZES, default="1.5b", help="tiny: to see that it runs")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--pretrain", action="store_true", help="pre-training instead of alignment")
    given = parser.parse_args()
    if given.worker is None:
        sys.exit(cuda_runs.supervise(given))
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        told = conditions(Weights(given.size))
    except Exception as error:
        print(f"no process group: {short(error)}", flush=True)
        os._exit(UNCONNECTED)
    cases = Cases(given)
    cases.take("Conditions", "here", lambda: told)
    (pretraining if given.pretrain else alignment)(cases, given)
    os._exit(0)  # threads of gloo and of the compiler are not waited for


if __name__ == "__main__":
    main()
