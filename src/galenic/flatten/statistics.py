"""Gram matrices of layer inputs, collected in one forward pass over the data."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from galenic.flatten.layers import Layer, geometry, input_rows, select_layers
from galenic.flatten.spectra import Spectrum, centred_spectrum, row_spectrum, spectrum
from galenic.ranks import gathered, process_group, ranks
from galenic.runtime import UserError, human_bytes

Method = Literal["gram", "qr"]

STRIPE = 128
"""Rows of a Gram matrix that are summed by one product, up to the diagonal: wide enough for the product's speed."""

QR_BLOCKS = 8
"""How much larger blocks of rows are for `qr`: each costs a decomposition of the factor so far too."""


class Statistics:
    """What shifts need to know of layers' inputs: Gram matrices or triangular factors, sums and counts.

    Layers fed by the very same tensor (a gate and an up projection) share them: `owner` names whose. G is the number
    of groups of a convolution, 1 for a linear layer.

    * `gram` adds up x^T x in float64, whatever the inputs' type: exact for singular values of the inputs above 1.5e-8
      of the largest. (Products in float32, added up in float64, would take half the time, but lost those below some
      1e-4 in a trial: an exact shift would move outputs by as much.)
    * `qr` keeps the triangular factor R of all rows so far (R <- qr([R; rows]), a sequential TSQR; as long as they are
      few, the rows themselves): R^T R is the Gram matrix, but singular values down to 1e-15 of the largest are told
      from zero. A column of ones goes before the rows, so that R = [[sqrt(n), sqrt(n) mean], [0, R_c]] with R_c the
      factor of the centred rows.

    With `every` above 1, one row (token, window) of every so many is taken, at random within each run of so many:
    these are the statistics of a sample. Its size is what counts. With n rows of d inputs, the outputs of all rows move
    by more than predicted, by a share of about d / n where n is several d (more where rows resemble each other, as
    windows of an image do), so budgets are exceeded by that much; with n < d it is the stochastic shift, which keeps
    the outputs of the rows taken only.

    Attributes:
        grams: owner -> (G, d, d) float64, the sum of x^T x over all rows x of its inputs; empty with `qr`. Read them by
            `gram`: rows that wait are added and what lies above the diagonal is filled in there.
        factors: owner -> (G, at most d + 1, d + 1) float64; empty with `gram`.
        sums: owner -> (G, d) float64, the sum of all rows.
        rows: owner -> number of rows (of each group) taken.
        owner: layer -> the layer whose statistics are also its own.
        sparse: layer -> rows, for layers left out by `min_rows`.
        failure: what was wrong with inputs, where `watching` is patient.
    """

    def __init__(self, method: Method = "gram", every: int = 1) -> None:
        if method not in ("gram", "qr"):
            raise UserError(f"method: '{method}' is neither gram nor qr")
        if every < 1:
            raise UserError(f"every: {every}; 1 takes every row, 4 one row of every four")
        self.method, self.every = method, every
        self.grams: dict[str, Tensor] = {}
        self.factors: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.sparse: dict[str, int] = {}
        self.failure = ""
        self.mask: Tensor | None = None
        self._latest: tuple[Tensor, tuple[object, ...], str] | None = None
        self._spectra: dict[tuple[str, bool], Spectrum] = {}
        self._waiting: dict[str, list[Tensor]] = {}  # fewer than d / 2 rows of each
        self._source = torch.Generator().manual_seed(0)

    def gram(self, layer: str, group: int = 0) -> Tensor:
        """Returns the (d, d) Gram matrix of a layer's inputs (of one of its groups) in float64."""
        owner = self.owner[layer]
        if self.method == "gram":
            return _symmetric(self._settle(owner))[group]
        factor = self.factors[owner][group, :, 1:]
        return factor.T @ factor

    def count(self, layer: str) -> int:
        """Returns how many rows a layer has seen."""
        return self.rows[self.owner[layer]]

    def spectrum(self, layer: str, centred: bool = False) -> Spectrum:
        """Returns the spectrum of a layer's inputs, all groups stacked; computed once for all that share it.

        Args:
            layer: its name.
            centred: of the inputs less their mean, for a bias that may move.
        """
        key = (self.owner[layer], centred)
        if key not in self._spectra:
            owner, rows = key[0], self.rows[key[0]]
            try:
                if self.method == "qr":
                    factor = self.factors[owner]
                    factor = (_triangular(factor)[:, 1:] if centred else factor)[:, :, 1:]
                    mean = self.sums[owner] / rows if centred else None
                    self._spectra[key] = row_spectrum(factor, mean=mean, rows=rows)
                elif centred:
                    self._spectra[key] = centred_spectrum(
                        _symmetric(self._settle(owner)), self.sums[owner], rows
                    )
                else:
                    self._spectra[key] = spectrum(_symmetric(self._settle(owner)))
            except (RuntimeError, MemoryError) as error:  # UserError is neither
                raise UserError(
                    f"layer '{layer}': its {self.sums[owner].shape[-1]} inputs are too many to decompose here "
                    f"({str(error).splitlines()[0]}); leave it out, or use mode: stochastic with few samples "
                    "(in Python: method: qr and fewer rows than inputs)"
                ) from None
        return self._spectra[key]

    def add(self, layer: str, inputs: Tensor, module: Layer) -> None:
        """Adds one call's inputs; rows where `mask` is zero do not count.

        Raises:
            UserError: the inputs hold NaN or infinity, or layers share their inputs now and then.
        """
        latest, alike = self._latest, geometry(module)
        shared = latest[2] if latest and latest[0] is inputs and latest[1] == alike else layer
        if self.owner.setdefault(layer, shared) != shared:
            raise UserError(
                f"layer '{layer}' shares its input with '{self.owner[layer]}' in some calls only; name it alone"
            )
        if shared != layer:
            return
        self._latest = (inputs, alike, layer)
        self._spectra.clear()
        chosen = self._chosen if self.every > 1 else None
        larger = QR_BLOCKS if self.method == "qr" else 1
        for rows in input_rows(module, inputs, self.mask, chosen=chosen, larger=larger):
            self._add_rows(layer, rows)

    def _chosen(self, count: int) -> Tensor:
        """Draws one of every run of `every` rows, of a last, shorter run now and then; one of any call at least."""
        starts = torch.arange(0, count, self.every)
        index = starts + torch.randint(self.every, starts.shape, generator=self._source)
        if self.every > count > 0:
            return index % count
        return index[index < count]

    def _add_rows(self, owner: str, rows: Tensor) -> None:
        """Adds (G, n, d) rows in float64."""
        groups, count, width = rows.shape
        self._allocate(owner, groups, width, rows.device)
        self.sums[owner] += rows.sum(1)
        self.rows[owner] += count
        if not torch.isfinite(self.sums[owner]).all():
            raise UserError(
                f"the inputs of layer '{owner}' hold NaN or infinity; the model or its data is broken"
            )
        if self.method == "qr":
            stack = torch.cat([self.factors[owner], torch.cat([rows.new_ones(groups, count, 1), rows], 2)], 1)
            self.factors[owner] = _triangular(stack) if stack.shape[1] > stack.shape[2] else stack
        elif count >= width // 2:
            _add_products(self.grams[owner], rows)
        else:  # for a few rows, reading and writing the matrix takes longer than their products
            waiting = self._waiting.setdefault(owner, [])
            waiting.append(rows.clone())  # the model may go on to change its inputs in place
            if sum(block.shape[1] for block in waiting) >= width // 2:
                self._settle(owner)

    def _settle(self, owner: str) -> Tensor:
        """Adds the products of rows that waited; returns the Gram matrices, up to date."""
        waiting = self._waiting.pop(owner, None)
        if waiting:
            _add_products(self.grams[owner], torch.cat(waiting, 1))
        return self.grams[owner]

    def _allocate(self, owner: str, groups: int, width: int, device: torch.device) -> None:
        """Makes zero statistics for a layer that has none.

        Raises:
            UserError: there is no memory for them.
        """
        if owner in self.sums:
            return
        wide = {"dtype": torch.float64, "device": device}
        if self.method == "gram":
            try:
                self.grams[owner] = torch.zeros(groups, width, width, **wide)
            except (RuntimeError, MemoryError):  # torch has no class of its own for main memory
                raise UserError(
                    f"layer '{owner}': no memory for the matrix of its {width} inputs "
                    f"({human_bytes(8 * groups * width**2)}); leave it out, or use mode: stochastic with few samples, "
                    "which keeps their rows alone (in Python: method: qr and fewer rows than inputs)"
                ) from None
        self.sums[owner], self.rows[owner] = torch.zeros(groups, width, **wide), 0
        if self.method == "qr":
            self.factors[owner] = torch.zeros(groups, 0, width + 1, **wide)

    def forget_call(self) -> None:
        """Ends a forward pass: tensors of the next one are others, even at the same address."""
        self._latest = None

    def all_reduce(self) -> None:
        """Makes the statistics of all processes the statistics of each, as if one had seen all their data.

        Every process calls it once, after its own pass. Gram matrices, sums and counts are added; triangular factors
        are stacked in the processes' order and reduced to one. A layer that some processes never saw (an expert) is
        empty there. Needs a process group that takes tensors in main memory, as gloo does.

        Raises:
            UserError: a layer shares its input with different layers on different processes.
        """
        if ranks() == 1:
            return
        import torch.distributed as distributed

        with process_group():
            for owners in gathered(self.owner):
                for layer, owner in owners.items():
                    if self.owner.setdefault(layer, owner) != owner:
                        raise UserError(
                            f"layer '{layer}' shares its input on some processes only; name it alone"
                        )
            shapes = {owner: list(sums.shape) for owner, sums in self.sums.items()}
            device = next(iter(self.sums.values())).device if self.sums else torch.device("cpu")
            for part in gathered(shapes):
                for owner, (count, width) in part.items():
                    self._allocate(owner, count, width, device)
            counts = gathered(self.rows)
            for owner in sorted(self.sums):
                self.rows[owner] = sum(part[owner] for part in counts)
                _sum_over_ranks(self.sums[owner])
                if self.method == "gram":
                    _sum_over_ranks(self._settle(owner))
                    continue
                own = self.factors[owner].cpu()
                width = own.shape[2]
                full = torch.cat([own, own.new_zeros(len(own), width - own.shape[1], width)], 1).contiguous()
                parts = [torch.empty_like(full) for _ in range(ranks())]
                distributed.all_gather(parts, full)
                self.factors[owner] = _triangular(torch.cat(parts, 1)).to(device)
        self._spectra.clear()


