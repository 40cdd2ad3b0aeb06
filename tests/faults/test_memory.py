import collections
import dataclasses
import math
import re
import resource

import jax
import jax.numpy as jnp
import numpy as np
import processes
import pytest

from gen_jax import memory as host_memory
from gen_jax import operations, parallel, sampling, training
from gen_jax.condition import Condition
from gen_jax.config import TrainConfig
from gen_jax.trainables import ModelTrainable
from gen_jax.workdir import Workdir

pytestmark = pytest.mark.long


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


@dataclasses.dataclass(frozen=True)
class Wide(Walk):
    """Carries a megabyte for each sample from step to step."""

    def init(self, params, keys, cond):
        return keys, jnp.zeros((len(keys), 2**18)) + cond.label[:, None]

    def step(self, params, state, i):
        keys, x = state
        return keys, x * params + i

    def finish(self, params, state):
        return state[1].mean(1)


@pytest.fixture
def left(monkeypatch):
    """Says how many bytes the machine has left."""
    monkeypatch.setattr(sampling, "_programs", collections.OrderedDict())

    def limit(number):
        sampling._programs.clear()
        monkeypatch.setattr(host_memory, "available", lambda: number)

    return limit


def draw_wide(micro_batch):
    chunks = sampling.generate_many(
        Wide(), jnp.float32(0.5), 3, 11, cond=COND, micro_batch=micro_batch
    )
    return list(chunks)


def test_what_does_not_fit_a_cpu_is_halved_before_it_is_tried(left):
    left(2**40)
    expected = values(draw_wide(8))
    left(3 * 2**20)
    with pytest.warns(UserWarning, match="out of memory") as caught:
        chunks = draw_wide(8)
    assert len(caught) == len(chunks[0].samples) == 2  # 4, then 2
    np.testing.assert_allclose(values(chunks), expected, rtol=1e-6)


def test_where_one_sample_does_not_fit_what_it_takes_is_said(left):
    left(2**20)
    with (
        pytest.warns(UserWarning, match="drawing 1 samples"),
        pytest.raises(MemoryError, match=r"^a micro-batch of 1 takes .* MiB more, and 1 MiB are"),
    ):
        draw_wide(2)


KEYS, EIGHT = sampling.sample_keys(3, 0, 8), Condition(label=np.arange(8))
PLENTY, LITTLE = 2**40, 16


@pytest.fixture
def left_in_turn(monkeypatch):
    """Says how many bytes the machine has left, each time another number."""

    def limit(*numbers):
        monkeypatch.setattr(host_memory, "_CHECKED", set())
        monkeypatch.setattr(host_memory, "available", iter(numbers).__next__)

    return limit


@pytest.mark.parametrize(
    ("draw", "numbers"),
    [
        (sampling.generate, [LITTLE]),
        (sampling.stream, [LITTLE]),
        (sampling.stream, [PLENTY, LITTLE]),
    ],
    ids=["generate", "stream, its start", "stream, a step"],
)
def test_what_python_draws_is_compared_with_what_is_left(left_in_turn, draw, numbers):
    left_in_turn(*numbers)
    with pytest.raises(MemoryError, match=r"^drawing 8 samples takes .* and 16 bytes are left$"):
        list(draw(Wide(), jnp.float32(0.5), KEYS, EIGHT))


def test_a_program_is_compared_once(left_in_turn):
    """Looking at it again would take longer than drawing from a small model."""
    left_in_turn(PLENTY, PLENTY)
    drawn = [sampling.generate(Wide(), jnp.float32(rate), KEYS, EIGHT) for rate in (0.5, 0.5, 0.7)]
    assert all(samples.shape == (8,) for samples in drawn)
    sampling.generate(Wide(), jnp.float32(0.5), KEYS[:4], Condition(label=np.arange(4)))
    with pytest.raises(StopIteration):
        sampling.generate(Wide(), jnp.float32(0.5), KEYS[:2], Condition(label=np.arange(2)))


def test_inside_of_another_program_that_one_counts(left):
    left(0)
    samples = jax.jit(lambda params: sampling.generate(Wide(), params, KEYS, EIGHT))
    assert samples(jnp.float32(0.5)).shape == (8,)


@dataclasses.dataclass(frozen=True)
class Line:
    """A model of one number."""

    def init(self, key):
        return {"slope": jnp.float32(1)}

    def loss(self, params, batch, keys):
        error = (batch["x"] * params["slope"] - 1).mean()
        return error, {"loss": error}


