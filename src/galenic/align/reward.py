"""Verb `reward`: a model that gives an answer a number, learnt from which of two answers was preferred.

    P(y_w is preferred to y_l | x) = sigmoid(r(x, y_w) - r(x, y_l))                      (Bradley and Terry 1952)
    loss = -log sigmoid(r(x, y_w) - r(x, y_l) - m) + centre (r(x, y_w) + r(x, y_l))^2

r is linear in the last token's state of a network that begins as a language model, and 0 before training. m is the
pair's margin (Llama 2, arXiv 2307.09288, eq. 2), 0 where none is given; the second term keeps rewards around 0, which
the first leaves open (arXiv 2312.09244). Source: arXiv 2203.02155, eq. 1; Baichuan-M1 report, section 5.2.1: trained
from one of its checkpoints, nothing more is said.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from galenic.align.config import RewardConfig
from galenic.align.data.pairs import (
    Pair,
    Pairs,
    collate_pairs,
    encode_answered,
    in_order,
    in_turn,
    steps_of,
    trained_and_heldout,
)
from galenic.align.data.tasks import Messages
from galenic.align.training import opened, planned
from galenic.evaluate.config import model_parts
from galenic.runtime import Plan, UserError, device, human

if TYPE_CHECKING:
    import torch

BINS = 20
"""Of confidence, between 0 and 1; the surer side of a pair falls into the upper half."""


# ---------------------------------------------------------------------------- the mathematics


def reward_loss(rewards: "torch.Tensor", margins: "torch.Tensor", centre: float) -> "torch.Tensor":
    """Computes the loss of each pair; see the top of this file.

    Args:
        rewards: (pairs, 2) of the chosen and the rejected answer.
        margins: (pairs,) by how much the chosen one should lead.
        centre: weight of the squared sum.

    Returns:
        (pairs,) losses, nats.
    """
    import torch.nn.functional as F

    return -F.logsigmoid(rewards[:, 0] - rewards[:, 1] - margins) + centre * rewards.sum(1) ** 2


def calibration(leads: "torch.Tensor") -> dict[str, float]:
    """Tells how far the probabilities of pairs can be believed.

    Args:
        leads: (pairs,) reward of the chosen minus that of the rejected answer.

    Returns:
        `accuracy`, share of positive leads, a tie being a half; `brier`, mean of (1 - sigmoid(lead))^2, 0.25 for a
        model that knows nothing; `calibration_error`, expected difference of confidence and accuracy over bins of the
        confidence max(p, 1 - p) (Naeini et al. 2015).
    """
    from galenic.corpus.scores.agreement import calibration_error

    chances = leads.double().sigmoid()
    right = (leads > 0).double() + 0.5 * (leads == 0)
    return {
        "accuracy": in_order(leads) / len(leads),
        "brier": float(((1 - chances) ** 2).mean()),
        "calibration_error": calibration_error(chances.maximum(1 - chances).numpy(), right.numpy(), BINS),
    }


# ---------------------------------------------------------------------------- the model


def rewards_of(model: Any, ids: "torch.Tensor", real: "torch.Tensor") -> "torch.Tensor":
    """Returns the rewards (rows,) of texts, at least float32.

    Args:
        model: of `load_scorer`, with an adapter or without.
        ids: (rows, length), filled up on the right with `config.pad_token_id`.
        real: (rows, length) bool, what is not filled up.
    """
    import torch

    # A network that looks forward has to be told where a text ends; a causal one is faster without.
    mask = None if model.config.model_type == "baichuan_m1" else real.long()
    scores = model(input_ids=ids, attention_mask=mask).logits[:, 0]
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def padding(model: Any, tokenizer: Any) -> int:
    """Chooses what texts are filled up with: a token that none ends with, as a model looks for the last other one.

    It is kept in the model's config.
    """
    end = encode_answered(
        tokenizer, [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
    )[-1]
    own = (model.config.pad_token_id, tokenizer.pad_token_id, *tokenizer.all_special_ids, 0, 1)
    model.config.pad_token_id = next(token for token in own if token not in (None, end))
    return model.config.pad_token_id


class RewardModel:
    """A reward model to score conversations with.

    Args:
        folder: of the model, or `base+adapter` where an adapter was trained.
        rows: conversations scored at a time.

    Raises:
        UserError: the folder holds no reward model.
    """

    def __init__(self, folder: str, *, rows: int = 16) -> None:
        from galenic.align.lora import load_adapter
        from galenic.model import load_tokenizer
        from galenic.model.foreign import folder_kind, load_scorer

        base, *adapters = model_parts(folder)
        if not (Path(base) / "config.json").is_file() and (Path(base) / "adapter_config.json").is_file():
            raise UserError(
                f"{folder}: is an adapter of a reward model; write its base before it: base+adapter"
            )
        if not adapters and (Path(base) / "config.json").is_file():
            folder_kind(base, ("text classifier",))
        self.model, self.tokenizer, self.folder, self.rows = (
            load_scorer(base),
            load_tokenizer(base),
            folder,
            rows,
        )
        for adapter in adapters:
            self.model = load_adapter(self.model, adapter)
        self.pad = padding(self.model, self.tokenizer)
        self.model.requires_grad_(False).eval().to(device())

    def score(self, conversations: Sequence[Messages]) -> list[float]:
        """Returns the reward of each conversation, which ends with the assistant's answer.

        Raises:
            UserError: one that ends otherwise, or is longer than the model takes.
        """
        import torch

        from galenic.align.policy import padded

        encoded = [self._encode(messages, number) for number, messages in enumerate(conversations)]
        order = sorted(range(len(encoded)), key=lambda number: len(encoded[number]))
        scores = [0.0] * len(encoded)
        for start in range(0, len(order), self.rows):
            some = order[start : start + self.rows]
            ids = padded([encoded[number] for number in some], self.pad)
            lengths = torch.tensor([len(encoded[number]) for number in some])
            real = torch.arange(ids.shape[1]) < lengths[:, None]
            place = self.model.device
            with torch.no_grad():
                found = rewards_of(self.model, ids.to(place), real.to(place)).tolist()
            for number, score in zip(some, found, strict=True):
                scores[number] = score
        return scores

    def refusal(self, messages: Messages) -> str:
        """Says why a conversation cannot be written in the model's chat format; empty if it can.

        What a policy samples may spell out one of the format's markers.
        """
        try:
            encode_answered(self.tokenizer, messages)
        except (IndexError, ValueError) as error:
            return str(error)
        return ""

    def _encode(self, messages: Messages, number: int) -> list[int]:
        try:
            ids = encode_answered(self.tokenizer, messages)
        except (IndexError, ValueError) as error:
            raise UserError(f"{self.folder}: conversation {number} cannot be scored ({error})") from None
        most = getattr(self.model.config, "max_position_embeddings", len(ids))
        if len(ids) > most:
            raise UserError(
                f"{self.folder}: conversation {number} has {len(ids)} tokens, more than the {most} that the reward "
                "model takes (max_position_embeddings in its config.json): shorten the answers"
            )
        return ids


# ---------------------------------------------------------------------------- training


class RewardObjective:
    """The loss of a batch of `Pairs` (`galenic.pretrain.loop.Objective`); a unit is a pair."""

    measures = ("accuracy", "reward", "reward_margin", "length")

    def __init__(self, centre: float) -> None:
        self.centre = centre

    def units(self, part: Mapping[str, Any]) -> float:
        """Counts pairs."""
        return len(part["margins"])

    def __call__(
        self, model: Any, part: Mapping[str, Any], units: float
    ) -> tuple["torch.Tensor", dict[str, tuple[float, float]]]:
        """Computes loss and measures of a part."""
        rewards = pair_rewards(model, part)
        losses = reward_loss(rewards, part["margins"], self.centre)
        told, pairs = rewards.detach().double(), len(rewards)
        leads = told[:, 0] - told[:, 1]
        return losses.sum() / units, {
            "accuracy": (in_order(leads), pairs),
            "reward": (float(told[:, 0].sum()), pairs),
            "reward_margin": (float(leads.sum()), pairs),
            "length": (float(part["answers"].sum()), 2 * pairs),
        }


def pair_rewards(model: Any, part: Mapping[str, Any]) -> "torch.Tensor":
    """Returns the rewards (pairs, 2) of a batch of `Pairs`."""
    real = part["answers"].flip(1).cumsum(1).flip(1) > 0  # an answer reaches to the end of its text
    return rewards_of(model, part["input_ids"], real).view(-1, 2)


def heldout_score(run: Any, pairs: list[Pair], config: RewardConfig, pad: int) -> dict[str, float]:
    """Measures a run's model on held-out pairs; each process scores its share."""
    import torch

    rewards = torch.zeros(len(pairs), 2, dtype=torch.float64)
    for some, counts in in_turn(pairs, config.rows, run.parallel):
        part = {
            name: tensor.to(run.trainer.device) for name, tensor in collate_pairs(pairs[some], pad).items()
        }
        with torch.no_grad():
            found = pair_rewards(run.model, part)
        if counts:
            rewards[some] = found.double().cpu()
    rewards = run.parallel.added(rewards)
    margins = torch.tensor([pair.margin for pair in pairs], dtype=torch.float64)
    leads = rewards[:, 0] - rewards[:, 1]
    return {
        "loss": float(reward_loss(rewards, margins, config.centre).mean()),
        **calibration(leads),
        "reward": float(rewards[:, 0].mean()),
        "reward_margin": float(leads.mean()),
        "reward_deviation": float(rewards.std()),
    }


def plan(config: RewardConfig) -> Plan:
    """What the verb would do."""
    count, steps = steps_of(config)
    objective = f"Bradley-Terry, rewards kept around 0 with weight {config.centre:g}"
    facts = {"pairs": human(count), "objective": objective}
    return planned(config, facts, length=f"about {steps} steps of {config.rows} pairs")


def run(config: RewardConfig) -> None:
    """Trains; continues where a killed run stopped, to the same bytes."""
    from galenic.model.foreign import load_scorer

    with opened("reward", config, load=load_scorer) as run:
        if run is None:
            return
        run.check_context(config.context)
        pairs, heldout, dropped = trained_and_heldout(config, run.tokenizer)
        pad = padding(run.model, run.tokenizer)
        batches = Pairs(
            pairs, rows=config.rows, epochs=config.epochs, context=config.context, seed=config.seed, pad=pad
        )
        run.fit(
            batches,
            RewardObjective(config.centre),
            steps=batches.steps,
            score=lambda: heldout_score(run, heldout, config, pad),
        )
        run.write(
            {"pairs": len(pairs), "heldout": len(heldout), "dropped": dropped},
            title="A reward model",
            pairs=Path(config.pairs).name,
            centre=config.centre,
        )