def _add_products(grams: Tensor, rows: Tensor) -> None:
    """Adds x^T x of (G, n, d) rows to (G, d, d) matrices: to the diagonal and below, half of the work."""
    for gram, block in zip(grams, rows, strict=True):
        for top in range(0, len(gram), STRIPE):
            end = min(top + STRIPE, len(gram))
            gram[top:end, :end].addmm_(block[:, top:end].mT, block[:, :end])


def _symmetric(grams: Tensor) -> Tensor:
    """Copies what lies below the diagonal above it, in place."""
    width = grams.shape[-1]
    for top in range(0, width, STRIPE):
        end = min(top + STRIPE, width)
        grams[:, :top, top:end] = grams[:, top:end, :top].mT
    return grams


def _triangular(rows: Tensor) -> Tensor:
    """Returns the triangular factor R of rows: R^T R = rows^T rows."""
    return torch.linalg.qr(rows, mode="r").R


def _sum_over_ranks(tensor: Tensor) -> None:
    """Adds a tensor over all processes, in place."""
    import torch.distributed as distributed

    total = tensor.cpu()
    distributed.all_reduce(total)
    tensor.copy_(total)


@torch.no_grad()
def collect(
    model: nn.Module,
    loader: Iterable[Any],
    layers: Sequence[str] = ("*",),
    *,
    method: Method = "gram",
    every: int = 1,
    min_rows: int = 0,
    across_ranks: bool = False,
) -> Statistics:
    """Collects statistics of the inputs of linear layers and convolutions.

    Args:
        model: put into eval mode for the pass, so that dropout is off; its mode is restored.
        loader: batches: a mapping (passed as keywords; a 2-D `attention_mask` leaves padding out), a tuple or list
            (its first item is the input) or a tensor.
        layers: names or patterns, see `select_layers`.
        method: `gram`, or `qr` where the rank must be exact; see `Statistics`.
        every: takes one row (token, window) of every so many, at random, where all rows would take long: products of
            d inputs cost about 1.2 d / K times a layer's own with K outputs, so of a convolution often ten times the
            forward pass. See `Statistics` for what is lost.
        min_rows: layers that saw fewer rows (experts that few tokens were sent to) are left out, listed in `sparse`:
            their inputs span little, and a shift would take away most of what other data needs. With 0, a layer that
            was never called is an error.
        across_ranks: every process has its own share of the data; all get the statistics of the whole.

    Returns:
        The statistics; a layer called several times per pass counts all its calls.

    Raises:
        UserError: an unknown or unsuitable layer, an empty loader, a layer that was never called, NaN or infinity (on
            any process), a module that stays in training mode.
    """
    names = select_layers(model, layers)
    count, failure, statistics = 0, "", Statistics(method, every)
    try:
        with watching(model, names, statistics, patient=across_ranks):
            for batch in loader:
                run_batch(model, batch, statistics)
                count += 1
    except UserError as error:
        if not across_ranks:
            raise
        failure = str(error)  # the others wait for this process: all fail together
    if across_ranks:
        failure = failure or statistics.failure
        with process_group():
            told = gathered([count, failure])
            failures = [words for _, words in told if words]
            if failures:
                raise UserError(failures[0])
            count = sum(batches for batches, _ in told)
            statistics.all_reduce()
    if not count:
        raise UserError("the loader is empty: there is nothing to collect statistics on")
    if min_rows:
        leave_out(statistics, names, min_rows)
    else:
        check_called(statistics, names)
    return statistics


