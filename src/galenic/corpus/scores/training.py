"""The network of a scorer: sum of n-gram vectors and the shape, one hidden layer, all heads on it; trained in order.

    x = [sum over the n features f of V_f / sqrt(n) ; shape]      (VECTOR + shapes)
    h = max(0, x W1 + b1)                              (HIDDEN)
    z = h W2 + b2                                      one logit for each score, one for each label of each class

Loss of a document: for each score that has a target t in [0, 1] the cross-entropy of sigmoid(z) against t, for each
class that has a label the cross-entropy of softmax(z of the head), summed with the heads' weights. Steps are Adagrad's
(Duchi et al. 2011), one document at a time, with one accumulator for each n-gram vector. One thread and no reordered
sums: the same rows and seed give the same bytes. The shape of the network is that of fastText (Joulin et al. 2016,
arXiv 1607.01759) with a hidden layer for the scores, which are no linear function of the shape.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from galenic.corpus.scores.features import SHAPES, compiled

VECTOR, HIDDEN = 32, 64
_BREAK = np.float32(1e-8)


class Network(NamedTuple):
    """The weights, float32."""

    vectors: np.ndarray
    """(2**bits, VECTOR)"""
    hidden: np.ndarray
    """(VECTOR + shapes, HIDDEN)"""
    hidden_bias: np.ndarray
    out: np.ndarray
    """(HIDDEN, logits)"""
    out_bias: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Examples:
    """What is learned from: features and targets, a row a document."""

    ids: np.ndarray
    ends: np.ndarray
    shapes: np.ndarray
    scores: np.ndarray
    """(n, scores) float32; NaN where there is no label."""
    labels: np.ndarray
    """(n, classes) int32; -1 where there is no label."""

    def __len__(self) -> int:
        return len(self.shapes)


def fresh(bits: int, logits: int, seed: int) -> Network:
    """Returns untrained weights: a random hidden layer, zeros elsewhere, so that an n-gram never seen says nothing."""
    draw = np.random.Generator(np.random.PCG64(seed))
    inputs = VECTOR + len(SHAPES)

    def uniform(limit: float, *size: int) -> np.ndarray:
        return ((draw.random(size, dtype=np.float32) * 2 - 1) * np.float32(limit)).astype(np.float32)

    return Network(
        vectors=np.zeros((2**bits, VECTOR), np.float32),
        hidden=uniform((6 / (inputs + HIDDEN)) ** 0.5, inputs, HIDDEN),
        hidden_bias=np.zeros(HIDDEN, np.float32),
        out=np.zeros((HIDDEN, logits), np.float32),
        out_bias=np.zeros(logits, np.float32),
    )


@compiled
def forward(
    network: Network, ids: np.ndarray, shape: np.ndarray, x: np.ndarray, h: np.ndarray, z: np.ndarray
) -> None:
    """Computes the logits of one document; x, h and z are written. No sum depends on other documents."""
    vectors, w1, b1, w2, b2 = network
    size = vectors.shape[1]
    x[:] = 0
    for f in ids:
        row = vectors[f]
        for d in range(size):
            x[d] += row[d]
    if len(ids):
        scale = np.float32(1) / np.sqrt(np.float32(len(ids)))
        for d in range(size):
            x[d] *= scale
    for d in range(len(shape)):
        x[size + d] = shape[d]
    h[:] = b1
    for d in range(len(x)):
        value, weights = x[d], w1[d]
        for j in range(len(h)):
            h[j] += value * weights[j]
    z[:] = b2
    for j in range(len(h)):
        if h[j] <= 0:
            h[j] = 0
            continue
        value, weights = h[j], w2[j]
        for k in range(len(z)):
            z[k] += value * weights[k]


@compiled
def _errors(
    z: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    spans: np.ndarray,
    weights: np.ndarray,
    error: np.ndarray,
) -> float:
    """Writes the derivatives of the loss by the logits; returns the loss."""
    loss = 0.0
    count = len(scores)
    error[:] = 0
    for s in range(count):
        t = scores[s]
        if not np.isnan(t):
            p = 1 / (1 + np.exp(-np.float64(z[s])))
            error[s] = weights[s] * (p - t)
            loss -= weights[s] * (t * np.log(p + 1e-12) + (1 - t) * np.log(1 - p + 1e-12))
    for c in range(len(labels)):
        label = labels[c]
        if label < 0:
            continue
        start, end = spans[c], spans[c + 1]
        top = z[start]
        for k in range(start, end):
            top = max(top, z[k])
        total = 0.0
        for k in range(start, end):
            total += np.exp(np.float64(z[k] - top))
        for k in range(start, end):
            p = np.exp(np.float64(z[k] - top)) / total
            error[k] = weights[count + c] * (p - (k - start == label))
            if k - start == label:
                loss -= weights[count + c] * np.log(p + 1e-12)
    return loss


@compiled
def _epoch(
    network: Network,
    squares: Network,
    order: np.ndarray,
    ids: np.ndarray,
    ends: np.ndarray,
    shapes: np.ndarray,
    scores: np.ndarray,
    labels: np.ndarray,
    spans: np.ndarray,
    weights: np.ndarray,
    dropped: float,
    state: np.uint64,
    first_rate: float,
    last_rate: float,
) -> float:
    """Walks once over the documents in `order`; returns the mean loss. `squares` holds Adagrad's accumulators."""
    vectors, w1, b1, w2, b2 = network
    sum_vectors, sum_w1, sum_b1, sum_w2, sum_b2 = squares
    size = vectors.shape[1]
    x = np.empty(w1.shape[0], np.float32)
    h = np.empty(w1.shape[1], np.float32)
    z = np.empty(w2.shape[1], np.float32)
    error = np.empty_like(z)
    back_h, back_x = np.empty_like(h), np.empty_like(x)
    kept = np.empty(len(ids) if len(ids) < 1 << 16 else 1 << 16, np.int32)
    total = 0.0
    for step in range(len(order)):
        i = order[step]
        rate = np.float32(first_rate + (last_rate - first_rate) * step / len(order))
        count = 0
        for place in range(ends[i], ends[i + 1]):
            state = state * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            if (state >> np.uint64(40)) * (1.0 / (1 << 24)) >= dropped and count < len(kept):
                kept[count] = ids[place]
                count += 1
        forward(network, kept[:count], shapes[i], x, h, z)
        total += _errors(z, scores[i], labels[i], spans, weights, error)

        back_h[:] = 0
        for j in range(len(h)):
            value = h[j]
            if value <= 0:
                continue
            gradient = np.float32(0)
            row, row_sum = w2[j], sum_w2[j]
            for k in range(len(z)):
                gradient += row[k] * error[k]
            for k in range(len(z)):
                g = value * error[k]
                row_sum[k] += g * g
                row[k] -= rate * g / (np.sqrt(row_sum[k]) + _BREAK)
            back_h[j] = gradient
        for k in range(len(z)):
            sum_b2[k] += error[k] * error[k]
            b2[k] -= rate * error[k] / (np.sqrt(sum_b2[k]) + _BREAK)
        for d in range(len(x)):
            value = x[d]
            gradient = np.float32(0)
            row, row_sum = w1[d], sum_w1[d]
            for j in range(len(h)):
                gradient += row[j] * back_h[j]
            for j in range(len(h)):
                g = value * back_h[j]
                row_sum[j] += g * g
                row[j] -= rate * g / (np.sqrt(row_sum[j]) + _BREAK)
            back_x[d] = gradient
        for j in range(len(h)):
            sum_b1[j] += back_h[j] * back_h[j]
            b1[j] -= rate * back_h[j] / (np.sqrt(sum_b1[j]) + _BREAK)
        if count:
            scale = np.float32(1) / np.sqrt(np.float32(count))
            mean = np.float32(0)
            for d in range(size):
                back_x[d] *= scale
                mean += back_x[d] * back_x[d]
            mean /= np.float32(size)
            for place in range(count):
                f = kept[place]
                sum_vectors[f, 0] += mean
                move = rate / (np.sqrt(sum_vectors[f, 0]) + _BREAK)
                row = vectors[f]
                for d in range(size):
                    row[d] -= move * back_x[d]
    return total / max(1, len(order))


