"""What is trained: a model with an optimiser, or players who take turns, each with its own.

Both are values of the kind `training.Trainable`, and so is whatever else carries a state of its own
from step to step: a codebook by moving average, the statistics of batches, a counter.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Key

from gen_jax import parallel
from gen_jax.config import TrainConfig, frozen
from gen_jax.models.contract import Model
from gen_jax.muon import muon
from gen_jax.training_step import Trainable

__all__ = [
    "Alternating",
    "ModelTrainable",
    "Player",
    "Trainable",
    "descend",
    "make_optimizer",
    "mean_gradients",
]

_ALL_SAME = types.MappingProxyType({})  # rules of a state that no device changes by itself


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Adam or Muon with clipping of the global norm, linear warm-up, and the decays asked for.

    The decay of weights is that of AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101), of
    parameters of two or more axes; biases and the scales of normalisation are left alone.
    """
    rate = config.learning_rate
    if config.decay == "cosine":
        warmup, final = min(config.warmup, config.steps - 1), rate * config.final_rate
        rate = optax.warmup_cosine_decay_schedule(0, rate, warmup, config.steps, final)
    elif config.warmup:
        rate = optax.linear_schedule(0, rate, config.warmup)
    steps = optax.adam(rate, b1=config.beta1, b2=config.beta2)
    if config.optimizer == "muon":
        betas = {"beta1": config.beta1, "beta2": config.beta2}
        steps = muon(rate, **betas, weight_decay=config.weight_decay)
    elif config.weight_decay:
        matrices = functools.partial(jax.tree.map, lambda leaf: leaf.ndim >= 2)
        steps = optax.adamw(
            rate, config.beta1, config.beta2, weight_decay=config.weight_decay, mask=matrices
        )
    if not config.clip_norm:
        return steps
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), steps)


def mean_gradients(
    loss: Callable[..., tuple[Float[Array, ""], dict[str, Array]]],
    params: Any,
    batch: dict[str, Array],
    keys: Key[Array, " B"],
    slices: int = 1,
    *,
    outputs: bool = False,
) -> tuple[Any, ...]:
    """The gradient of a loss by `params` and its metrics, averaged over the whole batch.

    It is for the `update` of a Trainable: `batch` and `keys` are one device's share, and the result
    is the mean over this share and over all devices.

    Args:
      loss: (params, batch, keys) -> (scalar, metrics), means over the examples given.
      params: what the gradient is taken by; equal on every device.
      batch: arrays [B, ...].
      keys: one per example.
      slices: parts that the share is cut into, one after the other, to save memory; they divide B.
      outputs: whether the loss returns (scalar, (metrics, outputs)), where the outputs are a tree
        of arrays [B, ...].

    Returns:
      The gradients, a tree as `params`, and the metrics, with the scalar itself as "loss". With
      `outputs` those follow, of all of this device's examples.
    """
    # Varying over devices from here, so that gradients are summed once, at the end.
    params = parallel.varying(params)

    def one(batch, keys):
        (value, rest), gradients = jax.value_and_grad(loss, has_aux=True)(params, batch, keys)
        metrics, given = rest if outputs else (rest, None)
        return (gradients, metrics | {"loss": value}), given

    if slices == 1:
        total, given = one(batch, keys)
        return (*parallel.mean(total), given) if outputs else parallel.mean(total)

    def cut(leaf):
        return leaf.reshape(slices, -1, *leaf.shape[1:])

    batch, keys = jax.tree.map(cut, batch), cut(keys)
    total, first = one(jax.tree.map(lambda leaf: leaf[0], batch), keys[0])

    def add(total, some):
        more, given = one(*some)
        return jax.tree.map(jnp.add, total, more), given

    rest = jax.tree.map(lambda leaf: leaf[1:], batch), keys[1:]
    total, given = jax.lax.scan(add, total, rest)
    total = parallel.mean(jax.tree.map(lambda leaf: leaf / slices, total))
    if not outputs:
        return total

    def join(first, later):
        return jnp.concatenate([first, later.reshape(-1, *first.shape[1:])])

    return *total, jax.tree.map(join, first, given)


