"""Attention within whole sequences; of new tokens to a cache it is `kernels.decode_attention`."""

import jax
import jax.numpy as jnp
from einops import rearrange

_HIDDEN = -1e30  # score of a hidden key: finite, so that a row with no key at all stays finite


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, 2104.09864), halves paired as in Llama.

    Args:
      x: [B, S, H, W], W even.
      positions: int32 [B, S] or [S].
      base: the angle of pair j is position / base ** (2 j / W).
    """
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]  # [.., S, 1, W / 2]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def attention(q, k, v, *, mask=None, causal: bool = False) -> jax.Array:
    """Scaled dot-product attention, softmax in float32 (Vaswani et al. 2017, equation 1).

    `jax.nn.dot_product_attention` computes the same; forward and backward on a CPU this form, with
    heads outside the two products, takes half its time.

    Args:
      q: [B, S, H, W].
      k: [B, M, K, W], K dividing H; query head h reads head h // (H / K).
      v: [B, M, K, W].
      mask: bool [B, M] of the keys that exist, or None for all.
      causal: query s sees the keys 0 to s (S = M).

    Returns:
      [B, S, H, W].
    """
    k, v = rearrange(k, "b m k w -> b k w m"), rearrange(v, "b m k w -> b k m w")
    return attend(q, k, v, mask=mask, causal=causal)


def attend(q, k, v, *, mask=None, causal: bool = False) -> jax.Array:
    """`attention` of keys [B, K, W, M] and values [B, K, M, W], as its products read them."""
    steps, width = q.shape[1], q.shape[-1]
    q = rearrange(q / width**0.5, "b s (k g) w -> b k (g s) w", k=k.shape[1])
    scores = jnp.einsum("bkqw,bkwm->bkqm", q, k, preferred_element_type=jnp.float32)
    seen = None
    if causal:
        groups = q.shape[2] // steps
        seen = jnp.tile(jnp.tril(jnp.ones((steps, steps), bool)), (groups, 1))
    if mask is not None:
        mask = mask[:, None, None]
        seen = mask if seen is None else mask & seen
    if seen is not None:
        scores = jnp.where(seen, scores, _HIDDEN)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("bkqm,bkmw->bkqw", weights, v)
    return rearrange(out, "b k (g s) w -> b s (k g) w", s=steps)


def local_attention(q, k, v, window: int, *, mask=None) -> jax.Array:
    """Causal attention to the last `window` inputs, the query's own included.

    The sequence is cut into blocks of that length, and a block of queries sees its own and the
    block before (Image Transformer: Parmar et al. 2018, 1802.05751, section 3.3, in one
    dimension), so that cost and memory grow with L x window, not with L x L.

    Args:
      q: [B, L, H, W].
      k: [B, L, K, W], K dividing H.
      v: [B, L, K, W].
      window: at least 1.
      mask: bool [B, L] of the keys that exist, or None for all.

    Returns:
      [B, L, H, W].
    """
    batch, length, _, width = q.shape
    blocks = -(-length // window)
    groups = q.shape[2] // k.shape[2]

    def cut(x, before):  # [B, L, ...] -> [B, blocks, window (+ window before), ...]
        pad = ((0, 0), (before * window, blocks * window - length)) + ((0, 0),) * (x.ndim - 2)
        x = jnp.pad(x, pad).reshape(batch, -1, window, *x.shape[2:])
        return jnp.concatenate([x[:, :-1], x[:, 1:]], axis=2) if before else x

    q = rearrange(cut(q / width**0.5, 0), "b n s (k g) w -> b n k (g s) w", g=groups)
    k, v = cut(k, 1).swapaxes(2, 3), cut(v, 1).swapaxes(2, 3)
    scores = jnp.einsum("bnkqw,bnkmw->bnkqm", q, k, preferred_element_type=jnp.float32)
    query, key = jnp.arange(window)[:, None], jnp.arange(2 * window)
    seen = jnp.tile((key > query) & (key <= query + window), (groups, 1))
    exists = jnp.ones((1, length), bool) if mask is None else mask
    exists = jnp.broadcast_to(exists, (batch, length))
    seen = seen & cut(exists, 1)[:, :, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, _HIDDEN), axis=-1).astype(v.dtype)
    out = jnp.einsum("bnkqm,bnkmw->bnkqw", weights, v)
    out = rearrange(out, "b n k (g s) w -> b (n s) (k g) w", g=groups)
    return out[:, :length]
