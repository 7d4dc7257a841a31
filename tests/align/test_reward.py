"""Reward models: the loss by hand, calibration by hand, pairs that can be told apart, and the folder that comes out."""

import json
import math

import pytest
import torch
from pair_helpers import drawn_pairs, question, write_pairs
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from align_helpers import files, our_folder, ours, rows
from galenic.align import reward
from galenic.align.config import LoraConfig, PpoConfig, RewardConfig, RewardsConfig
from galenic.align.pairs import collate_pairs
from galenic.align.reward import RewardModel, calibration, reward_loss
from galenic.model import BaichuanM1ForCausalLM, load, load_tokenizer, save
from galenic.model.folder import as_scorer, load_classifier
from galenic.model.foreign import load_any, load_scorer
from galenic.pretrain.config import CheckpointConfig, OptimConfig
from galenic.runtime import UserError, folder_name, read_json

# ---------------------------------------------------------------------------- the mathematics


def test_the_loss_is_bradley_and_terrys_with_a_margin_and_a_centre():
    rewards = torch.tensor([[1.0, -0.5], [0.2, 0.2], [-2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    margins = torch.tensor([0.0, 0.7, 1.0], dtype=torch.float64)
    losses = reward_loss(rewards, margins, 0.1)
    by_hand = [
        math.log(1 + math.exp(-1.5)) + 0.1 * 0.25,
        math.log(1 + math.exp(0.7)) + 0.1 * 0.16,
        math.log(1 + math.exp(4.0)) + 0.1 * 1.0,
    ]
    assert losses.tolist() == pytest.approx(by_hand, abs=1e-12)
    losses.sum().backward()
    for (chosen, rejected), margin, slope in zip(rewards.tolist(), margins, rewards.grad, strict=True):
        unsure = 1 / (1 + math.exp(chosen - rejected - margin))
        pull = 0.2 * (chosen + rejected)
        assert slope.tolist() == pytest.approx([pull - unsure, pull + unsure], abs=1e-12)
    assert float(reward_loss(torch.zeros(1, 2), torch.zeros(1), 5.0)) == pytest.approx(math.log(2))


def test_calibration_by_hand():
    def logit(p):
        return math.log(p / (1 - p))

    # Four at 0.925, of whom three are right; two at 0.625, both right; a tie.
    leads = [logit(0.925)] * 3 + [-logit(0.925)] + [logit(0.625)] * 2 + [0.0]
    leads = torch.tensor(leads, dtype=torch.float64)
    found = calibration(leads)
    assert found["accuracy"] == pytest.approx(5.5 / 7)
    assert found["brier"] == pytest.approx((3 * 0.075**2 + 0.925**2 + 2 * 0.375**2 + 0.25) / 7)
    assert found["calibration_error"] == pytest.approx((4 * 0.175 + 2 * 0.375 + 0) / 7)
    nothing = calibration(torch.zeros(9))
    assert nothing == {"accuracy": 0.5, "brier": 0.25, "calibration_error": 0.0}
    sure = calibration(torch.full((9,), 800.0))
    assert sure == {"accuracy": 1.0, "brier": 0.0, "calibration_error": 0.0}


def test_a_perfectly_calibrated_model_has_no_error_in_the_long_run():
    generator = torch.Generator().manual_seed(0)
    strength = torch.randn(40_000, generator=generator, dtype=torch.float64) * 2
    won = torch.rand(40_000, generator=generator, dtype=torch.float64) < strength.sigmoid()
    leads = torch.where(won, strength, -strength)
    assert calibration(leads)["calibration_error"] < 0.01
    assert calibration(3 * leads)["calibration_error"] > 0.05  # too sure of itself


# ---------------------------------------------------------------------------- the network


def scorer(seed=0):
    model = as_scorer(ours(64, seed))
    with torch.no_grad():
        model.score.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.double()


def test_the_score_is_read_off_the_last_real_token_wherever_padding_is():
    model = scorer()
    texts = [torch.tensor([5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 2]), torch.tensor([20, 21, 2])]
    alone = []
    for text in texts:
        state = model.model(text[None]).last_hidden_state[0, -1]
        alone.append((state @ model.score.weight[0]).item())
        assert model(text[None]).logits.item() == pytest.approx(alone[-1], abs=1e-12)
    for side in ("right", "left"):
        ids = torch.full((2, 11), model.config.pad_token_id)
        ids[0] = texts[0]
        ids[1, :3] = texts[1]
        if side == "left":
            ids[1] = ids[1].roll(8)
        mask = (ids != model.config.pad_token_id).long()
        scores = model(ids, attention_mask=mask).logits[:, 0]
        assert scores.tolist() == pytest.approx(alone, abs=1e-9), side
        if side == "right":  # a causal network needs no mask then
            assert model(ids).logits[:, 0].tolist() == pytest.approx(alone, abs=1e-9)
    embedded = model(inputs_embeds=model.model.embed_tokens(texts[0][None])).logits
    assert embedded.item() == pytest.approx(alone[0], abs=1e-12)


def test_what_cannot_be_scored_is_refused():
    model = scorer()
    with pytest.raises(ValueError, match="nothing but padding"):
        model(torch.tensor([[5, 6], [3, 3]]))
    model.config.pad_token_id = None
    assert model(torch.tensor([[5, 6]])).logits.shape == (1, 1)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        model(torch.tensor([[5, 6], [7, 8]]))


def test_a_scorer_of_several_labels_is_a_classifier():
    base = ours(vocab_size=64)
    base.config.num_labels = 3
    from galenic.model.modeling_baichuan_m1 import BaichuanM1ForSequenceClassification

    model = BaichuanM1ForSequenceClassification(base.config)
    output = model(torch.tensor([[5, 6, 7], [8, 9, 3]]), labels=torch.tensor([2, 0]))
    assert output.logits.shape == (2, 3)
    expected = torch.nn.functional.cross_entropy(output.logits, torch.tensor([2, 0]))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    assert model.score.weight.grad.abs().max() > 0


def test_training_starts_from_the_language_model_and_a_score_of_zero(base):
    language, model = load(base), load_scorer(base)
    shared = language.state_dict()
    assert model.score.weight.abs().max() == 0 and model.config.num_labels == 1
    names = set(model.state_dict()) - {"score.weight"}
    assert names == set(shared) - {"lm_head.weight"}
    assert all(torch.equal(model.state_dict()[name], shared[name]) for name in names)
    assert language.config.num_labels == 2  # its own config is as it was


def test_padding_is_a_token_that_no_text_ends_with(base, llama_folder):
    ours = load_scorer(base)
    assert reward.padding(ours, load_tokenizer(base)) == 3
    theirs, tokenizer = load_scorer(llama_folder), load_tokenizer(llama_folder)
    assert theirs.config.pad_token_id is None and tokenizer.eos_token_id == 2
    assert reward.padding(theirs, tokenizer) == theirs.config.pad_token_id == tokenizer.bos_token_id
    tokenizer.pad_token = tokenizer.eos_token  # the habit that makes others read the token before the end
    theirs.config.pad_token_id = tokenizer.eos_token_id
    assert reward.padding(theirs, tokenizer) != tokenizer.eos_token_id


@pytest.mark.parametrize("kind", ["ours", "another's"])
def test_rewards_of_a_batch_are_those_of_each_text_alone(kind, base, llama_folder):
    folder = base if kind == "ours" else llama_folder
    model = load_scorer(folder).double()
    torch.nn.init.normal_(model.score.weight, generator=torch.Generator().manual_seed(1))
    pad = reward.padding(model, load_tokenizer(folder))
    pairs = drawn_pairs(5, 300)
    with torch.no_grad():
        found = reward.pair_rewards(model, collate_pairs(pairs, pad))
        for pair, scores in zip(pairs, found, strict=True):
            for ids, score in zip((pair.chosen, pair.rejected), scores, strict=True):
                state = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
                assert float(score) == pytest.approx((state @ model.score.weight[0]).item(), abs=1e-9)


# ---------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_step):
    return our_folder(tmp_path_factory.mktemp("base") / "model", tokenizer_step)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl")


def run(out, model, pairs, **changes):
    out.mkdir(parents=True, exist_ok=True)
    values = {"out": str(out), "model": str(model), "pairs": str(pairs), "rows": 4, "epochs": 3.0}
    values |= {"context": 128, "heldout_share": 0.2, "optim": OptimConfig(lr=3e-3, warmup_steps=1)}
    reward.run(RewardConfig(**(values | changes)))


def conversation(index, word):
    answer = {"role": "assistant", "content": f"drug {word}."}
    return [{"role": "user", "content": question(index)}, answer]


def scores_of(folder):
    return RewardModel(folder).score(
        [conversation(i, word) for i in range(50, 58) for word in ("mild", "severe")]
    )


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4)])
@pytest.mark.parametrize("kind", ["ours", "another's"])
def test_pairs_that_can_be_told_apart_are_told_apart(kind, lora, base, llama_folder, pairs, tmp_path):
    folder = base if kind == "ours" else llama_folder
    for name in ("a", "b"):
        run(tmp_path / name, folder, pairs, lora=lora)
    before, after = rows(tmp_path / "a", "heldout")
    assert (before["accuracy"], before["brier"], before["calibration_error"]) == (0.5, 0.25, 0.0)
    assert before["loss"] == pytest.approx(math.log(2)) and before["reward_deviation"] == 0
    assert after["accuracy"] == 1.0 and after["brier"] < 0.15 and after["reward_margin"] > 1
    assert files(tmp_path / "a" / "model") == files(tmp_path / "b" / "model")
    made = str(tmp_path / "a" / "model")
    scores = scores_of(f"{folder}+{made}" if lora else made)
    assert all(mild > severe for mild, severe in zip(scores[::2], scores[1::2], strict=True))
    if lora:
        with pytest.raises(UserError, match=r"is an adapter of a reward model; .*base\+adapter"):
            RewardModel(made)


