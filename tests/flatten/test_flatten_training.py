"""Shifts during training: the optimizer goes along, and nothing else is touched."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, update_bn

from galenic.flatten import TrainingShift, choose_rows, collect
from galenic.runtime import UserError


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


class Classifier(nn.Module):
    """More features (24) than samples, with dropout and batch normalisation on the way."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Linear(6, 24)
        self.norm, self.drop = nn.BatchNorm1d(24), nn.Dropout(0.5)
        self.head = nn.Linear(24, 3)
        self.double()

    def features(self, x):
        return self.drop(torch.tanh(self.norm(self.body(x))))

    def forward(self, x):
        return self.head(self.features(x))


X, Y = draw(15, 6, seed=1), torch.arange(15) % 3


def train(model, optimizer, steps, x=X, y=Y):
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def coast(model, optimizer, steps=1):
    """Steps with zero gradients: only what the optimizer remembers moves the weights."""
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()


def outside(weight, rows):
    """The norm of a weight's components that no row has."""
    basis = torch.linalg.svd(rows, full_matrices=False)[2]
    return float((weight - weight @ basis.T @ basis).norm())


def head_rows(model):
    model.eval()
    with torch.no_grad():
        return model.features(X)


# ---------------------------------------------------------------------------- when


@pytest.mark.parametrize(
    ("every", "threshold", "accuracies", "expected"),
    [
        (1, 0.99, [0.5, 0.98, 0.99, 0.7, 1.0], [2, 3, 4]),  # from the first on, whatever comes after
        (2, 0.5, [0.1, 0.5, 0.5, 0.5, 0.5, 0.5], [1, 3, 5]),
        (3, None, [0.0] * 7, [0, 3, 6]),
        (3, 0, [None] * 7, [0, 3, 6]),
        (1, 1.0, [0.9, 0.99], []),
    ],
)
def test_due_counts_from_the_terminal_phase(every, threshold, accuracies, expected):
    shift = TrainingShift(Classifier(), ["head"], every=every, accuracy=threshold)
    for _ in range(2):  # asking again, as a resumed run does, changes nothing
        assert [e for e, accuracy in enumerate(accuracies) if shift.due(e, accuracy)] == expected


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: TrainingShift(m, every=0), "every: 0 is less than 1"),
        (lambda m: TrainingShift(m, accuracy=99), r"accuracy: 99 is not in \[0, 1\]"),
        (lambda m: TrainingShift(m, accuracy=float("nan")), "accuracy: nan"),
        (lambda m: TrainingShift(m, ["haed"]), "did you mean 'head'"),
        (lambda m: TrainingShift(m, ["norm"]), "cannot be shifted"),
        (lambda m: TrainingShift(m, method="svd"), "neither gram nor qr"),
        (lambda m: TrainingShift(m, rank=0), "rank: 0"),
        (lambda m: TrainingShift(m, rank=2, energy=0.5), "give one of"),
        (lambda m: TrainingShift(m, output_budget=1.0), r"lies in \[0, 1\)"),
        (lambda m: TrainingShift(m, base={"head": m.head.weight}), "base: lacks layer 'body'"),
        (lambda m: TrainingShift(m).due(0), "accuracy: say the epoch's"),
        (lambda m: TrainingShift(m).due(0, 99.5), r"99.5 is not in \[0, 1\]"),
        (lambda m: TrainingShift(m).shift([]), "nothing to collect"),
        (lambda m: TrainingShift(m).shift(X), r"\[batch\]"),
        (lambda m: TrainingShift(m).shift({"x": X}), r"\[batch\]"),
        (
            lambda m: TrainingShift(m).shift([X], torch.optim.SGD(Classifier().parameters(), 1)),
            "optimizer: it has none of the shifted layers' weights",
        ),
    ],
)
def test_mistakes_are_told_in_one_line(make, says):
    model = Classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match=says) as error:
        make(model)
    assert "\n" not in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_the_import_of_the_room_stays_light():
    code = (
        "import sys, galenic.flatten\nassert 'torch' not in sys.modules\n"
        "galenic.flatten.TrainingShift\nassert 'transformers' not in sys.modules\nassert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=100)


# ---------------------------------------------------------------------------- the shift and the moments


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_momentum_does_not_bring_back_what_was_taken(nesterov, decay):
    def run(with_optimizer):
        model = Classifier().train()
        optimizer = torch.optim.SGD(
            model.parameters(), 0.1, momentum=0.9, nesterov=nesterov, weight_decay=decay
        )
        train(model, optimizer, 3)  # with dropout and batch statistics: features that are not eval mode's
        rows = head_rows(model)
        assert outside(model.head.weight.detach(), rows) > 0.1
        shift = TrainingShift(model, ["head"], method="qr", output_budget=0.0)
        done = shift.shift([X[:7], X[7:]], optimizer if with_optimizer else None)
        assert list(done) == ["head"] and done["head"].rank == 15 < done["head"].dimension
        assert outside(model.head.weight.detach(), rows) < 1e-12
        coast(model, optimizer, 3)
        return outside(model.head.weight.detach(), rows)

    assert run(True) < 1e-12
    assert run(False) > 1e-3  # and it would without


class Net(nn.Module):
    """One layer, so that no step moves its inputs."""

    def __init__(self, layer):
        super().__init__()
        torch.manual_seed(3)
        self.layer = layer.double()

    def forward(self, x):
        return self.layer(x)


@pytest.mark.parametrize(
    ("layer", "shape", "options"),
    [
        (lambda: nn.Linear(10, 4), (6, 10), {"output_budget": 0.0}),
        (lambda: nn.Linear(10, 4), (6, 10), {"output_budget": 0.0, "method": "qr"}),
        (lambda: nn.Linear(10, 4), (30, 10), {"rank": 4}),
        (lambda: nn.Linear(10, 4), (6, 10), {"output_budget": 0.0, "free_bias": True}),
        (lambda: nn.Linear(10, 4), (30, 10), {"rank": 4, "free_bias": True, "base": True, "method": "qr"}),
        (lambda: nn.Linear(10, 4, bias=False), (6, 10), {"output_budget": 0.0, "free_bias": True}),
        (lambda: nn.Conv1d(8, 6, 3, groups=2), (2, 8, 6), {"output_budget": 0.0, "base": True}),
        (lambda: nn.Conv2d(4, 6, 2, groups=2), (2, 4, 3, 3), {"rank": 3, "free_bias": True}),
    ],
)
def test_a_shift_commutes_with_a_step(layer, shape, options):
    # Weights and moments go through one affine map and its linear part: shifting and stepping may change places.
    x = draw(*shape, seed=4)
    start = Net(layer())
    torch.manual_seed(5)
    base = {"layer": torch.randn_like(start.layer.weight)} if options.get("base") else None
    results = []
    for first in ("shift", "step"):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
        for seed in (0, 1):
            for number, parameter in enumerate(model.parameters()):
                parameter.grad = draw(*parameter.shape, seed=10 * number + seed)
            optimizer.step()
        shift = TrainingShift(model, **{**options, "base": base})
        if first == "step":
            coast(model, optimizer, 2)
        done = shift.shift([x], optimizer)["layer"]
        assert done.norm_after < 0.99 * done.norm_before
        if first == "shift":
            coast(model, optimizer, 2)
        results.append([p.detach() for p in model.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("make", "moment"),
    [
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "momentum_buffer"),
        (lambda p: torch.optim.AdamW(p, 0.01), "exp_avg"),
        (lambda p: torch.optim.Adam(p, 0.01, amsgrad=True), "exp_avg"),
        (lambda p: torch.optim.NAdam(p, 0.01), "exp_avg"),
        (lambda p: torch.optim.Adamax(p, 0.01), "exp_avg"),
        (lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, centered=True), "momentum_buffer"),
        (lambda p: torch.optim.Muon([q for q in p if q.ndim == 2], 0.01), "momentum_buffer"),
    ],
)
def test_first_moments_are_mapped_and_all_else_stays(make, moment):
    model = Classifier()
    optimizer = make(list(model.parameters()))
    train(model, optimizer, 3)
    state = optimizer.state[model.head.weight]
    held, before = state[moment], copy.deepcopy(dict(state))
    untouched = copy.deepcopy([optimizer.state[p] for p in model.parameters() if p is not model.head.weight])
    rows = head_rows(model)
    TrainingShift(model, ["head"], output_budget=0.0).shift([X], optimizer)
    expected = before[moment] @ torch.linalg.pinv(rows) @ rows
    assert outside(before[moment], rows) > 1e-3
    torch.testing.assert_close(state[moment], expected, rtol=1e-10, atol=1e-12)
    assert state[moment] is held  # in place, for optimizers that hold on to it
    assert set(state) == set(before)
    assert all(
        torch.equal(torch.as_tensor(state[k]), torch.as_tensor(before[k])) for k in state if k != moment
    )
    after = [optimizer.state[p] for p in model.parameters() if p is not model.head.weight]
    for one, other in zip(untouched, after, strict=True):
        assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