def spans(sizes: list[int], scores: int) -> np.ndarray:
    """Returns where each class's logits begin, and the end of the last: (classes + 1) int64."""
    return np.cumsum([scores, *sizes]).astype(np.int64)


def train(
    examples: Examples,
    sizes: list[int],
    *,
    bits: int,
    epochs: int,
    rate: float,
    dropped: float,
    weights: np.ndarray,
    seed: int,
    advance: Callable[[int, float], None] | None = None,
) -> Network:
    """Trains a network; every document an epoch, in another order each time, the rate falling linearly to 0.

    Args:
        examples: what is learned.
        sizes: labels of each class.
        bits: features are below 2**bits.
        epochs: walks over the examples.
        rate: Adagrad's, at the start.
        dropped: share of a document's features that are left out, others each time.
        weights: (scores + classes,) float32, of the heads in the loss.
        seed: of the first weights, the orders and what is dropped.
        advance: called with (epoch, mean loss) after each.
    """
    scores = examples.scores.shape[1]
    network = fresh(bits, scores + sum(sizes), seed)
    squares = Network(
        np.zeros((len(network.vectors), 1), np.float32), *(np.zeros_like(weight) for weight in network[1:])
    )
    draw = np.random.Generator(np.random.PCG64(seed + 1))
    for epoch in range(epochs):
        loss = _epoch(
            network,
            squares,
            draw.permutation(len(examples)),
            examples.ids,
            examples.ends,
            examples.shapes,
            examples.scores,
            examples.labels,
            spans(sizes, scores),
            weights,
            dropped,
            np.uint64(seed * 1_000_003 + epoch),
            rate * (1 - epoch / epochs),
            rate * (1 - (epoch + 1) / epochs),
        )
        if advance:
            advance(epoch, float(loss))
    return network


@compiled
def _logits(network: Network, ids: np.ndarray, ends: np.ndarray, shapes: np.ndarray, out: np.ndarray) -> None:
    x = np.empty(network.hidden.shape[0], np.float32)
    h = np.empty(network.hidden.shape[1], np.float32)
    for i in range(len(shapes)):
        forward(network, ids[ends[i] : ends[i + 1]], shapes[i], x, h, out[i])


def logits(network: Network, ids: np.ndarray, ends: np.ndarray, shapes: np.ndarray) -> np.ndarray:
    """Returns the logits of texts whose features these are (`features.features`), float32 (n, logits)."""
    out = np.empty((len(shapes), len(network.out_bias)), np.float32)
    _logits(network, ids, ends, shapes, out)
    return out