def test_what_ppo_reads_of_a_reward_model_with_an_adapter():
    for model, parts in (("b+a", ["b", "a"]), ("m", ["m"]), (None, [])):
        config = PpoConfig(out="o", model="p", tasks="t", rewards=RewardsConfig(model=model))
        assert config.reads() == ["p", "t", *parts]


def test_an_adapter_of_another_model_is_refused(base, llama_folder, pairs, tmp_path):
    run(tmp_path / "a", base, pairs, lora=LoraConfig(rank=2), epochs=0.2)
    with pytest.raises(UserError, match="no adapter of this model"):
        RewardModel(f"{llama_folder}+{tmp_path / 'a' / 'model'}")
    with pytest.raises(UserError, match="no LoRA adapter there"):
        RewardModel(f"{base}+{tmp_path / 'nowhere'}")


def test_a_reward_model_is_a_folder_that_others_open(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs)
    made = tmp_path / "a" / "model"
    config = read_json(made / "config.json")
    assert config["architectures"] == ["BaichuanM1ForSequenceClassification"]
    assert config["auto_map"]["AutoModelForSequenceClassification"].endswith(
        ".BaichuanM1ForSequenceClassification"
    )
    names = set(load_file(made / "model.safetensors"))
    assert names == set(load_file(base / "model.safetensors")) - {"lm_head.weight"} | {"score.weight"}
    card = (made / "README.md").read_text()
    assert "AutoModelForSequenceClassification.from_pretrained" in card and "text-classification" in card
    assert not (made / "generation_config.json").exists()
    theirs = AutoModelForSequenceClassification.from_pretrained(made).eval()
    tokenizer = load_tokenizer(made)
    texts = [conversation(i, "mild") for i in range(3)]
    with torch.no_grad():
        ids = [tokenizer.apply_chat_template(text, return_tensors="pt", return_dict=False) for text in texts]
        alone = [float(theirs(row).logits) for row in ids]
    assert RewardModel(str(made)).score(texts) == pytest.approx(alone, abs=1e-5)
    again = load_classifier(made)
    save(
        again,
        tmp_path / "again",
        tokenizer=made,
        provenance=read_json(made / "galenic.json"),
        parents=[folder_name(str(base))],
    )
    assert files(tmp_path / "again") == files(made)