@pytest.mark.parametrize(
    ("what", "numbers"), [("the state", [LITTLE]), ("a step", [PLENTY, LITTLE])]
)
def test_training_that_does_not_fit_a_cpu_ends_before_its_first_step(
    left_in_turn, tmp_path, what, numbers
):
    config = TrainConfig(steps=1, batch=8)
    left_in_turn(*numbers)
    with pytest.raises(MemoryError, match=f"^{what} of training takes .* and 16 bytes are left$"):
        training.fit(
            config,
            ModelTrainable(Line(), config),
            lambda step: {"x": np.ones(8, np.float32)},
            Workdir(tmp_path),
            mesh=parallel.data_mesh(),
        )
    assert not list(tmp_path.glob("checkpoints/*"))


@pytest.mark.parametrize("devices", [1, 8])
def test_a_program_takes_what_is_not_there_yet_on_every_device(monkeypatch, devices):
    """Arguments are there, and a result that takes the place of one is too."""
    mesh = jax.sharding.Mesh(jax.devices()[:devices], ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    x = jax.device_put(np.zeros((8, 2**10), np.float32), split)
    size = x.nbytes // devices  # of the share of a device, for the sum needs all of both

    def compiled(f, **options):
        return jax.jit(f, out_shardings=split, **options).lower(x).compile()

    def taken(program):
        monkeypatch.setattr(host_memory, "available", lambda: -1)
        with pytest.raises(MemoryError) as caught:
            host_memory.check("it", program)
        return re.fullmatch(r"it takes (.*) more, and .* are left", str(caught.value))[1]

    fresh, in_place = compiled(lambda x: x + 1), compiled(lambda x: x + 1, donate_argnums=0)
    assert operations.peak_memory(fresh) == 2 * size
    assert taken(fresh) == "32 KiB"
    assert taken(in_place) == "0 bytes"


def plant(root, files):
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


MEMINFO = "MemTotal: 2000 kB\nMemAvailable:    1000 kB\nHugePages_Total:  0\n"
VERSION_1 = "sys/fs/cgroup/memory"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, math.inf),
        ({"proc/meminfo": MEMINFO}, 1000 * 1024),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "max\n",
                "sys/fs/cgroup/a/memory.max": "5000\n",
                "sys/fs/cgroup/a/memory.current": "3000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 2500\ninactive_file 400\n",
            },
            2400,
        ),
        (
            {
                "proc/meminfo": MEMINFO,
                "proc/self/cgroup": "4:cpu,memory:/not/seen/in/here\n0::/\n",
                f"{VERSION_1}/memory.limit_in_bytes": "7000\n",
                f"{VERSION_1}/memory.usage_in_bytes": "3000\n",
                f"{VERSION_1}/memory.stat": "inactive_file 1\ntotal_inactive_file 10\n",
            },
            4010,
        ),
        (
            {
                "proc/self/cgroup": "4:memory:/\n",
                f"{VERSION_1}/memory.limit_in_bytes": "100\n",
                f"{VERSION_1}/memory.usage_in_bytes": "300\n",
                f"{VERSION_1}/memory.stat": "total_inactive_file 10\n",
            },
            0,
        ),
    ],
    ids=["nobody says", "machine", "version 2", "version 1", "nothing left"],
)
def test_what_is_left_is_the_least_of_what_is_said(tmp_path, files, expected):
    plant(tmp_path, files)
    assert host_memory.available(tmp_path) == expected


def test_a_limit_of_addresses_counts(tmp_path, monkeypatch):
    limits = 100 * resource.getpagesize(), resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda kind: limits)
    plant(tmp_path, {"proc/self/statm": "30 20 10 1 0 5 0\n"})
    assert host_memory.available(tmp_path) == 70 * resource.getpagesize()


def test_this_machine_says_what_is_left():
    assert 0 < host_memory.available() < math.inf


def test_a_run_that_is_too_large_for_the_machine_ends_with_one_line(toy, folder):
    """A million vectors of a hundred thousand hidden units."""
    large = ["--width", 100_000, "--train.batch", 1_000_000]
    failed = toy.run("--workdir", "run", *large)
    assert failed.returncode == 1
    processes.assert_one_line(failed.stderr, "out of memory (a step of training takes", "GiB more")
    processes.assert_one_line(failed.stderr, "are left); try a larger --train.accumulate")
    assert not processes.saved_steps(folder / "run")
