"""Verb `tdpo`: token-level direct preference optimization.

    u      = beta (log p(y_w|x) - log q(y_w|x)) - beta (log p(y_l|x) - log q(y_l|x))
    D(y)   = sum_t KL(q(.|x, y_<t) || p(.|x, y_<t))        sequential KL, over the whole vocabulary
    TDPO1  = -log sigmoid(u - beta (D(y_l) - D(y_w)))
    TDPO2  = -log sigmoid(u - alpha beta (D(y_l) - sg[D(y_w)]))

p is the policy, q the reference, y_w the better and y_l the worse answer, sg stops gradients. TDPO2 with alpha = 0 is
DPO (arXiv 2305.18290). Source: Zeng et al. 2024, arXiv 2404.11999; Baichuan-M1 report, section 5.4, which says neither
which of the two nor its constants; conformance: the authors' code, whose defaults are ours.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from galenic.align.config import TdpoConfig
from galenic.align.data.pairs import Pairs, collate_pairs, in_order, in_turn, steps_of, trained_and_heldout
from galenic.align.training import opened, planned
from galenic.runtime import Plan, human

if TYPE_CHECKING:
    import torch

    from galenic.align.policy import Reference


def implicit_rewards(
    log_ratios: "torch.Tensor",
    kl: "torch.Tensor",
    *,
    beta: float,
    alpha: float,
    method: Literal["tdpo1", "tdpo2"],
) -> "torch.Tensor":
    """Computes what the loss compares: beta (log p(y|x) - log q(y|x) + a D(y)), a = 1 for TDPO1, alpha for TDPO2.

    The derivative of a reward by D(y_w) is zero in TDPO2. With alpha = 0 it is DPO's implicit reward.

    Args:
        log_ratios: (pairs, 2) log p(y|x) - log q(y|x), nats, of the chosen and the rejected answer.
        kl: (pairs, 2) sequential KL divergences D(y), nats.
        beta: scale.
        alpha: weight of the divergences, for tdpo2.
        method: which of the two.

    Returns:
        (pairs, 2), of the chosen and the rejected answer.
    """
    import torch

    if method == "tdpo1":
        return beta * (log_ratios + kl)
    return beta * (log_ratios + alpha * torch.stack([kl[:, 0].detach(), kl[:, 1]], 1))


def tdpo_loss(
    log_ratios: "torch.Tensor",
    kl: "torch.Tensor",
    *,
    beta: float,
    alpha: float,
    method: Literal["tdpo1", "tdpo2"],
) -> "torch.Tensor":
    """Computes the loss of each pair, -log sigmoid(difference of its implicit rewards).

    Args:
        log_ratios: (pairs, 2); see `implicit_rewards`, as for the others.
        kl: (pairs, 2).
        beta: scale of the implicit reward.
        alpha: weight of the divergences, for tdpo2.
        method: which of the two.

    Returns:
        (pairs,) losses, nats.
    """
    import torch.nn.functional as F

    rewards = implicit_rewards(log_ratios, kl, beta=beta, alpha=alpha, method=method)
    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1])


class TdpoObjective:
    """The loss of a batch of `Pairs` (`galenic.pretrain.loop.Objective`); a unit is a pair.

    `accuracy` is the share of pairs whose implicit rewards are in order, `preferred` that of pairs whose chosen answer
    the policy itself finds likelier, whatever its reference; a tie is a half. `kl_chosen` and `kl_rejected` are
    sequential divergences, nats an answer.
    """

    measures = (
        *("accuracy", "preferred", "reward", "reward_margin"),
        *("kl", "kl_chosen", "kl_rejected", "entropy", "length"),
    )

    def __init__(self, config: TdpoConfig, reference: "Reference", *, product: bool) -> None:
        self.config, self.reference, self.product = config, reference, product

    def units(self, part: Mapping[str, Any]) -> float:
        """Counts pairs."""
        return len(part["margins"])

    def __call__(
        self, model: Any, part: Mapping[str, Any], units: float
    ) -> tuple["torch.Tensor", dict[str, tuple[float, float]]]:
        """Computes loss and measures of a part."""
        from galenic.align.policy import per_row, statistics

        answers = part["answers"]
        found = statistics(
            model,
            {"input_ids": part["input_ids"]},
            answers,
            product=self.product,
            reference=self.reference,
        )
        assert found.reference_log_probs is not None and found.kl is not None
        config = self.config
        how: dict[str, Any] = {"beta": config.beta, "alpha": config.alpha, "method": config.method}
        log_ratios = per_row(found.log_probs - found.reference_log_probs, answers).view(-1, 2)
        kl = per_row(found.kl, answers).view(-1, 2)
        losses = tdpo_loss(log_ratios, kl, **how)
        rewards = implicit_rewards(log_ratios, kl, **how).detach().double()
        divergence, likelihood = kl.detach().double(), per_row(found.log_probs.detach(), answers).view(-1, 2)
        pairs, tokens = len(rewards), int(answers.sum())
        margins = rewards[:, 0] - rewards[:, 1]
        return losses.sum() / units, {
            "accuracy": (in_order(margins), pairs),
            "preferred": (in_order(likelihood[:, 0] - likelihood[:, 1]), pairs),
            "reward": (float(rewards[:, 0].sum()), pairs),
            "reward_margin": (float(margins.sum()), pairs),
            "kl": (float(divergence.sum()), tokens),
            "kl_chosen": (float(divergence[:, 0].sum()), pairs),
            "kl_rejected": (float(divergence[:, 1].sum()), pairs),
            "entropy": (float(found.entropy.detach().double().sum()), tokens),
            "length": (float(tokens), 2 * pairs),
        }


def plan(config: TdpoConfig) -> Plan:
    """What the verb would do."""
    count, steps = steps_of(config)
    name = {"tdpo1": "TDPO1", "tdpo2": f"TDPO2, alpha {config.alpha:g}"}[config.method]
    facts = {"pairs": human(count), "objective": f"{name}, beta {config.beta:g}"}
    return planned(config, facts, length=f"about {steps} steps of {config.rows} pairs")


def run(config: TdpoConfig) -> None:
    """Trains; continues where a killed run stopped, to the same bytes."""
    from galenic.align.health import watchdog
    from galenic.align.policy import Reference

    with opened("tdpo", config) as run:
        if run is None:
            return
        run.check_context(config.context)
        pairs, heldout, dropped = trained_and_heldout(config, run.tokenizer)
        batches = Pairs(
            pairs, rows=config.rows, epochs=config.epochs, context=config.context, seed=config.seed
        )
        reference = Reference(run.model, config.reference, base=config.model, parallel=run.parallel)
        objective = TdpoObjective(config, reference, product=run.product)
        run.fit(
            batches,
            objective,
            steps=batches.steps,
            score=lambda: measured(run.model, objective, heldout, config.rows, run.trainer),
            check=watchdog(config.limits),
        )
        run.write(
            {"pairs": len(pairs), "heldout": len(heldout), "dropped": dropped},
            pairs=Path(config.pairs).name,
            method=config.method,
            beta=config.beta,
            alpha=config.alpha,
        )


def measured(model: Any, objective: Any, pairs: list[Any], rows: int, trainer: Any) -> dict[str, float]:
    """Measures an objective's loss and measures on held-out pairs; each process takes its share.

    Args:
        model: in `eval()`.
        objective: of pairs.
        pairs: all of them.
        rows: pairs at a time.
        trainer: knows device and processes.

    Returns:
        loss and the objective's measures.
    """
    import torch

    names = objective.measures
    sums = torch.zeros(1 + 2 * len(names), dtype=torch.float64)
    for some, counts in in_turn(pairs, rows, trainer.parallel):
        part = {name: tensor.to(trainer.device) for name, tensor in collate_pairs(pairs[some]).items()}
        with torch.no_grad():
            loss, told = objective(model, part, 1)
        if counts:
            sums += torch.tensor([float(loss), *(value for name in names for value in told[name])])
    loss, *told = trainer.parallel.added(sums).tolist()
    found = {
        name: total / count for name, total, count in zip(names, told[::2], told[1::2], strict=True) if count
    }
    return {"loss": loss / len(pairs), **found}