def test_a_reward_model_is_no_language_model_and_the_other_way_round(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs, epochs=0.2)
    made = tmp_path / "a" / "model"
    with pytest.raises(UserError, match="a BaichuanM1ForSequenceClassification lies here"):
        load(made)
    with pytest.raises(UserError, match="is of kind text classifier; here only causal language model"):
        load_any(made)
    with pytest.raises(UserError, match="a BaichuanM1ForCausalLM lies here"):
        load_classifier(base)
    with pytest.raises(UserError, match="text classifier"):
        RewardModel(str(base))
    with pytest.raises(UserError, match="no such model folder"):
        RewardModel(str(tmp_path / "nowhere"))


def test_training_goes_on_from_a_reward_model(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs)
    run(tmp_path / "b", tmp_path / "a" / "model", pairs, epochs=0.5)
    ended, begun = rows(tmp_path / "a", "heldout")[1], rows(tmp_path / "b", "heldout")[0]
    for name in ("loss", "accuracy", "reward", "brier"):
        assert begun[name] == pytest.approx(ended[name], rel=1e-4)


def test_a_classifier_of_several_labels_is_refused(llama_folder, tmp_path, pairs):
    model = AutoModelForSequenceClassification.from_pretrained(llama_folder, num_labels=3)
    model.save_pretrained(tmp_path / "three")
    with pytest.raises(UserError, match="a classifier of 3 labels; a reward model has one"):
        load_scorer(tmp_path / "three")


