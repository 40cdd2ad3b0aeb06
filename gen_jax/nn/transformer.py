"""The pre-norm transformer (Vaswani et al. 2017, 1706.03762), in the form of GPT-2 (Radford et al.
2019) or of Llama (Touvron et al. 2023, 2302.13971), causal or not, with cross-attention or not.

B batch, L inputs, S new inputs, D width, H heads of queries, K heads of keys and values, W width of
a head, V vocabulary, M length of the memory.
"""

import dataclasses

import flax.linen as nn
import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
from einops import rearrange

import kernels
from gen_jax.nn.attention import attend, attention, local_attention, rotate
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.layers import Dropout
from kernels import KVCache

_INIT = 0.02  # standard deviation of GPT-2's weights


class Linear(nn.Module):
    """A matrix product at each position, as a product of two matrices.

    With one axis for all positions compilers find the gradient of the kernel without a transposed
    copy of what flows in, which nn.Dense on [B, S, D] costs on a CPU.
    """

    config: TransformerConfig
    features: int
    residual: bool = False

    @nn.compact
    def __call__(self, x):  # [B, S, D] -> [B, S, features]
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        # GPT-2: what is added to the residual stream is scaled down by the number of additions.
        scale = _INIT / (2 * config.layers) ** 0.5 if self.residual else _INIT
        init = nn.initializers.normal(scale)
        kernel = self.param("kernel", init, (x.shape[-1], self.features))
        y = x.reshape(-1, x.shape[-1]).astype(dtype) @ kernel.astype(dtype)
        if config.bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,))
            y = y + bias.astype(dtype)
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

    def _project(self, x, positions):  # [B, S, D] -> [B, S, H, W], 2 x [B, S, K, W]
        config = self.config
        heads, key_heads = config.heads, config.key_heads
        qkv = self.qkv(x).reshape(*x.shape[:2], heads + 2 * key_heads, config.head_size)
        q, k, v = jnp.split(qkv, (heads, heads + key_heads), axis=2)
        if config.position in ("rotary", "both"):
            q = rotate(q, positions, config.rotary_base)
            k = rotate(k, positions, config.rotary_base)
        return q, k, v

    def _merge(self, x):  # [B, S, H, W] -> [B, S, D]
        return self.out(x.reshape(*x.shape[:2], -1))

    def __call__(self, x, positions, mask):  # mask: bool [B, L] of keys, or None
        q, k, v = self._project(x, positions)
        if self.config.window and self.config.window < x.shape[1]:
            return self._merge(local_attention(q, k, v, self.config.window, mask=mask))
        return self._merge(attention(q, k, v, mask=mask, causal=self.config.causal))

    def extend(self, x, positions, cache, column, first):
        """Of S new tokens, with the cache of this layer."""
        q, k, v = self._project(x, positions)
        window = self.config.window
        out, cache = kernels.decode_attention(q, k, v, cache, column, first, window=window)
        return self._merge(out), cache


class CrossAttention(nn.Module):
    """Multi-head attention to a memory, whose keys and values are computed once by `project`.

    They are stored as the two products read them, so that a loop does not move them again.
    """

    config: TransformerConfig

    def setup(self):
        config = self.config
        self.query = Linear(config, config.heads * config.head_size)
        self.key_value = Linear(config, 2 * config.key_heads * config.head_size)
        self.out = Linear(config, config.width, residual=True)

    def project(self, memory):  # [B, M, D] -> [B, K, W, M], [B, K, M, W]
        kv = self.key_value(memory).reshape(*memory.shape[:2], -1, self.config.head_size)
        k, v = jnp.split(kv, 2, axis=2)
        return rearrange(k, "b m k w -> b k w m"), rearrange(v, "b m k w -> b k m w")

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

    def __call__(self, x):  # [B, S, D] -> [B, S, D]
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
        """Of S new tokens, with the cache of this layer."""
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
    """Tokens to logits. `apply({"params": params}, tokens)` gives [B, L, V]."""

    config: TransformerConfig

    def setup(self):
        config = self.config
        if config.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {config.vocabulary}")
        init = nn.initializers.normal(_INIT)
        inputs = config.vocabulary + config.extra_inputs
        self.token = self.param("token", init, (inputs, config.width))
        if config.position in ("learned", "both"):
            self.position = self.param("position", init, (config.context, config.width))
        self.dropout = Dropout(config.dropout)
        self.block = [Block(config) for _ in range(config.layers)]
        self.norm = _norm(config)
        if not config.tied:
            self.head = self.param("head", init, (config.width, config.vocabulary))

    def __call__(self, tokens, **options):
        """Logits at every input.

        Args:
          tokens: int [B, L] in [0, V + extra_inputs); an id out of range is not detected.
          mask: bool [B, L] of the inputs that exist; None for all.
          memory: [B, M, D] for a network with cross-attention, else None.
          memory_kv: of `project_memory`, in place of the memory.
          memory_mask: bool [B, M]; None for all.
          added: [B, L, D] or [B, 1, D], added to the embedding of the inputs; None for nothing.
          keys: [B] keys for dropout; None for none.

        Returns:
          [B, L, V] float32.

        Raises:
          ValueError: the sequence is longer than the context, or memory and config disagree.
        """
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
        """[B, L, D] float32, of which the logits are a linear function; arguments as above."""
        if (memory is not None or memory_kv is not None) != self.config.memory:
            raise ValueError("memory and config.memory go together: give both or neither")
        length = tokens.shape[1]
        if length > self.config.context:
            raise ValueError(
                f"a sequence of {length} inputs is longer than the context of {self.config.context}"
            )
        positions = jnp.arange(length)
        x = self._embed(tokens, positions)
        x = self.dropout(x if added is None else x + added, keys)
        if memory_kv is None:
            memory_kv = [None] * len(self.block) if memory is None else self.project_memory(memory)
        for block, entry in zip(self.block, memory_kv, strict=True):
            x = block(x, positions, mask, entry, memory_mask, keys)
        return self.norm(x)

    def extend(self, tokens, caches, column, first=None, *, memory_kv=None, memory_mask=None):
        """Hidden values of S new inputs, which join those in the caches; for causal networks.

        Args:
          tokens: int [B, S].
          caches: one `KVCache` per block.
          column: of the first new input in the caches: int, int32 [], or int32 [B].
          first: int32 [B], column of the first input of each sample (left padding); None for 0.
          memory_kv: of `project_memory`, with cross-attention.
          memory_mask: bool [B, M]; None for all.

        Returns:
          [B, S, D] float32, and the caches. Values in columns before `first` have no meaning.

        Raises:
          ValueError: the network is not causal, or memory_kv and config.memory disagree.
        """
        if not self.config.causal:
            raise ValueError("only a causal network can be extended by new inputs")
        if (memory_kv is not None) != self.config.memory:
            raise ValueError("memory_kv and config.memory go together: give both or neither")
        positions = jnp.asarray(column)[..., None] + jnp.arange(tokens.shape[1])  # [S] or [B, S]
        if first is not None:
            positions = jnp.maximum(positions - first[:, None], 0)
        x = self._embed(tokens, positions)
        memory_kv = [None] * len(self.block) if memory_kv is None else memory_kv
        grown = []
        for block, cache, entry in zip(self.block, caches, memory_kv, strict=True):
            x, cache = block.extend(x, positions, cache, column, first, entry, memory_mask)
            grown.append(cache)
        return self.norm(x), tuple(grown)

    def project_memory(self, memory):
        """Keys and values of the memory [B, M, D] for every block, as `CrossAttention.project`."""
        return [block.cross.project(memory) for block in self.block]

    def logits(self, hidden):
        """[B, S, D] -> [B, S, V] float32."""
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        head = self.token[: config.vocabulary].T if config.tied else self.head
        rows = hidden.reshape(-1, config.width).astype(dtype)
        logits = jnp.matmul(rows, head.astype(dtype), preferred_element_type=jnp.float32)
        return logits.reshape(*hidden.shape[:2], -1)

    def _embed(self, tokens, positions):  # -> [B, S, D]
        x = self.token[tokens]
        return x + self.position[positions] if self.config.position in ("learned", "both") else x


