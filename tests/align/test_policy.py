"""Policies and references of any architecture: what is said of tokens is what their own logits say."""

import copy

import pytest
import torch

from align_helpers import foreign, our_folder, ours
from galenic.align.config import LoraConfig, ReferenceConfig
from galenic.align.lora import add_adapter
from galenic.align.policy import (
    Reference,
    head_is_product,
    hidden_and_states,
    padded,
    per_row,
    states,
    statistics,
)
from galenic.runtime import UserError

KINDS = {
    "ours": (lambda: ours(64), True),
    "plain head": (lambda: ours(64, norm_head=False), True),
    "llama": (lambda: foreign("llama"), True),
    "gpt2": (lambda: foreign("gpt2"), True),
    "gemma2": (lambda: foreign("gemma2"), False),
    "cohere": (lambda: foreign("cohere"), False),
    "granite": (lambda: foreign("granite"), False),
    "phi": (lambda: foreign("phi"), False),
}


@pytest.fixture(params=list(KINDS))
def kind(request):
    return request.param


def batch(rows=3, length=12, seed=0):
    """Rows of different lengths, right-padded, and the tokens whose statistics are wanted."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, 64, (rows, length), generator=generator)
    lengths = torch.tensor([length - 3 * row for row in range(rows)])[:, None]
    places = torch.arange(length)[None]
    ids[places >= lengths] = 3
    return ids, (places >= 2) & (places < lengths)


def moved(model, size=0.05, seed=3):
    """A copy of a model with other weights."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.double()


# ---------------------------------------------------------------------------- head and states


def test_what_a_head_is(kind):
    make, product = KINDS[kind]
    assert head_is_product(make()) is product


def test_small_weights_hide_no_cap():
    """Logits near zero go through a cap unchanged; trained ones would not."""
    model = foreign("gemma2", final_logit_softcapping=30.0, initializer_range=1e-3)
    assert head_is_product(model) is False


def test_states_give_the_models_logits(kind):
    make, product = KINDS[kind]
    model, (ids, _) = make(), batch()
    with torch.no_grad():
        hidden, weight = states(model, {"input_ids": ids}, product=product)
        found = hidden if weight is None else hidden @ weight.T
    assert (weight is not None) is product
    torch.testing.assert_close(found.double(), logits_of(model, ids), atol=1e-5, rtol=1e-5)
    # ... and the head is as it was.
    assert model(input_ids=ids, use_cache=False).logits.shape == (*ids.shape, 64)


def test_hidden_states_come_along(kind):
    make, product = KINDS[kind]
    model, (ids, _) = make(), batch()
    with torch.no_grad():
        hidden, found = hidden_and_states(model, {"input_ids": ids}, product=product)
        logits = model.get_output_embeddings()(hidden).double()
    assert hidden.shape == (*ids.shape, 32)
    assert (found[0] is hidden) is product
    if kind not in ("gemma2", "cohere", "granite"):
        torch.testing.assert_close(logits, logits_of(model, ids), atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_statistics_are_those_of_the_models_own_logits(kind, temperature):
    make, product = KINDS[kind]
    policy = make()
    reference = Reference(policy, ReferenceConfig(), base="base")
    policy = moved(policy)
    ids, wanted = batch()
    found = statistics(
        policy,
        {"input_ids": ids},
        wanted,
        product=product,
        reference=reference,
        temperature=temperature,
    )
    p, q = (
        (logits_of(model, ids) / temperature).log_softmax(-1)[:, :-1][wanted[:, 1:]]
        for model in (policy, reference.model)
    )
    targets = ids[wanted][:, None]
    close = {"atol": 2e-4, "rtol": 1e-4}
    torch.testing.assert_close(found.log_probs.double(), p.gather(-1, targets)[:, 0], **close)
    torch.testing.assert_close(found.reference_log_probs.double(), q.gather(-1, targets)[:, 0], **close)
    torch.testing.assert_close(found.entropy.double(), -(p.exp() * p).sum(-1), **close)
    torch.testing.assert_close(found.kl.double(), (q.exp() * (q - p)).sum(-1), **close)
    assert found.kl.mean() > 1e-3
    found.kl.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.parameters())
    assert all(parameter.grad is None for parameter in reference.model.parameters())


