"""The transformer as pure functions of a tree of parameters, with a cache for autoregressive use.

Pre-norm blocks (Vaswani et al. 2017, 1706.03762) in the form of GPT-2 (Radford et al. 2019) or of
Llama (Touvron et al. 2023, 2302.13971), causal or not, with cross-attention to a memory or not.

B batch, L length, N new inputs, D width, H heads of queries, Hkv heads of keys and values, Dh width
of a head, V vocabulary, M length of the memory.
"""

from collections.abc import Sequence
from typing import Any, no_type_check

import flax.struct
import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int8, Key

import kernels
from gen_jax.condition import is_concrete
from gen_jax.config import frozen
from gen_jax.nn.config import TransformerConfig
from gen_jax.nn.transformer_modules import Transformer
from gen_jax.trees import named_leaves
from kernels import KVCache

__all__ = ["MemoryKV", "PreparedParams", "TokenNetwork", "cast", "check_finite"]

# Keys and values of a memory for each block, as the products of attention read them.
MemoryKV = Sequence[tuple[Float[Array, "B Hkv Dh M"], Float[Array, "B Hkv M Dh"]]]

_MATRICES = (  # of a block, in the order of `kernels.LayerWeights`
    ("attention", "qkv"),
    ("attention", "out"),
    ("feed_forward", "up"),
    ("feed_forward", "down"),
)


@no_type_check  # jax also makes trees of this class whose leaves are no arrays
@flax.struct.dataclass
class PreparedParams:
    """Parameters in the form that a loop of evaluations reads.

    Attributes:
      params: in the type that is computed with.
      head: the matrix of the last product, stored as a product with a few rows reads it; where
        weights are int8, what `kernels.quantize` makes of its transpose.
      int8: the same of the matrices of the blocks, which are then not among the parameters; None
        where weights are of the type that is computed with.
      vectors: the vectors of all blocks as `kernels.decode_layers` reads them; None where the
        blocks are not of its form, or their weights are int8.
    """

    params: Any
    head: Float[Array, "D V"] | tuple[Int8[Array, "V D"], Float32[Array, " V"]]
    int8: Any = None
    vectors: Float32[Array, "layers 8 W"] | None = None


def cast(params: Any, config: TransformerConfig) -> dict:
    """Parameters in the type that is computed with, except normalisation, which stays float32."""
    dtype = jnp.dtype(config.dtype)
    flat = flax.traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        if not path[-2:-1] or not path[-2].startswith("norm"):
            flat[path] = leaf.astype(dtype)
    return flax.traverse_util.unflatten_dict(flat)


def check_finite(params: Any) -> None:
    """Refuses parameters that int8 cannot hold, where their values are known.

    Raises:
      ValueError: one is NaN or infinite; the first of them is named.
    """
    for name, leaf in named_leaves(params).items():
        if is_concrete(leaf) and not jnp.isfinite(leaf).all():
            raise ValueError(f"{name} is not finite: it has no weights in int8")


