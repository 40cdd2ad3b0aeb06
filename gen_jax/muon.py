"""Muon: steps of momentum whose singular values are all made about one (Jordan et al. 2024).

The iteration of Newton and Schulz multiplies a matrix X by polynomials of X'X. Here it runs on the
Gram matrix alone and collects the polynomials, which commute with it, in one factor:

    A <- P A P,   Q <- Q P,   with P = a + b A + c A A;   in the end X Q.

So only the first and the last product read X itself, and the iterations of all matrices with the
same smaller side run as one. `optax.contrib.muon` iterates on X, one parameter after the other: on
a CPU the step of a small network spent a third of its time there.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

__all__ = ["muon", "orthogonalise"]

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al.: the steepest at zero
_ITERATIONS = 5
_MOMENTUM = 0.95
_NEGLIGIBLE = 1e-15  # the norm of a matrix that counts as zero: its square is a float32 still
_ADAMS_RMS = 0.2  # of a step of Adam over its rate (Liu et al. 2025, 2502.16982, section 2.2)


def muon(
    rate: float | Callable[[Array], Array],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Muon for matrices and the kernels of convolutions, and NAdam for all other parameters.

    The kernel [height, width, C, Cout] of a convolution is a matrix of all that an output reads by
    outputs.

    A step of Muon has the root mean square of one of Adam (Liu et al. 2025, arXiv:2502.16982,
    section 2.2), so that one rate serves both.

    Args:
      rate: the rate, or a schedule of the step.
      beta1: decay of NAdam's first moment; Muon's momentum is 0.95, of Nesterov's kind.
      beta2: decay of NAdam's second moment.
      weight_decay: decoupled decay of what Muon trains.
    """
    orthogonal = optax.chain(
        optax.trace(_MOMENTUM, nesterov=True),
        optax.stateless(lambda updates, params: orthogonalise(updates)),
        optax.stateless(lambda updates, params: jax.tree.map(_scaled, updates)),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    transforms = {"muon": orthogonal, "nadam": optax.nadam(rate, b1=beta1, b2=beta2)}

    def labels(params):
        return jax.tree.map(lambda leaf: "muon" if leaf.ndim in (2, 4) else "nadam", params)

    return optax.partition(transforms, labels)


def orthogonalise(tree: Any) -> Any:
    """Each leaf, as a matrix [.., last axis], with its singular values made about one.

    Five iterations bring those between 0.0015 and 1 of the Frobenius norm to between 0.68 and 1.21;
    smaller ones are enlarged up to 485 times. A matrix whose norm is below 1e-15 becomes zero.

    Args:
      tree: a tree of float32 arrays of two axes or more; all axes but the last are taken together.

    Returns:
      A tree of the same structure and shapes.
    """
    leaves, structure = jax.tree.flatten(tree)
    matrices = [leaf.reshape(-1, leaf.shape[-1]) for leaf in leaves]
    by_side = {}
    for i, matrix in enumerate(matrices):
        by_side.setdefault(min(matrix.shape), []).append(i)
    for members in by_side.values():
        factors = _factors(jnp.stack([_gram(matrices[i]) for i in members]))
        for i, factor in zip(members, factors, strict=True):
            matrix = matrices[i]
            matrices[i] = _product(matrix, factor) if _is_tall(matrix) else _product(factor, matrix)
    pairs = zip(leaves, matrices, strict=True)
    return structure.unflatten(matrix.reshape(leaf.shape) for leaf, matrix in pairs)


def _factors(
    grams: Float[Array, "number side side"],
) -> Float[Array, "number side side"]:
    """What a matrix of each Gram matrix is multiplied by, its division by its norm included."""
    a, b, c = _COEFFICIENTS
    squares = jnp.trace(grams, axis1=1, axis2=2)[:, None, None]
    inverse = jnp.where(squares > _NEGLIGIBLE**2, jax.lax.rsqrt(squares), 0)
    grams, total = grams * inverse**2, inverse
    unit = jnp.eye(grams.shape[-1], dtype=grams.dtype)[None]
    for i in range(_ITERATIONS):
        polynomial = a * unit + b * grams + c * _product(grams, grams)
        total = _product(total, polynomial) if i else total * polynomial
        if i + 1 < _ITERATIONS:
            grams = _product(polynomial, _product(grams, polynomial))
    return total


def _is_tall(matrix):
    return matrix.shape[0] >= matrix.shape[1]


def _gram(matrix):
    return _product(matrix.T, matrix) if _is_tall(matrix) else _product(matrix, matrix.T)


def _product(left, right):
    """In float32 also where the default is less: a Gram matrix has the squares of what it is of."""
    return jnp.matmul(left, right, precision=jax.lax.Precision.HIGHEST)


def _scaled(update):
    rows, columns = math.prod(update.shape[:-1]), update.shape[-1]
    return update * (_ADAMS_RMS * math.sqrt(max(rows, columns)))