@flax.struct.dataclass
class PreparedParams:
    """Parameters in the form that a loop of evaluations reads.

    Attributes:
      params: in the type that is computed with.
      head: [D, V], stored the way the product with a few rows reads it.
    """

    params: dict
    head: jax.Array


def cast(params: dict, config: TransformerConfig) -> dict:
    """Parameters in the type that is computed with, but for normalisation, which stays as it is."""
    dtype = jnp.dtype(config.dtype)
    flat = flax.traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if not path[-2:-1] or not path[-2].startswith("norm"):
            flat[path] = leaf.astype(dtype)
    return flax.traverse_util.unflatten_dict(flat)


@dataclasses.dataclass(frozen=True)
class TokenNetwork:
    """The transformer as pure functions of a tree of parameters; hashable by its sizes."""

    config: TransformerConfig

    def init(self, key: jax.Array) -> dict:
        """Fresh float32 parameters."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        memory = jnp.zeros((1, 1, self.config.width)) if self.config.memory else None
        return jax.jit(Transformer(self.config).init)(key, tokens, memory=memory)["params"]

    def prepare(self, params) -> PreparedParams:
        """What depends on the parameters alone, computed once before many evaluations."""
        params = cast(params, self.config)
        head = params.pop("head", None)
        if head is None:
            head = params["token"][: self.config.vocabulary].T
        return PreparedParams(params, head)

    def __call__(self, params, tokens, **options) -> jax.Array:
        """Logits [B, L, V]; see `Transformer.__call__`. Takes parameters, not prepared ones."""
        return Transformer(self.config).apply({"params": params}, tokens, **options)

    def condition(self, params, batch: dict, keys=None) -> dict:
        """Options of `__call__` that follow from what a batch conditions on: here none."""
        return {}

    def encode(self, prepared: PreparedParams, cond: dict | None) -> dict:
        """Options of `extend` and `evaluate` that follow from a sampler's condition: here none."""
        return {}

    def evaluate(self, prepared: PreparedParams, tokens, **options) -> jax.Array:
        """As `__call__`, of prepared parameters, inside a loop of evaluations."""
        hidden = self._apply(prepared, tokens, method="hidden", **options)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.logits(prepared, rows).reshape(*hidden.shape[:2], -1)

    def make_caches(self, batch: int, length: int) -> tuple[KVCache, ...]:
        """Empty caches for sequences of up to `length` inputs."""
        config = self.config
        cache = (batch, config.key_heads, length, config.head_size, jnp.dtype(config.dtype))
        return tuple(kernels.make_kv_cache(*cache) for _ in range(config.layers))

    def extend(self, prepared: PreparedParams, tokens, caches, column, first=None, **options):
        """Hidden values [B, S, D] of new inputs, and the caches; see `Transformer.extend`."""
        return self._apply(prepared, tokens, caches, column, first, method="extend", **options)

    def logits(self, prepared: PreparedParams, hidden: jax.Array) -> jax.Array:
        """[..., D] -> [..., V] float32."""
        hidden = hidden.astype(prepared.head.dtype)
        return jnp.matmul(hidden, prepared.head, preferred_element_type=jnp.float32)

    def _apply(self, prepared, *arguments, **options):
        params = prepared.params if self.config.tied else prepared.params | {"head": prepared.head}
        return Transformer(self.config).apply({"params": params}, *arguments, **options)
