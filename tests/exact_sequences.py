"""Exact distributions of short sequences by enumeration, and tests of samples against them."""

import functools
import itertools

import jax
import numpy as np
from scipy import stats

apply = jax.jit(lambda network, params, tokens: network(params, tokens), static_argnums=0)


@functools.cache
def all_sequences(vocabulary, length):
    """Every sequence, int32 [vocabulary ** length, length], in order."""
    return np.array(list(itertools.product(range(vocabulary), repeat=length)), np.int32)


def next_logits(network, params, rows):
    """Logits [rows, V] after sequences of any lengths, without a cache.

    The rows are padded on the right to the context, so that one program serves all lengths.
    """
    tokens = np.zeros((len(rows), network.config.context), np.int32)
    for row, given in zip(tokens, rows, strict=True):
        row[: len(given)] = given
    logits = np.asarray(apply(network, params, tokens))
    return logits[np.arange(len(rows)), [len(row) - 1 for row in rows]]


def conditional(logits, options):
    """Probabilities of one row after temperature, top_k and top_p, by sorting."""
    z = np.asarray(logits, np.float64) / options.temperature
    order = np.argsort(-z)[: options.top_k or None]
    p = np.exp(z[order] - z.max())
    cumulative = np.cumsum(p) / p.sum()
    order = order[: np.searchsorted(cumulative, options.top_p) + 1] if options.top_p < 1 else order
    kept = np.zeros_like(z)
    kept[order] = np.exp(z[order] - z.max())
    return kept / kept.sum()


def exact_distribution(network, params, first, length, options):
    """Probability of every continuation of the first inputs, in the order of `all_sequences`."""
    rows = all_sequences(network.config.vocabulary, length)
    inputs = np.concatenate([np.tile(np.int32(first), (len(rows), 1)), rows[:, :-1]], axis=1)
    logits = np.asarray(apply(network, params, inputs))[:, len(first) - 1 :]
    p = np.ones(len(rows))
    for i in range(length):
        p *= [conditional(a, options)[row[i]] for a, row in zip(logits[:, i], rows, strict=True)]
    assert abs(p.sum() - 1) < 1e-5
    return p


def p_value(drawn, exact, vocabulary):
    """Of Pearson's test over all sequences, rare ones joined to the last frequent one."""
    weights = vocabulary ** np.arange(drawn.shape[1])[::-1]
    observed = np.bincount(drawn @ weights, minlength=len(exact))
    if observed[exact == 0].any():
        return 0.0
    order = np.argsort(-exact)
    observed, expected = observed[order], len(drawn) * exact[order] / exact.sum()
    ends = np.arange((expected >= 8).sum())
    return stats.chisquare(np.add.reduceat(observed, ends), np.add.reduceat(expected, ends)).pvalue
