"""Speed of the network against its nearest relatives: one table from one run.

    python benchmarks/model.py                            150M and starter size, two CPU threads, float32
    python benchmarks/model.py --device cuda              1.5B, bfloat16, torch.compile, CUDA graphs

What runs, in tokens per second:

* prefill: one row of 512 tokens into an empty cache, logits of the last token.
* decode at batch 1 and 8: after a context of 128 tokens, 32 times
  `token = model(token, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)`.
* training step: two rows of 512 tokens, `model(ids, labels=ids).loss.backward()`, fused AdamW, gradients dropped.
  Once more with `skip_logits=True` for our network: Llama has no such option and does what it did.

Against what:

* Llama: transformers' `LlamaForCausalLM` of the same width, depth, feed-forward, vocabulary and the heads of our global
  layers, untied, so the parameters are equal but for our convolution's few scalars. Both under sdpa
  (packed training on CUDA: flex attention).
* no convolution: our network with `conv_window=1`.
* mlx-lm: its `baichuan_m1` on our checkpoint, in its own environment (`make peers`), asked over a pipe by
  `mlx_worker.py`. It scales the NormHead's rows when it loads, so its training step would be another computation: none.

The contenders take turns in an order that changes, and everybody else waits without computing. A ratio is
ours / theirs within one turn, so it does not notice a machine that becomes slower; the table gives the median over all
turns and its 95% order-statistic interval. Random weights and tokens: speed does not depend on them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import galenic.runtime  # noqa: F401 (before torch: waiting threads must not burn the next contender's cores)

# isort: split
import torch
from timing import conditions, median_interval, ratios, take_turns
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from galenic.model import BaichuanM1Config, BaichuanM1ForCausalLM, save

# As in the 14B network, a global head is twice as wide as a sliding-window head; the window is a quarter of a text.
SIZES = {
    "starter": {
        **{"vocab_size": 6144, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4},
        **{"num_attention_heads": 2, "num_key_value_heads": 1},
        **{"num_swa_attention_heads": 4, "num_swa_key_value_heads": 2, "sliding_window": 128},
    },
    "150m": {
        **{"vocab_size": 32768, "hidden_size": 768, "intermediate_size": 2944, "num_hidden_layers": 12},
        **{"num_attention_heads": 6, "num_key_value_heads": 2},
        **{"num_swa_attention_heads": 12, "num_swa_key_value_heads": 4, "sliding_window": 128},
    },
    "1.5b": {
        **{"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 7552, "num_hidden_layers": 24},
        **{"num_attention_heads": 8, "num_key_value_heads": 2},
        **{"num_swa_attention_heads": 16, "num_swa_key_value_heads": 4, "sliding_window": 2048},
    },
}
OURS, LLAMA, PLAIN, MLX = "ours", "Llama", "no convolution", "mlx-lm"


@dataclass(frozen=True)
class Task:
    name: str
    rows: int
    context: int
    new: int = 0  # tokens to decode after the context
    train: bool = False
    skip_logits: bool = False
    documents: int = 1  # packed in each row

    @property
    def tokens(self) -> int:
        return self.rows * (self.new or self.context)

    def targets(self) -> dict[str, float]:
        """Rival -> smallest ratio of speeds that is good enough, at about 150M parameters on two CPU cores."""
        least = {LLAMA: 0.95}
        if self.train:
            return least | {PLAIN: 1 / 1.03}  # the convolution costs at most 3% of a training step
        return least | {PLAIN: 1 / 1.05, MLX: 1.0} if self.new else least


def tasks(device: str) -> list[Task]:
    decode = [Task(f"decode, batch {rows}", rows, context=128, new=32) for rows in (1, 8)]
    step = {"rows": 2, "context": 512} if device == "cpu" else {"rows": 1, "context": 8192, "documents": 4}
    return [
        Task("prefill", rows=1, context=512),
        *decode,
        Task("training step", train=True, **step),
        Task("training step, skip_logits", train=True, skip_logits=True, **step),
    ]


# ---------------------------------------------------------------------------- contenders


class TorchContender:
    """A transformers model in this process."""

    def __init__(self, name: str, model: Any, compiled: bool):
        self.name, self.model, self.static = name, model, compiled
        self.parameters = sum(p.numel() for p in model.parameters())
        self.device = model.device
        # A decode step is many small kernels: on CUDA they are replayed as one graph, over a preallocated cache.
        self.call = torch.compile(model) if compiled else model
        self.step = torch.compile(model, mode="reduce-overhead") if compiled else model

    def prepare(self, task: Task) -> None:
        self.model.train(task.train)
        # Packed documents under sdpa would need a dense mask of context x context.
        self.model.set_attn_implementation("flex_attention" if task.documents > 1 else "sdpa")
        self.optimizer = (
            torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=True) if task.train else None
        )
        # A recorded graph knows its cache by address, so the preallocated one stays the same.
        length = task.context + task.new
        self.cache = StaticCache(self.model.config, max_cache_len=length) if self.static else None
        for _ in range(3 if self.static else 1):  # compiling, then recording a graph, then replaying it
            self.run(task)

    def run(self, task: Task) -> float:
        ids = torch.randint(self.model.config.vocab_size, (task.rows, task.context), device=self.device)
        if task.train:
            return self.train(task, ids)
        with torch.inference_mode():
            return self.decode(task, ids) if task.new else self.prefill(ids)

    def train(self, task: Task, ids: torch.Tensor) -> float:
        arguments: dict[str, Any] = {"labels": ids}
        if task.documents > 1:
            length = task.context // task.documents
            arguments["position_ids"] = torch.arange(task.context, device=self.device)[None] % length
        if task.skip_logits and self.name != LLAMA:
            arguments["skip_logits"] = True
        start = self.clock()
        self.call(ids, use_cache=False, **arguments).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return self.clock() - start

    def prefill(self, ids: torch.Tensor) -> float:
        start = self.clock()
        cache = DynamicCache(config=self.model.config)
        self.call(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return self.clock() - start

    def decode(self, task: Task, ids: torch.Tensor) -> float:
        if self.cache is not None:
            self.cache.reset()
        cache = self.cache or DynamicCache(config=self.model.config)
        options = {"past_key_values": cache, "use_cache": True, "logits_to_keep": 1}
        token = self.model(ids, **options).logits.argmax(-1)
        start = self.clock()
        for _ in range(task.new):
            token = self.step(token, **options).logits.argmax(-1)
        return self.clock() - start

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return perf_counter()


class MlxContender:
    """mlx-lm in a process of its own, which computes only when it is asked."""

    name = MLX

    def __init__(self, python: str, model: BaichuanM1ForCausalLM, threads: int):
        self.folder = tempfile.TemporaryDirectory()
        save(model, Path(self.folder.name) / "model", tokenizer=None, provenance={})
        variables = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        self.process = subprocess.Popen(
            [python, str(Path(__file__).with_name("mlx_worker.py")), f"{self.folder.name}/model"],
            **{
                "stdin": subprocess.PIPE,
                "stdout": subprocess.PIPE,
                "text": True,
                "env": os.environ | variables,
            },
        )

    def prepare(self, task: Task) -> None:
        self.run(task)

    def run(self, task: Task) -> float:
        self.process.stdin.write(
            json.dumps({"rows": task.rows, "context": task.context, "new": task.new}) + "\n"
        )
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit("mlx-lm's process ended early; its error stands above")
        return json.loads(answer)["seconds"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()


def network(size: str, kind: str, dtype: torch.dtype, device: str) -> Any:
    """Builds one of the three transformers models with fresh weights."""
    shape = dict(SIZES[size])
    if kind == LLAMA:
        shape = {key: value for key, value in shape.items() if "swa" not in key and "sliding" not in key}
        config = LlamaConfig(
            **shape, tie_word_embeddings=False, max_position_embeddings=32768, rope_theta=1e6
        )
        build = LlamaForCausalLM
    else:
        config = BaichuanM1Config(**shape, conv_window=1 if kind == PLAIN else 2)
        build = BaichuanM1ForCausalLM
    with torch.device(device):
        return build._from_config(config, dtype=dtype, attn_implementation="sdpa")


# ---------------------------------------------------------------------------- the table


def cell(theirs: list[float], ours: list[float], target: float | None) -> str:
    ratio = ratios(theirs, ours)
    text = f"{ratio.median:.3f} ({ratio.low:.3f} to {ratio.high:.3f}"
    text += f"; {len(theirs)} turns)" if len(theirs) < len(ours) else ")"
    if target is None:
        return text
    return f"{text} {'met' if ratio.median >= target else '**not met**'}: >= {target:.3f}"


def matmul_peak(device: str, dtype: torch.dtype, size: int = 8192) -> float:
    """FLOP/s of the fastest of ten square matrix products."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    times = []
    for _ in range(11):
        torch.cuda.synchronize()
        start = perf_counter()
        a @ b
        torch.cuda.synchronize()
        times.append(perf_counter() - start)
    return 2 * size**3 / min(times[1:])


