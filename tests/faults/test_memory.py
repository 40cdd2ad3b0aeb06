import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.condition import Condition


@dataclasses.dataclass(frozen=True)
class Walk:
    """A sampler whose samples do not touch each other, so that the bits say which is which."""

    steps: int = 3

    conditions = ("label",)

    def check(self, params, cond):
        pass

    @property
    def nfe(self):
        return self.steps

    def prepare(self, params):
        return params

    def init(self, params, keys, cond):
        return keys, jnp.zeros(keys.shape) + cond.label

    def step(self, params, state, i):
        keys, x = state
        noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i)))(keys)
        return keys, x * params + noise

    def finish(self, params, state):
        return state[1]


COND = Condition(label=np.arange(11))


def draw(micro_batch):
    chunks = sampling.generate_many(
        Walk(), jnp.float32(0.5), 3, 11, cond=COND, micro_batch=micro_batch
    )
    return list(chunks)


def values(chunks):
    assert [chunk.start for chunk in chunks] == list(
        np.cumsum([0] + [len(chunk.samples) for chunk in chunks[:-1]])
    )
    return np.concatenate([chunk.samples for chunk in chunks])


@pytest.fixture
def memory(monkeypatch):
    """Lets a device hold so many samples only; `when` is "compile" or "run"."""
    monkeypatch.setattr(sampling, "_programs", collections.OrderedDict())
    compile_generate = sampling.compile_generate

    def limit(size, when, calls_before=0):
        calls = []

        def check(keys):
            calls.append(len(keys))
            if len(keys) > size and len(calls) > calls_before:
                raise jax.errors.JaxRuntimeError(
                    "RESOURCE_EXHAUSTED: Out of memory allocating 17179869184 bytes."
                )

        def limited(sampler, params, keys, cond=None, **options):
            if when == "compile":
                check(keys)
            program = compile_generate(sampler, params, keys, cond, **options)

            def run(params, keys, cond):
                if when == "run":
                    check(keys)
                return program(params, keys, cond)

            return run

        sampling._programs.clear()
        monkeypatch.setattr(sampling, "compile_generate", limited)

    return limit


@pytest.mark.parametrize("when", ["compile", "run"])
def test_the_micro_batch_is_halved_and_the_samples_are_the_same(memory, when):
    expected = values(draw(8))
    memory(2, when)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        chunks = draw(8)
    assert [str(warning.message) for warning in caught] == [
        "out of memory: drawing 4 samples at a time instead",
        "out of memory: drawing 2 samples at a time instead",
    ]
    assert [len(chunk.samples) for chunk in chunks] == [2, 2, 2, 2, 2, 1]
    assert values(chunks).tobytes() == expected.tobytes()
    assert all(chunk.compile_seconds == 0 for chunk in chunks[1:])


def test_memory_that_runs_out_half_way_loses_nothing(memory):
    expected = values(draw(4))
    memory(2, "run", calls_before=1)
    with pytest.warns(UserWarning, match="drawing 2 samples"):
        chunks = draw(4)
    assert [len(chunk.samples) for chunk in chunks] == [4, 2, 2, 2, 1]
    assert values(chunks).tobytes() == expected.tobytes()


def test_an_odd_micro_batch_shrinks_to_one(memory):
    expected = values(draw(7))
    memory(1, "run")
    with pytest.warns(UserWarning, match="out of memory") as caught:
        assert values(draw(7)).tobytes() == expected.tobytes()
    assert len(caught) == 2  # 3, then 1


def test_when_not_even_one_fits_the_error_is_raised(memory):
    memory(0, "run")
    with (
        pytest.warns(UserWarning, match="drawing 1 samples"),
        pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"),
    ):
        draw(2)


def test_other_errors_of_the_device_are_raised_at_once(monkeypatch):
    def broken(*arguments, **options):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    monkeypatch.setattr(sampling, "_programs", collections.OrderedDict())
    monkeypatch.setattr(sampling, "compile_generate", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        draw(8)