def leave_out(statistics: Statistics, layers: Sequence[str], min_rows: int) -> None:
    """Takes the layers that saw fewer rows out of the statistics; see `collect`.

    Raises:
        UserError: none is left.
    """
    for name in layers:
        rows = statistics.count(name) if name in statistics.owner else 0
        if rows < min_rows:
            statistics.sparse[name] = rows
    for name in statistics.sparse:
        statistics.owner.pop(name, None)
    if not statistics.owner:
        most = max(statistics.sparse.values())
        raise UserError(f"min_rows: no layer saw {min_rows} rows; the most any saw is {most}")


@contextmanager
def watching(
    model: nn.Module, layers: Sequence[str], statistics: Statistics | None = None, *, patient: bool = False
) -> Iterator[Statistics]:
    """Yields statistics that grow with every forward pass of the model (in eval mode) inside the block.

    Args:
        model: to be watched.
        layers: full names.
        statistics: that grow; new ones by default.
        patient: what is wrong with inputs does not end the pass, which other processes may share, but is kept in
            `failure`.

    Raises:
        UserError: a module stays in training mode (its dropout would blur the inputs).
    """
    statistics = Statistics() if statistics is None else statistics
    modules = dict(model.named_modules())

    def watch(module: Any, inputs: tuple[Any, ...], keywords: dict[str, Any], name: str) -> None:
        try:
            statistics.add(name, inputs[0] if inputs else keywords["input"], module)
        except UserError as error:
            if not patient:
                raise
            statistics.failure = statistics.failure or str(error)

    training = {name for name, module in modules.items() if module.training}
    handles = []
    model.eval()
    try:
        awake = [name for name, module in modules.items() if module.training]
        if awake:
            raise UserError(
                f"module '{awake[0]}' stays in training mode when told eval(): its outputs are not the model's"
            )
        for name in layers:
            handles.append(
                modules[name].register_forward_pre_hook(
                    lambda module, inputs, keywords, name=name: watch(module, inputs, keywords, name),
                    with_kwargs=True,
                )
            )
        yield statistics
    finally:
        for handle in handles:
            handle.remove()
        for name in training:
            modules[name].training = True


def run_batch(model: nn.Module, batch: Any, statistics: Statistics, mask: Tensor | None = None) -> Any:
    """Runs a model on a batch of any of the accepted forms and returns its output.

    Args:
        model: what to run.
        batch: see `collect`.
        statistics: told which rows count.
        mask: (B, T), nonzero on rows that count. Default: the batch's 2-D `attention_mask`, if it has one.
    """
    if mask is None and isinstance(batch, Mapping):
        attention_mask = batch.get("attention_mask")
        mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 else None
    statistics.mask = mask
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(batch[0] if isinstance(batch, tuple | list) else batch)
    statistics.forget_call()
    return output


def check_called(statistics: Statistics, layers: Sequence[str]) -> None:
    """Raises a UserError if a layer has no statistics."""
    silent = [name for name in layers if name not in statistics.owner]
    if silent:
        raise UserError(f"layer '{silent[0]}' was never called by the model's forward pass; leave it out")