def test_missing_weights_are_refused_although_the_head_may_be(llama_folder, tmp_path):
    import shutil

    broken = shutil.copytree(llama_folder, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    save_file(
        {n: t for n, t in tensors.items() if "norm" not in n},
        broken / "model.safetensors",
        metadata={"format": "pt"},
    )
    with pytest.raises(UserError, match=r"5 missing tensors in the weights, such as model.layers.0"):
        load_scorer(broken)


def test_margins_ask_for_a_wider_lead(base, tmp_path):
    leads = {}
    for margin in (0.0, 6.0):
        file = write_pairs(tmp_path / f"{margin}.jsonl", margin=margin)
        run(tmp_path / f"m{margin}", base, file, optim=OptimConfig(lr=1e-2, warmup_steps=1), epochs=5.0)
        leads[margin] = rows(tmp_path / f"m{margin}", "heldout")[1]["reward_margin"]
    assert leads[6.0] > 1.5 * leads[0.0]


def test_the_centre_keeps_rewards_around_zero(base, pairs, tmp_path):
    sums = {}
    for centre in (0.0, 1.0):
        run(tmp_path / str(centre), base, pairs, centre=centre)
        row = rows(tmp_path / str(centre), "heldout")[1]
        sums[centre] = abs(2 * row["reward"] - row["reward_margin"])
        assert row["accuracy"] == 1.0
    assert sums[1.0] < 0.2 * row["reward_margin"]


def test_a_run_that_was_cut_ends_with_the_same_bytes(base, pairs, tmp_path, monkeypatch):
    often = CheckpointConfig(seconds=0, asynchronous=False)
    run(tmp_path / "whole", base, pairs, epochs=1.0, checkpoints=often)
    real, calls = reward.RewardObjective.__call__, []

    def cut(self, *arguments):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return real(self, *arguments)

    monkeypatch.setattr(reward.RewardObjective, "__call__", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", base, pairs, epochs=1.0, checkpoints=often)
    monkeypatch.undo()
    run(tmp_path / "cut", base, pairs, epochs=1.0, checkpoints=often)
    assert files(tmp_path / "cut" / "model") == files(tmp_path / "whole" / "model")


def test_scores_do_not_depend_on_the_company(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs)
    model = RewardModel(str(tmp_path / "a" / "model"), rows=3)
    texts = [conversation(i, "mild " * (1 + i % 4)) for i in range(8)]
    together = model.score(texts)
    assert together == pytest.approx([model.score([text])[0] for text in texts], abs=1e-5)
    assert model.score(texts[::-1]) == pytest.approx(together[::-1], abs=1e-5)
    assert model.score([]) == []


def test_what_cannot_be_scored_is_named(base, pairs, tmp_path):
    run(tmp_path / "a", base, pairs, epochs=0.2)
    model = RewardModel(str(tmp_path / "a" / "model"))
    good = conversation(0, "mild")
    with pytest.raises(
        UserError, match=r"conversation 1 cannot be scored .*last message is not the assistant's"
    ):
        model.score([good, good[:1]])
    with pytest.raises(UserError, match=r"conversation 0 cannot be scored .*at least one message"):
        model.score([[]])
    with pytest.raises(UserError, match=r"conversation 0 has \d+ tokens, more than the 256"):
        model.score([conversation(0, "asthma " * 300)])
    # An answer of nothing ends as well, and has a reward.
    assert math.isfinite(model.score([[good[0], {"role": "assistant", "content": ""}]])[0])


def test_a_pair_without_a_difference_stops_before_any_work(base, tmp_path):
    path = tmp_path / "same.jsonl"
    path.write_text(json.dumps({"prompt": "x", "chosen": "a", "rejected": "a"}) + "\n")
    with pytest.raises(UserError, match=r"same.jsonl:1: not a pair"):
        run(tmp_path / "a", base, path)
    assert not (tmp_path / "a" / "model").exists()


def test_the_plan(base, pairs):
    facts = reward.plan(RewardConfig(out="o", model=str(base), pairs=str(pairs), rows=4)).facts
    assert facts["training"].startswith("about 14 steps of 4 pairs") and facts["pairs"] == "60"
    with pytest.raises(UserError, match="no such file"):
        reward.plan(RewardConfig(out="o", model=str(base), pairs="missing.jsonl"))


def test_a_language_model_of_ours_opens_as_a_classifier_of_any_size(base):
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=4)
    assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 4)
    assert isinstance(load(base), BaichuanM1ForCausalLM)
