"""Every way of running the network gives the same numbers."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from model_helpers import (
    VOCABULARY,
    all_close,
    build,
    close,
    flex_unfused,
    gradients,
    in_chunks,
    padded,
    positions_of,
    shapes,
    tokens,
)
from transformers import AutoModelForCausalLM, DynamicCache, QuantizedCache, StaticCache

from galenic.model import load
from galenic.model.modeling_baichuan_m1 import linear_cross_entropies, linear_cross_entropy

IGNORED = -100


def attending(model):
    unfused = model.config._attn_implementation == "flex_attention"
    return flex_unfused() if unfused else contextlib.nullcontext()


# ---------------------------------------------------------------------------- chunks


@settings(deadline=None, max_examples=60)
@given(shapes(), st.sampled_from(("sdpa", "eager")), st.sampled_from(("dynamic", "static")), st.data())
def test_any_split_into_chunks_is_the_whole(shape, attention, kind, data):
    model = build(attention, **shape)
    length = data.draw(st.integers(2, 24))
    lengths = data.draw(st.lists(st.integers(1, length), min_size=1, max_size=3))
    texts = [tokens(1, n, i, model.config.vocab_size)[0] for i, n in enumerate([length, *lengths])]
    rows, mask = padded(texts, ["left"] * len(texts))
    cuts = data.draw(st.one_of(st.just(range(1, length)), st.sets(st.integers(1, length - 1))))
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=length)
    with torch.no_grad():
        whole = model(rows, attention_mask=mask).logits
        close(in_chunks(model, rows, cuts, cache, mask)[mask.bool()], whole[mask.bool()])


@pytest.mark.parametrize("conv_window", [1, 2, 4])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_chunks_round_no_worse_than_the_whole(attention, conv_window):
    lower = build(attention, torch.bfloat16, conv_window=conv_window)
    exact = copy.deepcopy(lower).double()
    single = copy.deepcopy(lower).float()
    rows = tokens(3, 30)
    with torch.no_grad():
        truth = exact(rows).logits
        error = {}
        for name, model, cuts in (
            ("whole", lower, ()),
            ("chunks", lower, (4, 5, 17)),
            ("tokens", lower, range(1, 30)),
            ("single", single, range(1, 30)),
        ):
            difference = in_chunks(model, rows, cuts).double() - truth
            error[name] = float(difference.square().mean().sqrt() / truth.square().mean().sqrt())
    assert 1e-4 < error["whole"] < 0.05
    assert error["chunks"] < 2 * error["whole"] and error["tokens"] < 2 * error["whole"]
    assert error["single"] < 1e-5


# ---------------------------------------------------------------------------- padding


@settings(deadline=None, max_examples=40)
@given(shapes(), st.sampled_from(("sdpa", "eager", "flex_attention")), st.data())
def test_padded_rows_are_the_rows_alone(shape, attention, data):
    model = build(attention, **shape)
    row = st.tuples(st.integers(1, 15), st.sampled_from(("left", "right")))
    lengths, sides = zip(*data.draw(st.lists(row, min_size=1, max_size=4)), strict=True)
    texts = [tokens(1, n, i, model.config.vocab_size)[0] for i, n in enumerate(lengths)]
    rows, mask = padded(texts, list(sides))
    with attending(model), torch.no_grad():
        out = model(rows, attention_mask=mask, labels=rows)
        assert bool(out.logits.isfinite().all())
        total = 0.0
        for i, text in enumerate(texts):
            alone = model(text[None], labels=text[None], num_items_in_batch=1)
            close(out.logits[i][mask[i].bool()], alone.logits[0])
            total += alone.loss
    close(out.loss, total / max(1, sum(lengths) - len(lengths)))


@settings(deadline=None, max_examples=40)
@given(shapes(), st.sampled_from(("sdpa", "eager")), st.data())
def test_holes_in_a_mask_are_honoured_or_refused(shape, attention, data):
    model = build(attention, **shape)
    length = data.draw(st.integers(1, 12))
    bits = st.lists(st.integers(0, 1), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(bits), data.draw(bits), [1] * length])
    rows = tokens(3, length, vocabulary=model.config.vocab_size)
    with torch.no_grad():
        try:
            logits = model(rows, attention_mask=mask).logits
        except ValueError as error:
            assert "padding between real tokens" in str(error)
            assert model.config.sliding_window_layers and length > model.config.sliding_window
            assert any("10" in "".join(map(str, row)).strip("0") for row in mask.tolist())
            return
        assert bool(logits.isfinite().all())
        for row, kept, found in zip(rows, mask.bool(), logits, strict=True):
            if bool(kept.any()):
                close(found[kept], model(row[kept][None]).logits[0])


@settings(deadline=None, max_examples=25)
@given(shapes(sliding_window=40), st.lists(st.integers(1, 8), min_size=2, max_size=3), st.data())
def test_right_padded_prompts_are_continued(shape, lengths, data):
    model = build(**shape)
    vocabulary = model.config.vocab_size
    texts = [tokens(1, n, i, vocabulary)[0] for i, n in enumerate(lengths)]
    rows, mask = padded(texts, ["right"] * len(texts))
    more = tokens(len(texts), 6, 9, vocabulary)
    both, width = torch.cat((rows, more), 1), rows.shape[1]
    mask = torch.cat((mask, torch.ones_like(more)), 1)
    cuts = {width} | data.draw(st.sets(st.integers(width, both.shape[1] - 1)))
    with torch.no_grad():
        logits = in_chunks(model, both, cuts, mask=mask)
        for row, kept, found in zip(both, mask.bool(), logits, strict=True):
            close(found[kept], model(row[kept][None]).logits[0])


# ---------------------------------------------------------------------------- packing


@settings(deadline=None, max_examples=30)
@given(shapes(), st.sampled_from(("sdpa", "eager")), st.booleans(), st.data())
def test_packed_documents_are_the_documents_alone(shape, attention, skip_logits, data):
    model = build(attention, **shape)
    cut = st.sets(st.integers(1, 15), max_size=5)
    lengths = [
        [b - a for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), 16], strict=True)]
        for cuts in (data.draw(cut), data.draw(cut))
    ]
    rows = tokens(2, 16, vocabulary=model.config.vocab_size)
    documents = [text for row, sizes in zip(rows, lengths, strict=True) for text in row.split(sizes)]
    targets = sum(len(text) - 1 for text in documents)
    ends = [torch.tensor(sizes).cumsum(0) for sizes in lengths]
    seqlens = torch.stack([F.pad(end, (0, 16 - len(end))) for end in ends])
    positions = torch.stack([positions_of(sizes) for sizes in lengths])
    expected = torch.cat([model(text[None]).logits[0] for text in documents])
    alone = sum(model(text[None], labels=text[None], num_items_in_batch=targets).loss for text in documents)
    for names in ({"position_ids": positions}, {"seqlens": seqlens}):
        out = model(rows, labels=rows, skip_logits=skip_logits, **names)
        if not skip_logits:
            close(out.logits.flatten(0, 1), expected)
        close(out.loss, alone)
    all_close(gradients(out.loss, model), gradients(alone, model), 1e-8)
    first = model(rows[:1], cu_seq_lens_q=F.pad(ends[0], (1, 0)).int()).logits[0]
    close(first, expected[:16])


# ---------------------------------------------------------------------------- implementations


@settings(deadline=None, max_examples=40)
@given(shapes(), st.sampled_from(("plain", "padded", "packed", "cached")), st.integers(2, 16))
def test_attention_implementations_agree(shape, case, length):
    rows = tokens(2, length, vocabulary=shape["vocab_size"])
    options = {}
    kept = torch.ones_like(rows, dtype=torch.bool)
    if case == "padded":
        kept[0, : length // 2] = False
        options["attention_mask"] = kept
    if case == "packed":
        options["position_ids"] = positions_of([length - length // 2, length // 2])[None]
    logits, slopes = {}, {}
    for attention in ("eager", "sdpa", "flex_attention"):
        model = build(attention, **shape)
        with attending(model), torch.set_grad_enabled(attention != "flex_attention"):
            if case == "cached":
                logits[attention] = in_chunks(model, rows, range(1, length, 3))
            else:
                logits[attention] = model(rows, **options).logits
        if attention != "flex_attention":  # no backward on CPU
            slopes[attention] = gradients(logits[attention][kept].square().sum(), model)
    close(logits["sdpa"][kept], logits["eager"][kept])
    close(logits["flex_attention"][kept], logits["eager"][kept])
    scale = max(float(tensor.abs().max()) for tensor in slopes["eager"].values()) + 1
    for name, slope in slopes["eager"].items():
        close(slopes["sdpa"][name] / scale, slope / scale)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["plain", "padded", "packed"])
def test_fused_flex_attention(case, dtype):
    torch.compiler.reset()
    model = build("flex_attention", dtype)
    rows, options = tokens(2, 14), {}
    kept = torch.ones_like(rows, dtype=torch.bool)
    if case == "padded":
        kept[0, :5] = False
        options["attention_mask"] = kept
    if case == "packed":
        options["position_ids"] = positions_of([6, 8])[None]
    with torch.no_grad():
        found = model(rows, **options).logits[kept].double()
        model.set_attn_implementation("eager")
        truth = model.double()(rows, **options).logits[kept]
    error = float((found - truth).square().mean().sqrt() / truth.square().mean().sqrt())
    assert error < (1e-5 if dtype == torch.float32 else 0.05)


# ---------------------------------------------------------------------------- generation


def write(model, rows, mask=None, **options):
    mask = torch.ones_like(rows) if mask is None else mask
    torch.manual_seed(3)
    options = {"max_new_tokens": 14, "eos_token_id": None, "do_sample": False} | options
    return model.generate(rows, attention_mask=mask, **options)


def by_argmax(model, text: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        with torch.no_grad():
            text = torch.cat((text, model(text[None]).logits[0, -1:].argmax(-1)))
    return text


@settings(deadline=None, max_examples=15)
@given(shapes(), st.sampled_from(("sdpa", "eager")), st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_greedy_text_is_the_largest_logit_every_time(shape, attention, lengths):
    model = build(attention, **shape)
    texts = [tokens(1, n, i, model.config.vocab_size)[0] for i, n in enumerate(lengths)]
    rows, mask = padded(texts, ["left"] * len(texts))
    expected = torch.stack([by_argmax(model, text, 14)[-14:] for text in texts])
    for options in (
        {},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "static"},
        {"use_cache": False},
        {"prefill_chunk_size": 3},
    ):
        assert torch.equal(write(model, rows, mask, **options)[:, -14:], expected), options


@settings(deadline=None, max_examples=12)
@given(
    shapes(),
    st.sampled_from(
        (
            {"do_sample": True, "temperature": 0.8},
            {"do_sample": True, "top_k": 5, "num_return_sequences": 3},
            {"num_beams": 4, "num_return_sequences": 2},
            {"do_sample": True, "num_beams": 3},
            {"repetition_penalty": 1.3},
        )
    ),
)
def test_search_and_sampling_do_not_depend_on_the_cache(shape, options):
    model = build(**shape)
    texts = [tokens(1, n, n, model.config.vocab_size)[0] for n in (9, 4)]
    rows, mask = padded(texts, ["left", "left"])
    expected = write(model, rows, mask, use_cache=False, **options)
    for kind in ("dynamic", "static"):
        assert torch.equal(write(model, rows, mask, cache_implementation=kind, **options), expected)


@settings(deadline=None, max_examples=15)
@given(shapes(), st.integers(1, 6), st.sampled_from(("draft", "itself", "lookup")))
def test_speculation_gives_the_greedy_text(shape, guesses, kind):
    model = build(pad_token_id=None, **shape)
    row = tokens(1, 4, vocabulary=model.config.vocab_size).repeat(1, 3)
    options = {"prompt_lookup_num_tokens": guesses}
    if kind != "lookup":
        draft = copy.deepcopy(model)
        if kind == "draft":  # right often enough that every number of accepted tokens occurs
            with torch.no_grad():
                draft.lm_head.weight += 0.1 * torch.randn_like(draft.lm_head.weight)
        draft.generation_config.num_assistant_tokens = guesses
        draft.generation_config.num_assistant_tokens_schedule = "constant"
        draft.generation_config.assistant_confidence_threshold = 0.0
        options = {"assistant_model": draft}
    greedy = by_argmax(model, row[0], 20)
    out = write(model, row, max_new_tokens=14, return_dict_in_generate=True, **options)
    assert torch.equal(out.sequences[0], greedy[:-6])
    # what speculation leaves in the cache can be built upon
    cache, text = out.past_key_values, out.sequences
    assert cache.get_seq_length() == text.shape[1] - 1
    assert torch.equal(write(model, text, past_key_values=cache, max_new_tokens=6)[0], greedy)


def test_a_padding_token_drafted_within_the_text_is_refused():
    # The library drops the mask of the draft and infers one from the padding tokens, so these would become holes.
    model, draft, row = build(), build(seed=5), tokens(1, 4).repeat(1, 3)
    options = {"do_sample": True, "eos_token_id": None, "max_new_tokens": 20}
    with pytest.raises(ValueError, match="if the text itself holds the pad token"):
        for seed in range(20):
            torch.manual_seed(seed)
            model.generate(row, assistant_model=draft, **options)


def test_speculation_by_leaving_early():
    model, row = build(), tokens(1, 4).repeat(1, 3)
    assert torch.equal(write(model, row, assistant_early_exit=1)[0], by_argmax(model, row[0], 14))
    assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_generation_goes_on_from_a_cache(kind):
    model = build(conv_window=3)
    rows, mask = padded([tokens(1, n, n)[0] for n in (7, 4)], ["left", "left"])
    whole = write(model, rows, mask, max_new_tokens=12)
    cache = StaticCache(config=model.config, max_cache_len=30) if kind == "static" else None
    given = {} if cache is None else {"past_key_values": cache}
    first = write(model, rows, mask, max_new_tokens=5, return_dict_in_generate=True, **given)
    longer = torch.cat((mask, torch.ones(2, 5, dtype=torch.long)), 1)
    more = write(model, first.sequences, longer, max_new_tokens=7, past_key_values=first.past_key_values)
    assert torch.equal(more, whole)


def test_a_prompt_is_read_once_and_continued_many_times():
    model, prompt = build(conv_window=4), tokens(1, 9)
    with torch.no_grad():
        cache = model(prompt, use_cache=True).past_key_values
    for seed in (5, 6):
        rest = tokens(1, 3, seed)
        text = torch.cat((prompt, rest), 1)
        again = write(model, text, past_key_values=copy.deepcopy(cache))
        assert torch.equal(again[0], by_argmax(model, text[0], 14))


def test_a_cache_is_emptied_and_used_again():
    model = build(conv_window=3)
    cache = StaticCache(config=model.config, max_cache_len=12)
    for seed in (1, 2):
        row = tokens(1, 11, seed)
        with torch.no_grad():
            close(in_chunks(model, row, (4, 5), cache), model(row).logits)
        cache.reset()


@pytest.mark.parametrize("kind", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_an_accelerator(kind):
    model, row = build(), tokens(1, 8)
    if torch.cuda.is_available():
        model = model.cuda()
        assert torch.equal(write(model, row.cuda(), cache_implementation=kind), write(model, row.cuda()))
    else:
        with pytest.raises((AssertionError, RuntimeError), match="CUDA"):
            write(model, row, cache_implementation=kind)


def test_quantized_caches_are_refused():
    model, row = build(), tokens(1, 8)
    with pytest.raises(ValueError, match="only full attention layers"):
        write(model, row, cache_implementation="quantized")
    with pytest.raises(ValueError, match="only full attention layers"):
        QuantizedCache("quanto", config=model.config)


# ---------------------------------------------------------------------------- training


@settings(deadline=None, max_examples=15)
@given(
    shapes(), st.sampled_from(("plain", "padded", "packed")), st.booleans(), st.booleans(), st.integers(1, 2)
)
def test_activation_checkpointing_changes_nothing(shape, case, use_reentrant, skip_logits, every_n_layers):
    rows = tokens(2, 10, vocabulary=shape["vocab_size"])
    options: dict = {"skip_logits": skip_logits}
    if case == "padded":
        options["attention_mask"] = torch.ones_like(rows).index_fill(1, torch.tensor([0, 1]), 0)
    if case == "packed":
        options["position_ids"] = positions_of([4, 6])[None]
    found = []
    for on in (False, True):
        model = build(**shape).train()
        if on:
            checkpoint(model, use_reentrant, every_n_layers)
        loss = model(rows, labels=rows, **options).loss
        loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, slope in found[0].items():
        assert torch.equal(found[1][name], slope)


def checkpoint(model, use_reentrant: bool, every_n_layers: int) -> None:
    how = {"use_reentrant": use_reentrant}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(how, every_n_layers=every_n_layers)
    else:  # its name in transformers 5.19
        model.gradient_checkpointing_enable(how)


@settings(deadline=None, max_examples=15)
@given(shapes(), st.booleans())
def test_training_mode_computes_the_same(shape, grad):
    model = build(**shape)
    rows = tokens(2, 12, vocabulary=model.config.vocab_size)
    with torch.set_grad_enabled(grad):
        found = [model.train(mode)(rows, labels=rows) for mode in (False, True)]
    close(found[1].logits, found[0].logits)
    close(found[1].loss, found[0].loss)
    with torch.inference_mode():
        close(model.eval()(rows).logits, found[0].logits)


# torch itself imports scripted decompositions for forward-mode derivatives
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@settings(deadline=None, max_examples=6)
@given(shapes(), st.booleans())
def test_second_derivatives_of_the_default_loss(shape, packed):
    model = build("eager", **shape)
    rows = tokens(1, 8, vocabulary=model.config.vocab_size)
    positions = positions_of([3, 5])[None] if packed else None
    point = {name: parameter.detach() for name, parameter in model.named_parameters()}
    torch.manual_seed(0)
    along = {name: torch.randn_like(value) for name, value in point.items()}

    def loss(values):
        inputs = {"labels": rows, "position_ids": positions, "use_cache": False}
        return torch.func.functional_call(model, values, (rows,), inputs).loss

    slope = torch.func.grad(loss)
    _, forward = torch.func.jvp(slope, (point,), (along,))
    _, pull = torch.func.vjp(slope, point)
    (backward,) = pull(along)
    all_close(forward, backward, 1e-7)
    step = 1e-6  # what is left out grows with its square: 2e-5 at 1e-5 where a window of 2 meets 12 heads
    ahead, behind = (slope({n: v + s * along[n] for n, v in point.items()}) for s in (step, -step))
    scale = max(float(v.abs().max()) for v in forward.values()) + 1
    for name, value in forward.items():
        close((ahead[name] - behind[name]) / (2 * step) / scale, value / scale, 1e-5)


# ---------------------------------------------------------------------------- loss without logits


LABELS = ("all", "some", "none")


def labels_for(rows: torch.Tensor, kind: str) -> torch.Tensor:
    if kind == "all":
        return rows
    keep = torch.rand(rows.shape, generator=torch.Generator().manual_seed(7)) < 0.6
    return rows.masked_fill(~keep if kind == "some" else torch.ones_like(keep), IGNORED)


@settings(deadline=None, max_examples=40)
@given(
    shapes(),
    st.sampled_from(LABELS),
    st.sampled_from((None, 7, torch.tensor(9))),
    st.sampled_from(("plain", "padded", "packed")),
    st.sampled_from((torch.float64, torch.float32)),
)
def test_the_loss_without_logits_is_the_loss(shape, kind, divisor, case, dtype):
    model = build(dtype=dtype, **shape).train()
    rows = tokens(3, 9, vocabulary=model.config.vocab_size)
    options: dict = {"labels": labels_for(rows, kind), "num_items_in_batch": divisor}
    if case == "padded":
        options["attention_mask"] = torch.ones_like(rows).index_fill(1, torch.tensor([0, 1]), 0)
    if case == "packed":
        options["position_ids"] = positions_of([4, 5])[None]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for inputs in ({"input_ids": rows}, {"inputs_embeds": model.model.embed_tokens(rows).detach()}):
        default = model(**inputs, **options)
        without = model(**inputs, **options, skip_logits=True)
        assert without.logits is None and default.logits.shape[:2] == rows.shape
        close(without.loss, default.loss, tolerance)
        assert without.loss.dtype == default.loss.dtype
    default, without = (model(rows, skip_logits=skip, **options).loss for skip in (False, True))
    expected = gradients(default, model)
    scale = max(float(slope.abs().max()) for slope in expected.values()) + 1
    for name, slope in gradients(without, model).items():
        close(slope / scale, expected[name] / scale, tolerance)


def test_positions_with_targets_of_their_own():
    model = build().train()
    ids = tokens(2, 9)
    shifted = F.pad(ids[:, 1:], (0, 1), value=IGNORED)
    for skip in (True, False):
        expected = model(ids, labels=ids, skip_logits=skip)
        found = model(ids, shift_labels=shifted, skip_logits=skip)
        close(found.loss, expected.loss)
    losses = model(ids, labels=ids, skip_logits=True).token_losses
    logits = model(ids).logits.transpose(1, 2)
    close(losses, F.cross_entropy(logits, shifted, ignore_index=IGNORED, reduction="none"))
    with pytest.raises(ValueError, match="not both"):
        model(ids, labels=ids, shift_labels=shifted)


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 20),
    vocabulary=st.integers(2, 30),
    chunk=st.integers(1, 90),
    unit_rows=st.booleans(),
    strided=st.booleans(),
    kind=st.sampled_from(LABELS),
    factor=st.sampled_from((1.0, -0.25)),
)
def test_linear_cross_entropy_in_chunks(count, vocabulary, chunk, unit_rows, strided, kind, factor):
    torch.manual_seed(count)
    hidden = torch.randn(2 * count if strided else count, 6, dtype=torch.float64)
    hidden = (hidden[::2] if strided else hidden).requires_grad_()
    weight = (3 * torch.randn(vocabulary, 6, dtype=torch.float64)).requires_grad_()
    targets = labels_for(torch.randint(0, vocabulary, (count,)), kind)
    rows = F.normalize(weight, dim=-1) if unit_rows else weight
    expected = F.cross_entropy(hidden @ rows.T, targets, ignore_index=IGNORED, reduction="sum") * factor
    total, each = linear_cross_entropies(hidden, weight, targets, unit_rows=unit_rows, chunk_elements=chunk)
    found = total * factor
    close(found, expected, 1e-12)
    assert not each.requires_grad
    close(each, F.cross_entropy(hidden @ rows.T, targets, ignore_index=IGNORED, reduction="none"), 1e-12)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)),
        torch.autograd.grad(expected, (hidden, weight)),
        strict=True,
    ):
        close(a, b, 1e-11)


@pytest.mark.parametrize("unit_rows", [True, False])
def test_linear_cross_entropy_of_sure_and_of_hopeless_answers(unit_rows):
    weight = torch.eye(4)
    hidden = 200 * torch.eye(4)[[0, 1, 2]]
    targets = torch.tensor([0, 1, 3])  # the last one has probability exp(-200), zero in float32
    hidden.requires_grad_()
    found = linear_cross_entropy(hidden, weight, targets, unit_rows=unit_rows)
    close(found, torch.tensor(200.0), 1e-6)
    (slope,) = torch.autograd.grad(found, hidden)
    close(slope, torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, -1]]), 1e-6)


def test_linear_cross_entropy_differentiates_what_is_asked_for():
    hidden, weight, targets = torch.randn(5, 6), torch.randn(9, 6), torch.randint(0, 9, (5,))
    assert not linear_cross_entropy(hidden, weight, targets, unit_rows=True).requires_grad
    both = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    expected = torch.autograd.grad(linear_cross_entropy(*both, targets, unit_rows=True), both)
    for i in range(2):
        inputs = [hidden, weight]
        inputs[i] = both[i]
        (found,) = torch.autograd.grad(linear_cross_entropy(*inputs, targets, unit_rows=True), both[i])
        assert torch.equal(found, expected[i])
    loss = linear_cross_entropy(*both, targets, unit_rows=True)
    (first,) = torch.autograd.grad(loss, both[0], create_graph=True)
    if first.requires_grad:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            torch.autograd.grad(first.sum(), both[0])


@pytest.mark.parametrize("norm_head", [True, False])
def test_the_loss_without_logits_accumulates_gradients(norm_head):
    rows, found = tokens(4, 9), []
    for skip in (False, True):
        model = build(norm_head=norm_head).train()
        for part in rows.split(2):
            model(part, labels=part, num_items_in_batch=32, skip_logits=skip).loss.backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()})
    all_close(found[1], found[0])
    whole = build(norm_head=norm_head).train()
    all_close(gradients(whole(rows, labels=rows).loss, whole), found[1])


@pytest.mark.parametrize("norm_head", [True, False])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_loss_without_logits_under_autocast(norm_head, weights):
    model = build(dtype=weights, norm_head=norm_head).train()
    rows, losses, slopes = tokens(4, 16), [], []
    for skip in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(rows, labels=rows, skip_logits=skip).loss
        slopes.append(gradients(loss, model))
        losses.append(loss.detach())
    exact = copy.deepcopy(model).double()
    truth = exact(rows, labels=rows).loss
    expected, truth = gradients(truth, exact), truth.detach()
    errors = [
        sum(float((slope[name].double() - t).square().sum()) for name, t in expected.items())
        for slope in slopes
    ]
    assert losses[1].dtype == torch.float32 and {t.dtype for t in slopes[1].values()} == {weights}
    assert abs(float(losses[1] - truth)) < 0.02 * float(truth)
    assert errors[1] < 4 * errors[0]  # no worse than twice the default's
    assert errors[1] < 0.01 * sum(float(t.square().sum()) for t in expected.values())


# ---------------------------------------------------------------------------- the head's kept lengths


def head_formula(model, rows: torch.Tensor) -> torch.Tensor:
    weight = model.lm_head.weight
    return model.model(rows).last_hidden_state @ (weight / weight.norm(dim=-1, keepdim=True)).T


def step_of_an_optimizer(model):
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with torch.enable_grad():
        rows = tokens(2, 9)
        model(rows, labels=rows).loss.backward()
    optimizer.step()
    return model.eval()


def step_without_changing_the_mode(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.3)
    with torch.enable_grad():
        rows = tokens(2, 9)
        model(rows, labels=rows).loss.backward()
    optimizer.step()


def load_other(model):
    model.load_state_dict(build(seed=9).state_dict())


def load_assigned(model):
    model.load_state_dict(build(seed=9).state_dict(), assign=True)


def fill_by_data(model):
    model.lm_head.weight.data.copy_(torch.randn_like(model.lm_head.weight))
    model.eval()


def replace_data(model):
    model.lm_head.weight.data = torch.randn_like(model.lm_head.weight)


def replace_parameter(model):
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))


def replace_by_assignment(model):
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()).flip(0), model.parameters()
    )
    model.eval()


EDITS = (
    step_of_an_optimizer,
    step_without_changing_the_mode,
    load_other,
    load_assigned,
    fill_by_data,
    replace_data,
    replace_parameter,
    replace_by_assignment,
    lambda model: model.lm_head.weight.mul_(torch.rand(VOCABULARY, 1).double() + 0.5),
    lambda model: model.lm_head.weight[5].mul_(3),
    lambda model: model.lm_head.weight.copy_(torch.randn_like(model.lm_head.weight)),
    lambda model: model.state_dict()["lm_head.weight"].mul_(torch.rand(VOCABULARY, 1).double() + 0.5),
    lambda model: torch._foreach_mul_([model.lm_head.weight], 2.0),
    lambda model: model.float(),
    lambda model: model.set_output_embeddings(build(dtype=model.dtype, seed=4).lm_head),
    lambda model: model.materialize_norm_head(),
)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(EDITS), min_size=1, max_size=4), st.sampled_from(("none", "inference")))
def test_logits_follow_the_head_s_weights_at_once(edits, mode):
    model, rows = build(), tokens(1, 7)
    looking = torch.no_grad if mode == "none" else torch.inference_mode
    with looking():
        close(model(rows).logits, head_formula(model, rows))
    for edit in edits:
        torch.manual_seed(len(edits))
        with torch.no_grad():
            edit(model)
        with looking():
            norm_head = model.config.norm_head
            expected = head_formula(model, rows) if norm_head else model.lm_head(model.model(rows)[0])
            close(model(rows).logits, expected, 1e-9 if expected.dtype == torch.float64 else 1e-5)


@torch.no_grad()
def test_lengths_are_never_taken_for_another_weight():
    head, hidden = build(dtype=torch.float32).lm_head, torch.randn(1, 1, 24)
    for scale in range(1, 30):  # freed weights leave their address to the next
        weight = torch.randn(VOCABULARY, 24).mul_(scale)
        found = torch.func.functional_call(head, {"weight": weight}, (hidden,))
        close(found, hidden @ F.normalize(weight, dim=-1).T, 1e-5)
        del weight, found
    for scale in range(1, 30):
        del head.weight
        head.weight = torch.nn.Parameter(torch.randn(VOCABULARY, 24).mul_(scale))
        close(head(hidden), hidden @ F.normalize(head.weight, dim=-1).T, 1e-5)


def test_copies_keep_their_own_lengths():
    model, rows = build(), tokens(1, 7)
    with torch.no_grad():
        before = model(rows).logits
        other = copy.deepcopy(model)
        other.lm_head.weight.mul_(torch.rand(VOCABULARY, 1).double() + 0.5)
        other.lm_head.weight[7] = -other.lm_head.weight[7]
        assert torch.equal(model(rows).logits, before)
        close(other(rows).logits, head_formula(other, rows))
    assert not torch.equal(other(rows).logits, before)


def test_training_after_inference_sees_the_whole_gradient():
    model, fresh, rows = build(), build(), tokens(2, 9)
    with torch.inference_mode():
        model(rows)
    with torch.no_grad():
        model(rows)
    for mode in (False, True):
        found = gradients(model.train(mode)(rows, labels=rows).loss, model)
        all_close(found, gradients(fresh(rows, labels=rows).loss, fresh))
    # unit rows: growing a row changes nothing, so the gradient stands at right angles to it
    close((found["lm_head.weight"] * model.lm_head.weight).sum(-1), torch.zeros(VOCABULARY).double())


def test_a_model_made_in_inference_mode_answers():
    with torch.inference_mode():
        model, rows = build(), tokens(1, 7)
        close(model(rows).logits, head_formula(model, rows))
        model.lm_head.weight.mul_(torch.rand(VOCABULARY, 1).double() + 0.5)
        close(model(rows).logits, head_formula(model, rows))


# ---------------------------------------------------------------------------- torch.compile


@pytest.fixture
def compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


CASES = ("plain", "padded", "packed", "checkpointed")


def train_compiled(backend: str, case: str, **options) -> None:
    rows = tokens(2, 14)
    if case == "padded":
        options["attention_mask"] = torch.ones_like(rows)
        options["attention_mask"][0, :4] = 0
    if case == "packed":
        options["position_ids"] = positions_of([6, 8])[None]
    model = build("sdpa", torch.float32, conv_window=3).train()
    expected = model(rows, labels=rows, **options).loss
    slopes = gradients(expected, model)
    if case == "checkpointed":
        checkpoint(model, use_reentrant=False, every_n_layers=1)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    loss = compiled(rows, labels=rows, **options).loss
    close(loss, expected, 1e-5)
    all_close(gradients(loss, model), slopes, 1e-5)


@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own doing
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_training_step_is_one_graph(case, skip_logits):
    train_compiled("aot_eager", case, skip_logits=skip_logits)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("skip_logits", [False, True])
def test_a_training_step_compiles_to_machine_code(skip_logits):
    train_compiled("inductor", "packed", skip_logits=skip_logits)


def decode_compiled(backend: str, kind: str, attention: str, conv_window: int, batch: int) -> None:
    model = build(attention, torch.float32, conv_window=conv_window)
    rows = tokens(batch, 24)
    cache = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=24)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch.no_grad():
        pieces = [model(rows[:, :6], past_key_values=cache).logits]
        for t in range(6, 24):  # the growing lengths and the full window each compile once
            with torch.compiler.set_stance("fail_on_recompile" if t >= 9 else "default"):
                pieces.append(compiled(rows[:, t : t + 1], past_key_values=cache).logits)
        close(torch.cat(pieces, 1), model(rows).logits, 1e-4)


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("kind", "attention", "conv_window"),
    [("static", "sdpa", 1), ("static", "sdpa", 2), ("static", "eager", 4), ("dynamic", "sdpa", 2)],
)
def test_a_decode_step_is_one_graph_compiled_once(kind, attention, conv_window):
    decode_compiled("eager", kind, attention, conv_window, batch=2)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_decode_step_compiles_to_machine_code():
    decode_compiled("inductor", "static", "sdpa", 2, batch=1)


@pytest.mark.usefixtures("compiler")
def test_compiled_generation_of_a_padded_batch():
    model = build(conv_window=3)
    rows, mask = padded([tokens(1, n, n)[0] for n in (7, 4)], ["left", "left"])
    expected = write(model, rows, mask)
    model.forward = torch.compile(model.forward, fullgraph=True, backend="eager")
    assert torch.equal(write(model, rows, mask, cache_implementation="static"), expected)


# ---------------------------------------------------------------------------- folders


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_is_saved_in_shards_and_read_back(tmp_path, dtype):
    model, rows = build(dtype=dtype, conv_window=3), tokens(2, 9)
    for size in ("10KB", "3KB"):
        model.save_pretrained(tmp_path, max_shard_size=size)
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        assert not (tmp_path / "model.safetensors").exists()
        model = load(tmp_path, dtype=dtype)
        assert torch.equal(model(rows).logits, build(dtype=dtype, conv_window=3)(rows).logits)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    assert theirs.dtype == dtype and torch.equal(theirs(rows).logits, model(rows).logits)
    model.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(load(tmp_path, dtype=dtype)(rows).logits, model(rows).logits)


def test_weights_are_converted_once_on_the_way_in(tmp_path):
    model, rows = build(dtype=torch.float32), tokens(1, 9)
    model.save_pretrained(tmp_path)
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        loaded = load(tmp_path, dtype=dtype)
        assert {tensor.dtype for tensor in loaded.state_dict().values()} == {dtype}
        assert torch.equal(loaded(rows).logits, copy.deepcopy(model).to(dtype)(rows).logits)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto", "offload"])
def test_device_map(tmp_path, device_map):
    model, rows = build(dtype=torch.float32), tokens(2, 9)
    model.save_pretrained(tmp_path / "model")
    options = {"device_map": device_map}
    if device_map == "offload":
        places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
        options = {
            "device_map": places | {"model.layers.1": "disk", "model.layers.2": "disk"},
            "offload_folder": tmp_path / "offload",
        }
    placed = AutoModelForCausalLM.from_pretrained(tmp_path / "model", local_files_only=True, **options)
    close(placed(rows).logits, model(rows).logits, 1e-5)
    assert torch.equal(write(placed, rows), write(model, rows))