def test_a_state_that_no_map_is_known_for_is_refused_before_anything_changes():
    model = Classifier()
    optimizer = torch.optim.ASGD(model.parameters(), 0.1)  # keeps averaged weights, `ax`
    train(model, optimizer, 1)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UserError, match="state 'ax' of layer 'head' is not known; known are momentum_buffer"):
        TrainingShift(model, ["head"]).shift([X], optimizer)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_a_fresh_or_memoryless_optimizer_is_fine():
    for momentum in (0.0, 0.9):
        model = Classifier()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=momentum)
        TrainingShift(model, ["head"], output_budget=0.0).shift([X], optimizer)
        train(model, optimizer, 1)


def test_exact_shifts_keep_outputs_modes_statistics_and_gradients():
    model = Classifier().train()
    model.norm.eval()  # frozen by hand
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    train(model, optimizer, 2)
    F.cross_entropy(model(X), Y).backward()  # accumulating: a step is yet to come
    model.eval()
    outputs = model(X).detach()
    model.train()
    model.norm.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    gradients = [p.grad.clone() for p in model.parameters()]
    noise = torch.get_rng_state()
    shifts = TrainingShift(model, output_budget=0.0).shift([X[:4], (X[4:], Y[4:])], optimizer)
    assert [name for name, s in shifts.items() if not s.noop] == ["head"]
    assert torch.equal(torch.get_rng_state(), noise)  # no dropout was drawn
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert modes[""] and modes["drop"] and not modes["norm"]
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    for parameter, old in zip(model.parameters(), gradients, strict=True):
        assert torch.equal(parameter.grad, old)
    model.eval()
    torch.testing.assert_close(model(X), outputs, rtol=1e-10, atol=1e-12)


