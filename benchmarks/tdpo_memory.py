"""Memory and time of one TDPO loss and its gradients: logits in chunks, as `tdpo` makes them, and held whole.

Each way runs in a process of its own. What is told is how far its peak rose above that from before: hidden states and
heads of both models are there then, the gradients of one's are not. Usage:

    python benchmarks/tdpo_memory.py [--pairs 4] [--tokens 128] [--vocabulary 133120] [--width 256]
"""

import argparse
import subprocess
import sys
import time

import torch

from galenic.align.policy import per_row
from galenic.align.tdpo import tdpo_loss
from galenic.align.token_statistics import TokenStatistics, token_statistics
from galenic.runtime import peak_memory_bytes


def whole(policy, targets, *, reference) -> TokenStatistics:
    """The same as `token_statistics`, from the full logits of both models."""
    log_p, log_q = ((hidden @ head.T).log_softmax(-1) for hidden, head in (policy, reference))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    entropy = -(log_p.detach().exp() * log_p.detach()).sum(-1)
    p, q = (log.gather(-1, targets[:, None])[:, 0] for log in (log_p, log_q))
    return TokenStatistics(log_probs=p, entropy=entropy, reference_log_probs=q, kl=kl)


def measure(way: str, pairs: int, tokens: int, vocabulary: int, width: int) -> None:
    torch.manual_seed(0)
    wanted = torch.ones(2 * pairs, tokens, dtype=torch.bool)
    hidden, other = (torch.randn(wanted.numel(), width) for _ in range(2))
    head, other_head = (torch.randn(vocabulary, width) * width**-0.5 for _ in range(2))
    targets = torch.randint(0, vocabulary, (wanted.numel(),))
    hidden.requires_grad_()
    head.requires_grad_()
    before, started = peak_memory_bytes(), time.perf_counter()
    compute = token_statistics if way == "chunks" else whole
    found = compute((hidden, head), targets, reference=(other, other_head))
    assert found.reference_log_probs is not None and found.kl is not None
    ratios = per_row(found.log_probs - found.reference_log_probs, wanted).view(-1, 2)
    losses = tdpo_loss(ratios, per_row(found.kl, wanted).view(-1, 2), beta=0.1, alpha=0.5, method="tdpo2")
    losses.mean().backward()
    seconds, peak = time.perf_counter() - started, peak_memory_bytes() - before
    print(
        f"| {way} | {peak / 1e6:,.0f} | {seconds:.1f} | {losses.mean().item():.6f} | {hidden.grad.norm():.6f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    sizes = {"pairs": 4, "tokens": 128, "vocabulary": 133_120, "width": 256}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--way", choices=("chunks", "whole"))
    given = vars(parser.parse_args())
    way = given.pop("way")
    if way:
        measure(way, **given)
        return
    logits = 2 * given["pairs"] * given["tokens"] * given["vocabulary"]
    print(f"{given}: logits of one model {logits * 4 / 1e6:,.0f} MB in float32\n")
    print("| logits | peak, MB | seconds | loss | norm of the states' gradient |\n|---|---|---|---|---|")
    for name in ("chunks", "whole"):
        words = [f"--{key}={value}" for key, value in given.items()]
        subprocess.run([sys.executable, __file__, f"--way={name}", *words], check=True)


if __name__ == "__main__":
    main()
