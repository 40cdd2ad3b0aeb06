"""The Linen modules of the transformer, which `gen_jax.nn.transformer` gives as pure functions.

Pre-norm blocks (Vaswani et al. 2017, 1706.03762) in the form of GPT-2 (Radford et al. 2019) or of
Llama (Touvron et al. 2023, 2302.13971), causal or not, with cross-attention or not.

B batch, L inputs, N new inputs, D width, H heads of queries, Hkv heads of keys and values, Dh width
of a head, V vocabulary, M length of the memory.
"""

import flax.linen as nn
import jax.numpy as jnp
from einops import rearrange

import kernels
from gen_jax.nn.attention import attend, dot_product_attention, local_attention, rotate
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.layers import Dropout

_INIT = 0.02  # standard deviation of GPT-2's weights


class Linear(nn.Module):
    """A matrix product at each position, as a product of two matrices.

    With one axis for all positions, compilers compute the gradient of the kernel without a
    transposed copy of the gradient of the output, which nn.Dense on [B, L, D] needs on a CPU. Where
    the collection "int8" holds the kernel as `kernels.quantize` makes it, that is read instead.
    """

    config: TransformerConfig
    features: int
    residual: bool = False

    @nn.compact
    def __call__(self, x):  # [B, L, D] -> [B, L, features]
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        # GPT-2: what is added to the residual stream is scaled down by the number of additions.
        scale = _INIT / (2 * config.layers) ** 0.5 if self.residual else _INIT
        init = nn.initializers.normal(scale)
        rows, int8 = x.reshape(-1, x.shape[-1]).astype(dtype), self.get_variable("int8", "kernel")
        if int8 is None:
            kernel = self.param("kernel", init, (x.shape[-1], self.features))
            y = rows @ kernel.astype(dtype)
        else:
            y = kernels.quantized_linear(rows, *int8).astype(dtype)
        if config.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(dtype)[None]
        return y.reshape(*x.shape[:-1], self.features)


def _norm(config):
    if config.norm == "rms":
        return nn.RMSNorm(epsilon=config.norm_epsilon, dtype=jnp.float32)
    return nn.LayerNorm(
        epsilon=config.norm_epsilon,
        use_bias=config.bias,
        use_fast_variance=False,
        dtype=jnp.float32,
    )


class SelfAttention(nn.Module):
    """Multi-head attention within a sequence, with one product for queries, keys and values."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        heads = config.heads + 2 * config.key_heads
        self.qkv = Linear(config, heads * config.head_size)
        self.out = Linear(config, config.width, residual=True)

    def _project(self, x, positions):  # [B, L, D] -> [B, L, H, Dh], 2 x [B, L, Hkv, Dh]
        config = self.config
        heads, key_heads = config.heads, config.key_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], heads + 2 * key_heads, config.head_size)
        q, k, v = jnp.split(qkv, (heads, heads + key_heads), axis=2)
        if config.position in ("rotary", "both"):
            q = rotate(q, positions, config.rotary_base)
            k = rotate(k, positions, config.rotary_base)
        return q, k, v

    def _merge(self, x):  # [B, L, H, Dh] -> [B, L, D]
        return self.out(x.reshape(*x.shape[:2], -1))

    def __call__(self, x, positions, mask):  # mask: bool [B, L], the valid keys, or None
        q, k, v = self._project(x, positions)
        config = self.config
        if config.window and config.window < x.shape[1]:
            return self._merge(local_attention(q, k, v, config.window, mask=mask))
        seen = {"causal": config.causal, "groups": config.groups}
        return self._merge(dot_product_attention(q, k, v, mask=mask, **seen))

    def extend(self, x, positions, cache, column, first):
        """Of N new inputs, with the cache of this layer."""
        q, k, v = self._project(x, positions)
        seen = {"window": self.config.window, "causal": not self.config.groups}
        out, cache = kernels.decode_attention(q, k, v, cache, column, first, **seen)
        return self._merge(out), cache


class CrossAttention(nn.Module):
    """Multi-head attention to a memory, whose keys and values `project` computes once.

    They are stored as the two products read them, so that a loop does not move them again.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.query = Linear(config, config.heads * config.head_size)
        self.key_value = Linear(config, 2 * config.key_heads * config.head_size)
        self.out = Linear(config, config.width, residual=True)

    def project(self, memory):  # [B, M, D] -> [B, Hkv, Dh, M], [B, Hkv, M, Dh]
        kv = self.key_value(memory).reshape(*memory.shape[:2], -1, self.config.head_size)
        k, v = jnp.split(kv, 2, axis=2)
        return rearrange(k, "b m k d -> b k d m"), rearrange(v, "b m k d -> b k m d")

    def __call__(self, x, memory_kv, mask):  # mask: bool [B, M] or None
        q = self.query(x).reshape(*x.shape[:2], self.config.heads, self.config.head_size)
        out = attend(q, *memory_kv, mask=mask)
        return self.out(out.reshape(*x.shape[:2], -1))