def test_what_follows_a_row_does_not_count(kind):
    make, product = KINDS[kind]
    model, (ids, wanted) = make(), batch()
    with torch.no_grad():
        together = statistics(model, {"input_ids": ids}, wanted, product=product)
        sums = per_row(together.log_probs, wanted)
        for row in range(len(ids)):
            length = int(wanted[row].nonzero().max()) + 1
            alone = statistics(
                model,
                {"input_ids": ids[row : row + 1, :length]},
                wanted[row : row + 1, :length],
                product=product,
            )
            assert float(alone.log_probs.sum()) == pytest.approx(float(sums[row]), rel=1e-5)


def test_sums_by_row_keep_gradients_and_empty_rows():
    wanted = torch.tensor([[0, 1, 1], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    values = torch.tensor([1.0, 2.0, 4.0], requires_grad=True)
    sums = per_row(values, wanted)
    assert sums.tolist() == [3.0, 0.0, 4.0]
    (sums * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0, 100.0]


def test_padding_stands_on_the_right():
    assert padded([[5, 6], [7], [8, 9, 10]], 0).tolist() == [[5, 6, 0], [7, 0, 0], [8, 9, 10]]


# ---------------------------------------------------------------------------- the reference


def with_adapter(model, **settings):
    """A model with an adapter that does something."""
    model = add_adapter(model, LoraConfig(rank=2, **settings), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_under_an_adapter_the_base_is_the_reference(kind):
    make, product = KINDS[kind]
    base, (ids, wanted) = make(), batch()
    expected = logits_of(base, ids)
    policy = with_adapter(make())
    policy.train()
    reference = Reference(policy, ReferenceConfig(), base="base")
    assert reference.model is None and reference.product is product
    trained = [name for name, p in policy.named_parameters() if p.requires_grad]
    hidden, weight = reference.states({"input_ids": ids})
    found = hidden if weight is None else hidden @ weight.T
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    assert trained and trained == [name for name, p in policy.named_parameters() if p.requires_grad]
    assert (logits_of(policy, ids) - expected).abs().max() > 0.1  # the adapter is back
    statistics(
        policy, {"input_ids": ids}, wanted, product=head_is_product(policy), reference=reference
    ).kl.sum().backward()
    assert all((p.grad is not None) is p.requires_grad for p in policy.parameters())


def test_an_adapted_head_is_no_product():
    policy, (ids, wanted) = (
        with_adapter(foreign("llama", tie_word_embeddings=False), targets=["lm_head"]),
        batch(),
    )
    assert head_is_product(policy) is False
    with torch.no_grad():
        found = statistics(policy, {"input_ids": ids}, wanted, product=False)
    expected = logits_of(policy, ids).log_softmax(-1)[:, :-1][wanted[:, 1:]]
    targets = ids[wanted][:, None]
    torch.testing.assert_close(
        found.log_probs.double(), expected.gather(-1, targets)[:, 0], atol=1e-4, rtol=1e-4
    )


def test_a_reference_stays_where_it_began(kind):
    make, _product = KINDS[kind]
    policy, (ids, _wanted) = make(), batch()
    before = logits_of(policy, ids)
    reference = Reference(policy, ReferenceConfig(offload=True), base="base")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    hidden, weight = reference.states({"input_ids": ids})
    found = hidden if weight is None else hidden @ weight.T
    torch.testing.assert_close(found.double(), before, atol=1e-5, rtol=1e-5)
    assert not any(parameter.requires_grad for parameter in reference.model.parameters())


def test_a_reference_of_other_tokens_is_refused(llama_folder, tokenizer_step, tmp_path):
    from galenic.model.foreign import load_any

    policy = load_any(llama_folder)
    other = str(our_folder(tmp_path / "other", tokenizer_step))
    with pytest.raises(UserError, match=r"reference.model: .*other has 512 tokens, base has \d+"):
        Reference(policy, ReferenceConfig(model=other), base="base")


def test_a_reference_with_as_many_other_tokens_is_refused(llama_folder, tmp_path):
    import json
    import shutil

    from galenic.model.foreign import load_any

    other = tmp_path / "other"
    shutil.copytree(llama_folder, other)
    text = json.loads((other / "tokenizer.json").read_text())
    vocabulary = text["model"]["vocab"]
    first, second = (name for name, number in vocabulary.items() if number in (10, 11))
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(text))
    with pytest.raises(UserError, match=r"reference.model: .*other has other tokens than .*model"):
        Reference(load_any(llama_folder), ReferenceConfig(model=str(other)), base=str(llama_folder))
    same = Reference(load_any(llama_folder), ReferenceConfig(model=str(llama_folder)), base=str(llama_folder))
    assert same.model is not None