@frozen
class TokenNetwork:
    """The transformer as pure functions of a tree of parameters; hashable by its sizes.

    Tokens are in [0, V + extra_inputs); an id that is out of range is not detected.

    Raises:
      ValueError: at construction, when the configuration has no vocabulary.
    """

    config: TransformerConfig

    def __post_init__(self):
        if self.config.vocabulary < 1:
            raise ValueError(f"vocabulary must be at least 1, got {self.config.vocabulary}")

    def init(self, key: Key[Array, ""]) -> dict:
        """Fresh float32 parameters."""
        tokens = jnp.zeros((1, 1), jnp.int32)
        memory = jnp.zeros((1, 1, self.config.width)) if self.config.memory else None
        return jax.jit(Transformer(self.config).init)(key, tokens, memory=memory)["params"]

    def __call__(
        self,
        params: Any,
        tokens: Int[Array | np.ndarray, "B L"],
        *,
        mask: Bool[Array | np.ndarray, "B L"] | None = None,
        memory: Float[Array | np.ndarray, "B M D"] | None = None,
        memory_kv: MemoryKV | None = None,
        memory_mask: Bool[Array | np.ndarray, "B M"] | None = None,
        added: Float[Array | np.ndarray, " B #L D"] | None = None,
        keys: Key[Array, " B"] | None = None,
    ) -> Float32[Array, "B L V"]:
        """Logits at every input.

        Args:
          params: of `init`, not prepared.
          tokens: the inputs.
          mask: which inputs are valid; None for all. The others are seen by none.
          memory: the second sequence, for a network with cross-attention.
          memory_kv: of `project_memory`, in place of the memory.
          memory_mask: which positions of the memory are valid; None for all.
          added: added to the embedding of the inputs; None for nothing.
          keys: for dropout; None for none.

        Raises:
          ValueError: the sequence is longer than the context, or the memory and `config.memory`
            disagree.
        """
        return Transformer(self.config).apply(
            {"params": params},
            tokens,
            mask=mask,
            memory=memory,
            memory_kv=memory_kv,
            memory_mask=memory_mask,
            added=added,
            keys=keys,
        )

    def hidden(
        self, params: Any, tokens: Int[Array | np.ndarray, "B L"], **options: Any
    ) -> Float32[Array, "B L D"]:
        """The values of which the logits are a linear function; options are as for a call."""
        variables = {"params": params}
        return Transformer(self.config).apply(variables, tokens, method="hidden", **options)

    def project_memory(self, params: Any, memory: Float[Array | np.ndarray, "B M D"]) -> MemoryKV:
        """Keys and values of a memory for every block; of parameters, prepared or not."""
        return Transformer(self.config).apply({"params": params}, memory, method="project_memory")

    def condition(
        self, params: Any, batch: dict[str, Any], keys: Key[Array, " B"] | None = None
    ) -> dict[str, Any]:
        """Options of a call that follow from what a batch conditions on: here none."""
        return {}

    def prepare(self, params: Any) -> PreparedParams:
        """What depends only on the parameters, computed once before many evaluations."""
        params = cast(params, self.config)
        head = params.pop("head", None)
        if head is None:
            head = params["token"][: self.config.vocabulary].T
        return PreparedParams(params, head, vectors=self._vectors(params))

    def prepare_int8(self, params: Any) -> PreparedParams:
        """As `prepare`, with matrices in int8 that are read as such; not for cross-attention.

        What is looked up and not multiplied, the tables of tokens and positions, stays as it is.
        """
        flat = flax.traverse_util.flatten_dict(params)
        matrices = {path: flat.pop(path) for path in list(flat) if path[-1] == "kernel"}
        head = flat.pop(("head",), None)
        head = flat[("token",)][: self.config.vocabulary] if head is None else head.T
        int8 = {path: kernels.quantize(matrix.T) for path, matrix in matrices.items()}
        unflatten = flax.traverse_util.unflatten_dict
        return PreparedParams(
            cast(unflatten(flat), self.config), kernels.quantize(head), unflatten(int8)
        )

    def encode(self, prepared: PreparedParams, cond: dict[str, Any]) -> dict[str, Any]:
        """Options of `extend` and `evaluate` that follow from a sampler's condition: here none."""
        return {}

    def evaluate(
        self, prepared: PreparedParams, tokens: Int[Array | np.ndarray, "B L"], **options: Any
    ) -> Float32[Array, "B L V"]:
        """As a call, with prepared parameters: for use inside a loop of evaluations."""
        hidden = self._apply(prepared, tokens, method="hidden", **options)
        rows = hidden.reshape(-1, hidden.shape[-1])
        return self.logits(prepared, rows).reshape(*hidden.shape[:2], -1)

    def make_caches(self, batch: int, cache_length: int) -> tuple[KVCache, ...]:
        """Empty caches, one for each block, for sequences of up to `cache_length` inputs."""
        config = self.config
        cache = (batch, config.key_heads, cache_length, config.head_size, jnp.dtype(config.dtype))
        return tuple(kernels.make_kv_cache(*cache) for _ in range(config.layers))

    def extend(
        self,
        prepared: PreparedParams,
        tokens: Int[Array | np.ndarray, "B N"],
        caches: tuple[KVCache, ...],
        column: int | Int[Array | np.ndarray, ""] | Int[Array | np.ndarray, " B"],
        first: Int[Array | np.ndarray, " B"] | None = None,
        *,
        memory_kv: MemoryKV | None = None,
        memory_mask: Bool[Array | np.ndarray, "B M"] | None = None,
    ) -> tuple[Float32[Array, "B N D"], tuple[KVCache, ...]]:
        """Hidden values of new inputs, which join those in the caches; for causal networks.

        In a network with groups the new inputs are one group, and see each other.

        Args:
          prepared: of `prepare`.
          tokens: the new inputs.
          caches: of `make_caches`; to be updated in place they must not be used again.
          column: of the first new input in the caches, for all samples or for each.
          first: column of the first input of each sample (left padding); None for 0.
          memory_kv: of `project_memory`, for a network with cross-attention.
          memory_mask: which positions of the memory are valid; None for all.

        Returns:
          The hidden values, and the caches. Values in columns before `first` have no meaning.

        Raises:
          ValueError: the network is not causal, or `memory_kv` and `config.memory` disagree.
        """
        if prepared.vectors is not None and tokens.shape[1] == 1:
            return self._extend_by_one(prepared, tokens, caches, column, first)
        options = {"memory_kv": memory_kv, "memory_mask": memory_mask}
        return self._apply(prepared, tokens, caches, column, first, method="extend", **options)

    def _extend_by_one(self, prepared, tokens, caches, column, first):
        """All blocks as one kernel, where it is the default of the platform."""
        x, positions = self._apply(prepared, tokens, column, first, method="embed_new")

        def otherwise(x, caches):
            rest = x[:, None], positions, caches, column, first
            x, caches = self._apply(prepared, *rest, method="extend_blocks")
            return x[:, 0], caches

        x, caches = kernels.decode_layers(
            x[:, 0],
            self._weights(prepared.params),
            prepared.vectors,
            caches,
            column,
            first,
            heads=self.config.heads,
            epsilon=self.config.norm_epsilon,
            window=self.config.window,
            otherwise=otherwise,
        )
        return self._apply(prepared, x[:, None], method="normalise"), caches

    def _weights(self, params):
        """The matrices of each block, as `kernels.decode_layers` takes them."""
        blocks = [params[f"block_{layer}"] for layer in range(self.config.layers)]
        return tuple(
            kernels.LayerWeights(*(block[part][name]["kernel"] for part, name in _MATRICES))
            for block in blocks
        )

    def _vectors(self, params):
        """See `PreparedParams`."""
        config = self.config
        other = config.norm, config.activation, config.causal, config.memory
        if (
            other != ("layer", "gelu", True, False)
            or config.position in ("rotary", "both")
            or not config.heads == config.key_heads == config.width / config.head_size
        ):
            return None
        vectors = []
        for layer in range(config.layers):
            block = params[f"block_{layer}"]
            norms = [block["norm_attention"], block["norm_feed_forward"]]
            found = [norm.get(name) for norm in norms for name in ("scale", "bias")]
            found += [block[part][name].get("bias") for part, name in _MATRICES]
            vectors.append(kernels.LayerVectors(*found))
        return kernels.stack_vectors(vectors, self._weights(params))

    def logits(
        self, prepared: PreparedParams, hidden: Float[Array, "*batch D"]
    ) -> Float32[Array, "*batch V"]:
        """Logits of hidden values."""
        if prepared.int8 is not None:
            rows = hidden.reshape(-1, hidden.shape[-1]).astype(self.config.dtype)
            logits = kernels.quantized_linear(rows, *prepared.head)
            return logits.reshape(*hidden.shape[:-1], -1)
        hidden = hidden.astype(prepared.head.dtype)
        return jnp.matmul(hidden, prepared.head, preferred_element_type=jnp.float32)

    def _apply(self, prepared, *arguments, **options):
        variables, head = {"params": prepared.params}, {"head": prepared.head}
        if prepared.int8 is not None:
            variables["int8"] = prepared.int8 | head
        elif not self.config.tied:
            variables["params"] = prepared.params | head
        return Transformer(self.config).apply(variables, *arguments, **options)