class FeedForward(nn.Module):
    """The network at each position: GELU, or SwiGLU with gate and value in one product."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        gated = config.activation == "swiglu"
        self.up = Linear(config, config.mlp_size * (2 if gated else 1))
        self.down = Linear(config, config.width, residual=True)

    def __call__(self, x):  # [B, L, D] -> [B, L, D]
        h = self.up(x)
        if self.config.activation == "swiglu":
            gate, value = jnp.split(h, 2, axis=-1)
            return self.down(nn.silu(gate) * value)
        return self.down(nn.gelu(h, approximate=True))


class Block(nn.Module):
    """Attention and feed-forward network, each on the normalised residual stream."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.norm_attention = _norm(config)
        self.attention = SelfAttention(config)
        if config.memory:
            self.norm_cross = _norm(config)
            self.cross = CrossAttention(config)
            self.dropout_cross = Dropout(config.dropout)
        self.norm_feed_forward = _norm(config)
        self.feed_forward = FeedForward(config)
        self.dropout_attention = Dropout(config.dropout)
        self.dropout_feed_forward = Dropout(config.dropout)

    def __call__(self, x, positions, mask, memory_kv, memory_mask, keys):
        attended = self.attention(self.norm_attention(x), positions, mask)
        x = x + self.dropout_attention(attended, keys)
        return self._rest(x, memory_kv, memory_mask, keys)

    def extend(self, x, positions, cache, column, first, memory_kv, memory_mask):
        """Of N new inputs, with the cache of this layer."""
        attended, cache = self.attention.extend(
            self.norm_attention(x), positions, cache, column, first
        )
        return self._rest(x + attended, memory_kv, memory_mask, None), cache

    def _rest(self, x, memory_kv, memory_mask, keys):
        if self.config.memory:
            crossed = self.cross(self.norm_cross(x), memory_kv, memory_mask)
            x = x + self.dropout_cross(crossed, keys)
        return x + self.dropout_feed_forward(self.feed_forward(self.norm_feed_forward(x)), keys)


class Transformer(nn.Module):
    """Tokens to logits; its methods are those of `TokenNetwork`, which documents them."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        init = nn.initializers.normal(_INIT)
        inputs = config.vocabulary + config.extra_inputs
        self.token = self.param("token", init, (inputs, config.width))
        if config.position in ("learned", "both"):
            self.position = self.param("position", init, (config.context, config.width))
        self.dropout = Dropout(config.dropout)
        self.block = [Block(config) for _ in range(config.layers)]
        self.norm = _norm(config)
        if not config.tied and not self.has_variable("int8", "head"):
            self.head = self.param("head", init, (config.width, config.vocabulary))

    def __call__(self, tokens, **options):
        return self.logits(self.hidden(tokens, **options))

    def hidden(
        self,
        tokens,
        *,
        mask=None,
        memory=None,
        memory_kv=None,
        memory_mask=None,
        added=None,
        keys=None,
    ):
        if (memory is not None or memory_kv is not None) != self.config.memory:
            raise ValueError("memory and config.memory go together: give both or neither")
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"a sequence of {length} inputs is longer than the context of {self.config.context}"
            )
        positions = jnp.arange(length)[None]
        x = self._embed(tokens, positions)
        x = self.dropout(x if added is None else x + added, keys)
        if memory_kv is None:
            memory_kv = [None] * len(self.block) if memory is None else self.project_memory(memory)
        for block, entry in zip(self.block, memory_kv, strict=True):
            x = block(x, positions, mask, entry, memory_mask, keys)
        return self.norm(x)

    def extend(self, tokens, caches, column, first=None, *, memory_kv=None, memory_mask=None):
        if not self.config.causal:
            raise ValueError("only a causal network can be extended by new inputs")
        if (memory_kv is not None) != self.config.memory:
            raise ValueError("memory_kv and config.memory go together: give both or neither")
        x, positions = self.embed_new(tokens, column, first)
        x, caches = self.extend_blocks(x, positions, caches, column, first, memory_kv, memory_mask)
        return self.normalise(x), caches

    def embed_new(self, tokens, column, first):  # -> [B, N, D], positions [1 or B, N]
        columns = jnp.atleast_1d(jnp.asarray(column))[:, None]
        positions = columns + jnp.arange(tokens.shape[1])[None]  # [1, N] or [B, N]
        if first is not None:
            positions = jnp.maximum(positions - first[:, None], 0)
        return self._embed(tokens, positions), positions

    def extend_blocks(
        self, x, positions, caches, column, first, memory_kv=None, memory_mask=None
    ):  # -> [B, N, D], the caches
        memory_kv = [None] * len(self.block) if memory_kv is None else memory_kv
        grown = []
        for block, cache, entry in zip(self.block, caches, memory_kv, strict=True):
            x, cache = block.extend(x, positions, cache, column, first, entry, memory_mask)
            grown.append(cache)
        return x, tuple(grown)

    def normalise(self, x):  # [B, L, D]
        return self.norm(x)

    def project_memory(self, memory):  # [B, M, D] -> `CrossAttention.project` for every block
        return [block.cross.project(memory) for block in self.block]

    def logits(self, hidden):  # [B, L, D] -> [B, L, V] float32
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        head = self.token[: config.vocabulary].T if config.tied else self.head
        rows = hidden.reshape(-1, config.width).astype(dtype)
        logits = jnp.matmul(rows, head.astype(dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:2], -1)

    def _embed(self, tokens, positions):  # [B, L], [1 or B, L] -> [B, L, D]
        x = self.token[tokens]
        return x + self.position[positions] if self.config.position in ("learned", "both") else x
