"""Attention within whole sequences; of new tokens to a cache it is `kernels.decode_attention`."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

__all__ = ["attend", "dot_product_attention", "local_attention", "rotate"]

_HIDDEN = -1e30  # score of a hidden key: finite, so that a row with no key at all stays finite


def rotate(
    x: Float[Array, "B L H Dh"],
    positions: Int[Array | np.ndarray, "#B L"] | Int[Array | np.ndarray, " L"],
    base: float | int,
) -> Float[Array, "B L H Dh"]:
    """Rotary positions (Su et al. 2021, 2104.09864), with halves paired as in Llama.

    Args:
      x: queries or keys; Dh is even.
      positions: of each input, or of the inputs of all samples.
      base: the angle of pair j is position / base ** (2 j / Dh).

    Returns:
      As x, in its dtype; the rotation is in float32.
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    positions = jnp.asarray(positions, jnp.float32)
    positions = positions if positions.ndim == 2 else positions[None]
    angles = positions[:, :, None, None] * frequencies[None, None, None]  # [B or 1, L, 1, Dh / 2]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def dot_product_attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B M Hkv Dh"],
    v: Float[Array, "B M Hkv Dh"],
    *,
    mask: Bool[Array | np.ndarray, "B M"] | None = None,
    causal: bool = False,
    groups: tuple[int, ...] = (),
) -> Float[Array, "B L H Dh"]:
    """Scaled dot-product attention, with softmax in float32 (Vaswani et al. 2017, equation 1).

    `jax.nn.dot_product_attention` computes the same. This form, with heads outside the two
    products, takes half its time on a CPU, forward and backward.

    Args:
      q: queries; query head h reads the head h // (H / Hkv) of keys and values.
      k: keys, where Hkv divides H.
      v: values.
      mask: which keys are valid; None for all. A query without any valid key gives finite values
        without meaning.
      causal: query i sees the keys 0 to i (L = M).
      groups: sizes of groups of positions, of which the L are the first; a query then sees the keys
        of its own group and of those before. Empty for groups of one.
    """
    k, v = rearrange(k, "b m k d -> b k d m"), rearrange(v, "b m k d -> b k m d")
    return attend(q, k, v, mask=mask, causal=causal, groups=groups)


def attend(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B Hkv Dh M"],
    v: Float[Array, "B Hkv M Dh"],
    *,
    mask: Bool[Array | np.ndarray, "B M"] | None = None,
    causal: bool = False,
    groups: tuple[int, ...] = (),
) -> Float[Array, "B L H Dh"]:
    """`dot_product_attention` of keys and values that are stored as its two products read them."""
    length, width = q.shape[1], q.shape[-1]
    q = rearrange(q / width**0.5, "b l (k g) d -> b k (g l) d", k=k.shape[1])
    scores = jnp.einsum("bkqd,bkdm->bkqm", q, k, preferred_element_type=jnp.float32)
    seen = None
    if causal:
        place = jnp.arange(length)
        if groups:  # the number of the group of each position
            place = jnp.asarray(np.repeat(np.arange(len(groups)), groups)[:length])
        shared = q.shape[2] // length
        seen = jnp.tile(place[None] <= place[:, None], (shared, 1))[None, None]
    if mask is not None:
        mask = mask[:, None, None]
        seen = mask if seen is None else mask & seen
    if seen is not None:
        scores = jnp.where(seen, scores, _HIDDEN)
    return rearrange(_weighted(scores, v), "b k (g l) d -> b l (k g) d", l=length)


def _weighted(scores, v):
    """softmax(scores) v, of scores [..., Q, M] in float32 and values [..., M, Dh], in their type.

    Where heads are narrower than the keys are many, the product is divided by the sum of the
    softmax, and not each weight: with 32 heads of 8 a CPU takes a quarter of the time.
    """
    if v.shape[-1] >= v.shape[-2]:
        return jnp.matmul(jax.nn.softmax(scores, axis=-1).astype(v.dtype), v)
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(axis=-1, keepdims=True)))
    out = jnp.matmul(weights.astype(v.dtype), v)
    return (out / weights.sum(axis=-1, keepdims=True)).astype(v.dtype)


def local_attention(
    q: Float[Array, "B L H Dh"],
    k: Float[Array, "B L Hkv Dh"],
    v: Float[Array, "B L Hkv Dh"],
    window: int,
    *,
    mask: Bool[Array | np.ndarray, "B L"] | None = None,
) -> Float[Array, "B L H Dh"]:
    """Causal attention to the last `window` inputs, including that of the query itself.

    The sequence is cut into blocks of that length, and a block of queries sees its own block and
    the one before (Image Transformer: Parmar et al. 2018, 1802.05751, section 3.3, in one
    dimension), so that cost and memory grow with L x window, not with L x L.

    Args:
      q: queries; query head h reads the head h // (H / Hkv) of keys and values.
      k: keys, where Hkv divides H.
      v: values.
      window: at least 1.
      mask: which keys are valid; None for all.
    """
    batch, length, _, width = q.shape
    blocks = -(-length // window)
    groups = q.shape[2] // k.shape[2]

    def cut(x, before):  # [B, L, ...] -> [B, blocks, window (+ window before), ...]
        pad = ((0, 0), (before * window, blocks * window - length)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, -1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2) if before else x

    q = rearrange(cut(q / width**0.5, 0), "b n l (k g) d -> b n k (g l) d", g=groups)
    k, v = cut(k, 1).swapaxes(2, 3), cut(v, 1).swapaxes(2, 3)
    scores = jnp.einsum("bnkqd,bnkmd->bnkqm", q, k, preferred_element_type=jnp.float32)
    query, key = jnp.arange(window)[:, None], jnp.arange(2 * window)[None]
    seen = jnp.tile((key > query) & (key <= query + window), (groups, 1))
    valid = jnp.ones((1, length), bool) if mask is None else mask
    valid = jnp.broadcast_to(valid, (batch, length))
    seen = seen[None, None, None] & cut(valid, 1)[:, :, None, None]
    out = _weighted(jnp.where(seen, scores, _HIDDEN), v)
    out = rearrange(out, "b n k (g l) d -> b (n l) (k g) d", g=groups)
    return out[:, :length]