def rows(size: str, arguments: argparse.Namespace) -> list[str]:
    """Measures one size and returns its lines of the table."""
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    models = {kind: network(size, kind, dtype, arguments.device) for kind in (OURS, LLAMA, PLAIN)}
    contenders: dict[str, Any] = {
        kind: TorchContender(kind, model, arguments.compile) for kind, model in models.items()
    }
    counts = {kind: contender.parameters for kind, contender in contenders.items()}
    print(f"{size}: parameters " + ", ".join(f"{kind} {count:,}" for kind, count in counts.items()) + "\n")
    assert abs(counts[LLAMA] / counts[OURS] - 1) < 0.005, "not the same number of parameters"
    if not arguments.without_mlx:
        contenders[MLX] = MlxContender(arguments.mlx_python, models[OURS], arguments.threads)
    lines = []
    for task in tasks(arguments.device):
        present = {name: c for name, c in contenders.items() if not (task.train and name == MLX)}
        for contender in present.values():
            contender.prepare(task)
        turns = {name: lambda c=contender, t=task: c.run(t) for name, contender in present.items()}
        times = take_turns(turns, arguments.repeats, arguments.seconds, patience={MLX: 60})
        targets = task.targets() if size == "150m" and arguments.device == "cpu" else {}
        speed = f"{task.tokens / median_interval(times[OURS]).median:,.0f}"
        if arguments.device == "cuda" and task.train:
            # Two FLOPs per weight and token forwards and four backwards; the embedding's rows and the attention's
            # scores are left out, so the true share is higher.
            multiplied = counts[OURS] - SIZES[size]["vocab_size"] * SIZES[size]["hidden_size"]
            flops = 6 * multiplied * task.tokens / median_interval(times[OURS]).median
            speed += f" ({100 * flops / matmul_peak(arguments.device, dtype):.0f}% of the matmul peak)"
        cells = [
            cell(times[name], times[OURS], targets.get(name)) if name in times else "-"
            for name in (LLAMA, PLAIN, MLX)
        ]
        lines.append(f"| {size} | {task.name} | {speed} | {' | '.join(cells)} | {len(times[OURS])} |")
        print(lines[-1], file=sys.stderr, flush=True)
    if MLX in contenders:
        contenders[MLX].close()
    return lines


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", nargs="+", choices=SIZES, help="default: 150m starter; on cuda 1.5b")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; on cuda bfloat16")
    parser.add_argument("--compile", action="store_true", help="torch.compile, static cache; always on cuda")
    parser.add_argument("--repeats", type=int, default=7, help="turns per task at least (default 7)")
    parser.add_argument(
        "--seconds", type=float, default=10, help="quick tasks take turns for at least so long (default 10)"
    )
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of every contender (default 2)")
    parser.add_argument("--mlx-python", default=".venvs/mlx/bin/python", help="an environment with mlx-lm")
    parser.add_argument("--without-mlx", action="store_true", help="leave its column empty")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    if cuda and not torch.cuda.is_available():
        parser.error("--device cuda: no CUDA device here; use --device cpu")
    arguments.size = arguments.size or (["1.5b"] if cuda else ["150m", "starter"])
    arguments.dtype = arguments.dtype or ("bfloat16" if cuda else "float32")
    arguments.compile |= cuda
    arguments.without_mlx |= cuda
    if not arguments.without_mlx and not Path(arguments.mlx_python).is_file():
        parser.error(
            f"{arguments.mlx_python}: no such file; `make peers` makes it, --without-mlx does without"
        )
    return arguments


def main() -> None:
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    torch.set_flush_denormal(True)
    torch._dynamo.config.recompile_limit = (
        64  # the models share transformers' wrappers, which count as one function
    )
    more = [] if arguments.without_mlx else [mlx_version(arguments.mlx_python)]
    more += [torch.cuda.get_device_name()] if arguments.device == "cuda" else []
    more += [arguments.dtype, "torch.compile" if arguments.compile else "eager"]
    print(conditions(arguments.threads, *more) + "\n")
    lines = [line for size in arguments.size for line in rows(size, arguments)]
    header = [
        "size",
        "task",
        "ours, tokens/s",
        f"ours / {LLAMA}",
        f"ours / {PLAIN}",
        f"ours / {MLX}",
        "turns",
    ]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    print("\n".join(lines))


def mlx_version(python: str) -> str:
    code = "from importlib.metadata import version as v; print('mlx', v('mlx') + ', mlx-lm', v('mlx-lm'))"
    return subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


if __name__ == "__main__":
    main()