@frozen
class ModelTrainable:
    """The common kind: a model, whose loss the optimiser of a configuration descends.

    Its state is {"params", "optimizer"}, and the moving average is that of the parameters. Metrics
    are those of the loss, "loss", and "gradient_norm", the global norm before clipping.

    Attributes:
      model: has `init(key)` and `loss(params, batch, keys)`; see `models.contract.Model`.
      config: its fields of the optimiser, and `accumulate`.
    """

    model: Model
    config: TrainConfig

    rules = _ALL_SAME

    @property
    def accumulate(self) -> int:
        """Slices that a device's share of the batch is cut into."""
        return self.config.accumulate

    @property
    def shared(self) -> tuple[str, ...]:
        """Entries of the batch that the loss reads whole, on every device and in every slice."""
        return getattr(self.model, "shared", ())

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters and the state of the optimiser for them."""
        return self._begin(self.model.init(key))

    def update(
        self, state: dict[str, Any], batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """One step down the gradient of the loss, averaged over the batch."""
        shared = parallel.gather({name: batch[name] for name in self.shared})
        batch = {name: value for name, value in batch.items() if name not in shared}

        def loss(params, batch, keys):
            return self.model.loss(params, batch | shared, keys)

        gradients, metrics = mean_gradients(loss, state["params"], batch, keys, self.accumulate)
        norm = optax.tree.norm(gradients)
        state = descend(make_optimizer(self.config), gradients, state)
        return state, metrics | {"gradient_norm": norm}

    def averaged(self, state: dict[str, Any]) -> Any:
        """The parameters."""
        return state["params"]

    def replace_averaged(self, state: dict[str, Any], tree: Any) -> dict[str, Any]:
        """The state that begins with these parameters instead."""
        return self._begin(tree)

    def _begin(self, params):
        return {"params": params, "optimizer": make_optimizer(self.config).init(params)}


def descend(
    optimizer: optax.GradientTransformation, gradients: Any, state: dict[str, Any]
) -> dict[str, Any]:
    """The entries "params" and "optimizer" of a state after one update."""
    updates, after = optimizer.update(gradients, state["optimizer"], state["params"])
    return {"params": optax.apply_updates(state["params"], updates), "optimizer": after}


@frozen
class Player:
    """One of several networks that are trained in turns.

    Attributes:
      loss: (params, batch, keys) -> (scalar, metrics), where `params` has the parameters of all
        players by name. The player descends this loss in its own parameters alone. Scalar and
        metrics are means over the examples of the batch.
      optimizer: of its parameters; see `make_optimizer` for one from a configuration.
      metrics: the names of the metrics that the loss returns, other than "loss".
    """

    loss: Callable[..., tuple[Array, dict[str, Array]]]
    optimizer: optax.GradientTransformation
    metrics: tuple[str, ...] = ()


@frozen
class Alternating:
    """Players who take turns, as generator and critic of a GAN do (Goodfellow et al. 2014, alg. 1).

    A step of training is one turn: the player whose turn it is takes one step down its loss, at the
    present parameters of the others, on a batch of its own. Turns go round by a counter in the
    state, so that a run that is cut off between two turns goes on with the next one. A turn that is
    skipped for values that are not finite is taken again with the next batch.

    The state is {"params", "optimizer", "metrics"} by player, and "turn". The moving average is
    that of all players' parameters, and moves at every turn. Metrics are "loss" and "gradient_norm"
    of the player whose turn it was, and "<player>_<metric>" of every player's latest turn, which
    are 0 before its first.

    Attributes:
      players: by name, at least one.
      init_params: key -> the parameters of all players by name.
      turns: the names of the players in the order of one round, such as
        ("critic", "critic", "generator"); each has a turn.
      accumulate: slices that a device's share of the batch is cut into; as in the configuration of
        training.

    Raises:
      ValueError: a turn is of no player, or a player never has one.
    """

    players: Mapping[str, Player]
    init_params: Callable[..., dict[str, Any]]
    turns: tuple[str, ...]
    accumulate: int = 1

    rules = _ALL_SAME

    def __post_init__(self):
        for name in self.turns:
            if name not in self.players:
                raise ValueError(
                    f"turns name {name!r}, but the players are {', '.join(self.players)}"
                )
        idle = [name for name in self.players if name not in self.turns]
        if idle or not self.players:
            raise ValueError(f"every player needs a turn, but {', '.join(idle) or 'there is none'}")
        if self.accumulate < 1:
            raise ValueError(f"accumulate must be at least 1, got {self.accumulate}")

    def __hash__(self):
        return hash((tuple(self.players), self.init_params, self.turns, self.accumulate))

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Fresh parameters and optimisers; the first turn of the round comes next.

        Raises:
          ValueError: `init_params` does not return the parameters of exactly the players.
        """
        return self._begin(self.init_params(key))

    def update(
        self, state: dict[str, Any], batch: dict[str, Array], keys: Key[Array, " B"]
    ) -> tuple[dict[str, Any], dict[str, Array]]:
        """One turn."""
        names = sorted(self.players)
        order = jnp.array([names.index(name) for name in self.turns])
        plays = [functools.partial(self._play, name) for name in names]
        entries, metrics = jax.lax.switch(order[state["turn"]], plays, state, batch, keys)
        latest = {
            f"{name}_{metric}": value
            for name, values in entries["metrics"].items()
            for metric, value in values.items()
        }
        turn = (state["turn"] + 1) % len(self.turns)
        return entries | {"turn": turn}, latest | metrics

    def averaged(self, state: dict[str, Any]) -> dict[str, Any]:
        """The parameters of all players by name."""
        return state["params"]

    def replace_averaged(self, state: dict[str, Any], tree: dict[str, Any]) -> dict[str, Any]:
        """The state that begins with these parameters of all players instead."""
        return self._begin(tree)

    def _begin(self, params):
        if set(params) != set(self.players):
            raise ValueError(
                f"the parameters are of {', '.join(sorted(params))}, but the players are "
                f"{', '.join(sorted(self.players))}"
            )
        optimizers, metrics = {}, {}
        for name, player in self.players.items():
            optimizers[name] = player.optimizer.init(params[name])
            names = ("loss", "gradient_norm", *player.metrics)
            metrics[name] = dict.fromkeys(names, jnp.float32(0))
        return {
            "params": params,
            "optimizer": optimizers,
            "metrics": metrics,
            "turn": jnp.int32(0),
        }

    def _play(self, name, state, batch, keys):
        """The entries of the state by player after a turn of this one, and its metrics."""
        player, everyone = self.players[name], parallel.varying(state["params"])

        def loss(own, batch, keys):
            return player.loss(everyone | {name: own}, batch, keys)

        own = {"params": state["params"][name], "optimizer": state["optimizer"][name]}
        gradients, metrics = mean_gradients(loss, own["params"], batch, keys, self.accumulate)
        returned = sorted(set(metrics) - {"loss"})
        if returned != sorted(player.metrics):
            raise ValueError(
                f"the loss of {name!r} returns the metrics {returned}, but its player names "
                f"{sorted(player.metrics)}"
            )
        metrics = metrics | {"gradient_norm": optax.tree.norm(gradients)}
        metrics = {key: jnp.asarray(value, jnp.float32) for key, value in metrics.items()}
        own = descend(player.optimizer, gradients, own) | {"metrics": metrics}
        entries = {key: state[key] | {name: value} for key, value in own.items()}
        return entries, {key: metrics[key] for key in ("loss", "gradient_norm")}
