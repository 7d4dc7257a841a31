"""Verb `ppo`: proximal policy optimization against rewards, held near a reference.

    rho   = p(y_t) / p_old(y_t)
    L_p   = -min(rho A, clip(rho, 1 - e, 1 + e) A)                              the policy, arXiv 1707.06347, eq. 7
    L_v   = max((V - R)^2, (V_old + clip(V - V_old, -v, v) - R)^2) / 2          the values, arXiv 2005.12729
    L     = mean over tokens of L_p + c_v L_v - c_e entropy

for every token y_t of the answers that were sampled from p_old; where A, R and the rewards come from: `experience.py`.
The Baichuan-M1 report (section 5.5) says that PPO comes last and whose reward models it uses, and no constant.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galenic.align.config import PpoConfig
from galenic.align.data.tasks import read_tasks
from galenic.align.training import opened, planned
from galenic.runtime import Plan, human

if TYPE_CHECKING:
    import torch

    from galenic.align.rollouts.experience import Question

MEASURES = ("entropy", "clipped", "policy_loss", "value_loss", "kl_step")
"""What is told of the tokens of a minibatch."""


def ppo_loss(
    log_probs: "torch.Tensor",
    old_log_probs: "torch.Tensor",
    advantages: "torch.Tensor",
    values: "torch.Tensor",
    old_values: "torch.Tensor",
    returns: "torch.Tensor",
    *,
    clip: float,
    value_clip: float,
) -> tuple["torch.Tensor", "torch.Tensor", "torch.Tensor"]:
    """Computes both losses of each token; see above for the equations.

    Args:
        log_probs: (tokens,) log p(y_t), nats.
        old_log_probs: (tokens,) log p_old(y_t), of the policy that sampled.
        advantages: (tokens,) A.
        values: (tokens,) V.
        old_values: (tokens,) V_old, of the value head as it was then.
        returns: (tokens,) R.
        clip: e.
        value_clip: v.

    Returns:
        (tokens,) losses of the policy; (tokens,) losses of the values; (tokens,) bool, where the policy's is clipped
        and has no gradient.
    """
    import torch

    ratio = (log_probs - old_log_probs).exp()
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)
    near = old_values + (values - old_values).clamp(-value_clip, value_clip)
    value_losses = torch.maximum((values - returns).square(), (near - returns).square()) / 2
    return torch.maximum(plain, clipped), value_losses, (clipped > plain).detach()


class PpoObjective:
    """The loss of a minibatch of `Experiences` (`galenic.pretrain.loop.Objective`); a unit is a token of an answer."""

    def __init__(self, config: PpoConfig, *, product: bool) -> None:
        from galenic.align.rollouts.experience import TOLD

        self.config, self.product = config, product
        self.measures: Sequence[str] = (*TOLD, *MEASURES)

    def units(self, part: Mapping[str, Any]) -> float:
        """Counts tokens of answers."""
        return float(part["answers"].sum())

    def __call__(
        self, model: Any, part: Mapping[str, Any], units: float
    ) -> tuple["torch.Tensor", dict[str, tuple[float, float]]]:
        """Computes loss and measures of a part."""
        from galenic.align.rollouts.experience import TOLD
        from galenic.align.rollouts.values import with_values

        config, answers = self.config, part["answers"]
        found, values = with_values(
            model,
            part["input_ids"],
            answers,
            product=self.product,
            temperature=config.sampling.temperature,
        )
        old = {name: part[name][answers] for name in ("log_probs", "advantages", "values", "returns")}
        policy, value, clipped = ppo_loss(
            found.log_probs,
            old["log_probs"],
            old["advantages"],
            values,
            old["values"],
            old["returns"],
            clip=config.clip,
            value_clip=config.value_clip,
        )
        losses = policy + config.value_weight * value - config.entropy_weight * found.entropy
        moved = (found.log_probs - old["log_probs"]).detach()
        step = moved.exp() - 1 - moved  # never negative, and on average KL(p_old || p)
        columns = (found.entropy, clipped, policy, value, step)
        tokens, rows = len(policy), len(answers)
        sums = [float(column.detach().double().sum()) for column in columns]
        told = zip(TOLD, part["told"].sum(0).tolist(), strict=True)
        return losses.sum() / units, {
            **{name: (total, rows) for name, total in told if not math.isnan(total)},
            **{name: (total, tokens) for name, total in zip(MEASURES, sums, strict=True)},
        }


def plan(config: PpoConfig) -> Plan:
    """What the verb would do."""
    tasks = read_tasks(config.tasks)
    steps = config.epochs * config.minibatches
    judge = config.rewards.judge
    held = f", adapted to {config.kl_target:g} nats an answer" if config.kl_target else ""
    facts = {
        "tasks": human(len(tasks)),
        "rewards": f"rules for {human(sum(task.rule is not None for task in tasks))} tasks"
        + (f", reward model {config.rewards.model}" if config.rewards.model else "")
        + (f", judge {judge.endpoint.model} at {judge.endpoint.base_url}" if judge else ""),
        "objective": f"clip {config.clip:g}, KL penalty {config.kl:g}{held}",
    }
    length = (
        f"{config.rollouts} rollouts of {config.rows} answers, {steps} steps on each "
        f"({config.epochs} x {config.minibatches})"
    )
    return planned(config, facts, length=length)


def run(config: PpoConfig) -> None:
    """Trains; continues where a killed run stopped, to the same bytes."""
    from galenic.align.health import watchdog
    from galenic.align.policy import Reference
    from galenic.align.rewards.rewards import Rewards
    from galenic.align.rollouts.experience import Experiences, fitting
    from galenic.align.rollouts.sampling import Sampler
    from galenic.align.rollouts.values import value_head_for

    with opened("ppo", config) as run:
        if run is None:
            return
        run.check_context(config.context)
        room = config.context - config.sampling.max_new_tokens
        questions, dropped = fitting(read_tasks(config.tasks), run.tokenizer, room)
        heldout: list[Question] = []
        if config.heldout:
            heldout = fitting(read_tasks(config.heldout, limit=config.heldout_tasks), run.tokenizer, room)[0]
        rewards = Rewards(config.rewards, out=run.out, budget=config.budget)
        sampler = Sampler(run, config.sampling)
        rewards.ready([question.task for question in (*questions, *heldout)])
        objective = PpoObjective(config, product=run.product)
        reference = Reference(run.model, config.reference, base=config.model, parallel=run.parallel)
        run.attach(
            "value_head", value_head_for(run.model)
        )  # after the reference, which needs none, was copied
        batches = Experiences(run, config, questions, sampler=sampler, rewards=rewards, reference=reference)
        run.fit(
            batches,
            objective,
            steps=batches.steps,
            score=(lambda: measured(run, sampler, rewards, heldout)) if heldout else None,
            check=watchdog(config.limits, longest=config.sampling.max_new_tokens),
            together=batches.together,
        )
        run.write(
            {"tasks": len(questions), "heldout": len(heldout), "dropped": dropped},
            tasks=Path(config.tasks).name,
            kl=config.kl,
            clip=config.clip,
            rollouts=config.rollouts,
            rows=config.rows,
        )


def measured(run: Any, sampler: Any, rewards: Any, questions: "Sequence[Question]") -> dict[str, float]:
    """Measures what greedy answers to held-out questions are worth; each process takes its share.

    Args:
        run: whose model is in `eval()`.
        sampler: of answers.
        rewards: what each is worth (`galenic.align.rewards.rewards.Rewards`).
        questions: all of them.

    Returns:
        Means of reward, length in tokens and whether the answer ended; if there were any, the share of `unreadable`
        ones.
    """
    import torch

    from galenic.align.data.order import own_share
    from galenic.align.rollouts.sampling import health

    share = own_share(len(questions), run.parallel)
    places = [place for place, _ in share]
    tasks = [questions[place].task for place in places]
    found = sampler([task.messages for task in tasks], step=0, numbers=places, greedy=True)
    replies = [copies[0] for copies in found]
    texts = [sampler.text(reply) for reply in replies]
    worth = rewards(tasks, texts, [reply.ended for reply in replies])
    counted = [place for place, (_, counts) in enumerate(share) if counts]
    readable = rewards.readable(tasks, texts)
    told = health([replies[place] for place in counted])
    sums = {
        "reward": sum(worth[place] for place in counted),
        **{name: total for name, (total, _) in told.items()},
        "unreadable": sum(replies[place].ended and not readable[place] for place in counted),
    }
    means = run.parallel.added(torch.tensor(list(sums.values()), dtype=torch.float64)) / len(questions)
    found = dict(zip(sums, means.tolist(), strict=True))
    return {name: mean for name, mean in found.items() if mean or name != "unreadable"}