def test_between_accumulated_steps_it_is_as_after_a_whole_batch():
    results = []
    for parts in (1, 3):
        model = Classifier()
        model.eval()  # batch statistics would depend on the parts
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        shift = TrainingShift(model, ["head"], output_budget=0.0)
        for _ in range(3):
            optimizer.zero_grad()
            for x, y in zip(X.chunk(parts), Y.chunk(parts), strict=True):
                (F.cross_entropy(model(x), y) / parts).backward()
            optimizer.step()
            shift.shift(X.chunk(parts), optimizer)
        results.append(model.head.weight.detach())
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_the_papers_stochastic_shift_of_a_head():
    model = Classifier()
    weight, features = model.head.weight.detach().clone(), head_rows(model)
    rows = choose_rows(15, 6, labels=Y, generator=torch.Generator().manual_seed(0))
    shift = TrainingShift(model, ["head"], method="qr", output_budget=0.0)
    done = shift.shift([X[rows]])["head"]
    few = features[rows]
    expected = weight @ few.T @ torch.linalg.inv(few @ few.T) @ few  # the paper's formula
    torch.testing.assert_close(model.head.weight.detach(), expected, rtol=1e-9, atol=1e-12)
    assert done.rank == 6


# ---------------------------------------------------------------------------- companions


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimisation as its users write it: two steps around a base optimizer."""

    def __init__(self, parameters, base, rho=0.05, **options):
        super().__init__(parameters, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)

    @torch.no_grad()
    def first_step(self):
        parameters = [p for group in self.param_groups for p in group["params"]]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            self.state[p]["old"] = p.clone()
            p.add_(p.grad, alpha=0.05 / float(norm))

    @torch.no_grad()
    def second_step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.copy_(self.state[p]["old"])
        self.base_optimizer.step()


def test_with_sam_after_its_second_step():
    model = Classifier()
    model.drop.p = 0.0
    sam = Sam(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
    shift = TrainingShift(model, ["head"], output_budget=0.0)
    for _ in range(3):
        for step in (sam.first_step, sam.second_step):
            sam.zero_grad()
            F.cross_entropy(model(X), Y).backward()
            step()
        shift.shift([X], sam)
        rows = head_rows(model)
        model.train()
        assert outside(model.head.weight.detach(), rows) < 1e-12
    moment = sam.base_optimizer.state[model.head.weight]["momentum_buffer"]
    assert float(moment.norm()) > 1e-3 and outside(moment, rows) < 1e-12


def test_a_weight_average_is_shifted_between_two_updates_of_its_statistics():
    model = Classifier()
    model.drop.p = 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    average = AveragedModel(model)
    shift = TrainingShift(average, ["head"], output_budget=0.0)
    assert shift.layers == ["head"]
    for _ in range(3):
        train(model, optimizer, 2)
        average.update_parameters(model)
    own = copy.deepcopy(model.state_dict())
    update_bn([X], average)
    average.eval()
    with torch.no_grad():
        outputs = average(X)
        done = shift.shift([X])["head"]
        assert done.norm_after < done.norm_before
        update_bn([X], average)
        torch.testing.assert_close(average(X), outputs, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(own[key], value) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="none of the shifted layers"):
        shift.shift([X], optimizer)  # that of the model that is averaged


def test_a_compiled_model_is_looked_through():
    model = Classifier()
    shift = TrainingShift(torch.compile(model, backend="eager"), ["head"], output_budget=0.0)
    assert shift.model is model and shift.layers == ["head"]


def test_a_layer_that_became_tied_or_parametrised_since_is_refused():
    model = Classifier()
    shift = TrainingShift(model, ["head"])
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(UserError, match="'head' cannot be shifted"):
        shift.shift([X])
    model = Classifier()
    shift = TrainingShift(model, ["head"])
    model.twin = nn.Linear(24, 3)
    model.twin.weight = model.head.weight
    with pytest.raises(UserError, match="tied to 'twin'"):
        shift.shift([X])


def test_the_statistics_that_decide_are_of_eval_mode():
    model = Classifier().train()
    expected = collect(copy.deepcopy(model).eval(), [X], ["head"]).gram("head")
    weight = model.head.weight.detach().clone()
    TrainingShift(model, ["head"], output_budget=0.05).shift([X])
    values, vectors = torch.linalg.eigh(expected)
    kept = (model.head.weight.detach() @ vectors) / (
        weight @ vectors
    )  # one factor a direction: lambda/(lambda+mu)
    strong = values > 1e-6
    damping = values[strong] * (1 / kept[:, strong] - 1)
    torch.testing.assert_close(damping, damping[:1, :1].expand_as(damping), rtol=1e-6, atol=1e-9)
