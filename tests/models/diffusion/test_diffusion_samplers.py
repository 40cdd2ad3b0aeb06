"""Laws of the samplers: exact Gaussians, limits, orders of convergence, the loop itself."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gen_jax import sampling
from gen_jax.models.diffusion import losses as diffusion
from gen_jax.models.diffusion.config import DiffusionConfig, SolverConfig
from gen_jax.models.diffusion.losses import Schedule, at
from gen_jax.models.diffusion.samplers import (
    DDIM,
    Ancestral,
    DiffusionSampler,
    DPMSolverPP,
    TimeGrid,
    make_sampler,
)
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import Denoiser

pytestmark = pytest.mark.usefixtures("quick_compile")

LINEAR = DiffusionConfig()


@dataclasses.dataclass(frozen=True)
class GaussianOracle:
    """The exact network for pixels drawn from N(0, deviation^2)."""

    deviation: float
    config: DiffusionConfig = LINEAR

    def __call__(self, params, x, t, label=None, keys=None):
        alpha_bar = at(Schedule(self.config).alpha_bar, t)
        return jnp.sqrt(1 - alpha_bar) * x / (alpha_bar * self.deviation**2 + 1 - alpha_bar)


def oracle_sampler(deviation, solver, steps, spacing="leading", side=8):
    grid = TimeGrid(steps, spacing)
    return DiffusionSampler(
        GaussianOracle(deviation), LINEAR, (side, side, 1), grid, solver, clip=None
    )


def exact_deviation(sampler):
    """Standard deviation of the samples, propagated in float64 through the affine steps."""
    alpha_bar = Schedule(LINEAR).alpha_bar[sampler.timesteps]
    following = np.append(alpha_bar[1:], 1.0)
    table = sampler.solver.coefficients(alpha_bar, following, LINEAR.prediction)
    deviation = sampler.network.deviation
    variance = 1.0
    for i, alpha in enumerate(alpha_bar):
        c = type(table)(*(column[i] for column in table))
        slope = np.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha)
        x0 = c.x0_x + c.x0_output * slope
        factor = c.next_x0 * x0 + c.next_x + c.next_output * slope
        variance = factor**2 * variance + c.next_noise**2
    return np.sqrt(variance)


@pytest.mark.parametrize(
    ("deviation", "eta", "expected"),
    [
        (0.5, 0.0, [0.08422, 0.26933, 0.37413, 0.43373, 0.47244, 0.48598, 0.49850]),
        (0.5, 1.0, [0.07472, 0.24784, 0.33326, 0.39146, 0.44412, 0.46826, 0.49611]),
        (2.0, 0.0, [0.91233, 1.47447, 1.71988, 1.85496, 1.94063, 1.97002, 1.99685]),
    ],
)
def test_ddim_on_a_gaussian_has_the_exact_deviation(deviation, eta, expected):
    steps = [2, 5, 10, 20, 50, 100, 1000]
    got = [exact_deviation(oracle_sampler(deviation, DDIM(eta), s)) for s in steps]
    np.testing.assert_allclose(got, expected, atol=6e-6)


def test_other_exact_deviations():
    def got(deviation, solver, steps, spacing):
        return exact_deviation(oracle_sampler(deviation, solver, steps, spacing))

    # One trailing step lands on the mean image: a model must be probabilistic.
    assert got(0.5, DDIM(), 1, "trailing") == pytest.approx(0.00159, abs=6e-6)
    assert got(0.5, DDIM(), 10, "trailing") == pytest.approx(0.36995, abs=6e-6)
    assert got(0.5, Ancestral("fixed_large"), 1000, "leading") == pytest.approx(0.50075, abs=6e-6)
    assert got(2.0, Ancestral("fixed_large"), 1000, "leading") == pytest.approx(1.99764, abs=6e-6)


@pytest.mark.parametrize(
    "solver", [DDIM(), DDIM(1.0), Ancestral("fixed_small"), Ancestral("fixed_large")]
)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_the_loop_draws_from_the_exact_gaussian(solver, spacing):
    sampler = oracle_sampler(0.5, solver, 20, spacing)
    samples = np.asarray(sampling.generate(sampler, {}, sampling.sample_keys(3, 0, 256)))
    exact = exact_deviation(sampler)
    assert abs(samples.std() - exact) < 4 * exact / np.sqrt(2 * samples.size)
    assert abs(samples.mean()) < 4 * exact / np.sqrt(samples.size)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_with_eta_1_is_ddpm_on_the_full_grid(schedule, prediction):
    config = DiffusionConfig(schedule=schedule, prediction=prediction)
    alpha_bar = Schedule(config).alpha_bar[::-1]
    following = np.append(alpha_bar[1:], 1.0)
    ddpm = Ancestral("fixed_small").coefficients(alpha_bar, following, prediction)
    ddim = DDIM(1.0, clipped_direction=True).coefficients(alpha_bar, following, prediction)
    posterior = Schedule(config).posterior_variance[::-1]
    np.testing.assert_allclose(ddim.next_noise**2, posterior, rtol=1e-6, atol=1e-15)
    for name in ("x0_x", "x0_output", "next_x0", "next_noise"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(ddim.next_x, ddpm.next_x, rtol=1e-6, atol=1e-9)


def test_ddim_directions_agree_where_nothing_is_clipped():
    alpha_bar = Schedule(LINEAR).alpha_bar[::-50]
    following = np.append(alpha_bar[1:], 1.0)
    for prediction in ("epsilon", "x0", "v"):
        ends = []
        for clipped in (False, True):
            c = DDIM(0.3, clipped).coefficients(alpha_bar, following, prediction)
            x, output = np.random.default_rng(1).normal(size=(2, len(alpha_bar)))
            x0 = c.x0_x * x + c.x0_output * output
            ends.append(c.next_x0 * x0 + c.next_x * x + c.next_output * output)
        np.testing.assert_allclose(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("solver", "order"), [(DDIM(), 1), (DPMSolverPP(), 2)])
def test_order_of_convergence(solver, order):
    # A grid even in log(alpha / sigma), between two noise levels, where the exact flow of the
    # Gaussian is x proportional to the deviation of x_t.
    deviation, errors = 0.5, []
    counts = np.array([16, 32, 64, 128, 256])
    for steps in counts:
        log_odds = 2 * np.linspace(-3.0, 3.0, steps + 1)
        levels = 1 / (1 + np.exp(-log_odds))
        c = solver.coefficients(levels[:-1], levels[1:], "epsilon")
        x, history = 1.0, 0.0
        for i, alpha in enumerate(levels[:-1]):
            output = np.sqrt(1 - alpha) * x / (alpha * deviation**2 + 1 - alpha)
            x0 = c.x0_x[i] * x + c.x0_output[i] * output
            x = (
                c.next_x0[i] * x0 + c.next_x[i] * x + c.next_output[i] * output
                + c.next_history[i] * history
            )  # fmt: skip
            history = x0
        spread = np.sqrt(levels * deviation**2 + 1 - levels)
        errors.append(abs(x - spread[-1] / spread[0]))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15


def test_dpm_solver_beats_ddim_at_the_same_cost():
    target = 0.5
    for steps in (10, 20, 50):
        deviations = []
        for solver in (DDIM(), DPMSolverPP()):
            sampler = oracle_sampler(target, solver, steps, "trailing", side=16)
            keys = sampling.sample_keys(0, 0, 64)
            deviations.append(abs(float(sampling.generate(sampler, {}, keys).std()) - target))
        assert deviations[1] < deviations[0]


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 7, 50, 999, 1000])
def test_grids_fall_within_the_time_steps(spacing, steps):
    for skip_last in (False, True):
        if steps + (skip_last and spacing != "trailing") > 1000:
            continue
        grid = TimeGrid(steps, spacing).timesteps(1000, skip_last=skip_last)
        assert len(grid) == steps
        assert (np.diff(grid) < 0).all()
        assert grid[-1] >= 0
        assert grid[0] <= 999
        if spacing != "leading":
            assert grid[0] == 999
        if spacing == "leading" and not skip_last:
            assert grid[-1] == 0


def test_grids_that_cannot_be():
    with pytest.raises(ValueError, match="1001 sampling steps do not fit in 1000"):
        TimeGrid(1001).timesteps(1000)
    with pytest.raises(ValueError, match='use "trailing"'):
        TimeGrid(1, "leading").timesteps(1000)
    with pytest.raises(ValueError, match="1000 sampling steps do not fit"):
        oracle_sampler(1.0, DPMSolverPP(), 1000)


@pytest.fixture(scope="module")
def network():
    config = UNetConfig(widths=(8, 8), blocks=1, attention=(), groups=4, dropout=0.0, classes=3)
    denoiser = Denoiser(config)
    params = denoiser.init(jax.random.key(0), 8, 8)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: leaf + 0.1 * rng.normal(size=leaf.shape).astype(np.float32), params
    )
    return denoiser, params


def unet_sampler(denoiser, solver, **changes):
    values = {"clip": 1.0, "guidance": 1.0} | changes
    return DiffusionSampler(denoiser, LINEAR, (8, 8, 3), TimeGrid(6), solver, **values)


@pytest.mark.parametrize("solver", [Ancestral(), DDIM(0.5), DPMSolverPP()])
def test_the_compiled_loop_is_the_python_loop(network, solver):
    denoiser, params = network
    sampler = unet_sampler(denoiser, solver)
    keys, labels = sampling.sample_keys(1, 0, 4), jnp.array([0, 1, 2, -1])
    compiled, states = sampling.generate(sampler, params, keys, labels, trajectory=True)
    step = jax.jit(sampler.step)
    state = sampler.init(params, keys, labels)
    for i in range(sampler.steps):
        state = step(params, state, i)
        np.testing.assert_allclose(states.x[i], state.x, atol=2e-5)
    np.testing.assert_allclose(compiled, sampler.finish(params, state), atol=2e-5)
    plain = sampling.generate(sampler, params, keys, labels)
    np.testing.assert_allclose(plain, compiled, atol=2e-5)


def test_guidance_is_an_extrapolation_from_the_unconditional(network):
    denoiser, params = network
    keys, labels = sampling.sample_keys(2, 0, 3), jnp.array([0, 1, 2])
    x = jax.random.normal(jax.random.key(0), (3, 8, 8, 3))
    t = jnp.full(3, 500)
    conditional = denoiser(params, x, t, labels)
    unconditional = denoiser(params, x, t)
    for scale in (0.0, 0.5, 3.0):
        guided = unet_sampler(denoiser, DDIM(), guidance=scale)._predict(params, x, t, labels)
        expected = unconditional + scale * (conditional - unconditional)
        np.testing.assert_allclose(guided, expected, atol=1e-4)
    none = sampling.generate(unet_sampler(denoiser, DDIM(), guidance=0.0), params, keys, labels)
    free = sampling.generate(unet_sampler(denoiser, DDIM()), params, keys, jnp.full(3, -1))
    np.testing.assert_allclose(none, free, atol=2e-5)


def test_a_learned_variance_at_its_ends_is_a_fixed_one():
    config = DiffusionConfig(variance="learned")
    shape, keys = (4, 4, 1), sampling.sample_keys(4, 0, 16)

    def draw(process, solver, network):
        sampler = DiffusionSampler(network, process, shape, TimeGrid(10), solver, clip=None)
        return sampling.generate(sampler, {}, keys)

    for sign, fixed in ((1.0, "fixed_large"), (-1.0, "fixed_small")):

        def both(params, x, t, label=None, keys=None, sign=sign):
            output = GaussianOracle(0.5)(params, x, t)
            return jnp.concatenate([output, jnp.full_like(x, sign)], axis=-1)

        learned = draw(config, Ancestral("learned"), both)
        expected = draw(LINEAR, Ancestral(fixed), GaussianOracle(0.5))
        np.testing.assert_allclose(learned, expected, atol=1e-5)


def test_clipping_bounds_the_prediction(network):
    denoiser, params = network
    big = jax.tree.map(lambda leaf: 20 * leaf, params)
    keys = sampling.sample_keys(5, 0, 2)
    for clip, bounded in ((1.0, True), (None, False)):
        sampler = unet_sampler(denoiser, DDIM(), clip=clip)
        _, states = sampling.generate(sampler, big, keys, None, trajectory=True)
        assert (np.abs(states.x0).max() <= 1) == bounded


def test_the_program_is_one_loop_around_one_network(network):
    denoiser, params = network
    keys = sampling.sample_keys(0, 0, 4)
    sampler = dataclasses.replace(unet_sampler(denoiser, DDIM()), grid=TimeGrid(50))
    text = sampling.generate.lower(sampler, params, keys).compile().as_text()
    # The other loops of the program are those of the random bits, before it.
    assert len(re.findall(r' while\(.*op_name="jit\(generate\)/while"', text)) == 1
    shorter = dataclasses.replace(sampler, grid=TimeGrid(5))
    other = sampling.generate.lower(shorter, params, keys).compile().as_text()
    count = lambda program: program.count("convolution(")  # noqa: E731
    assert count(text) == count(other)


def test_nfe_counts_evaluations_of_the_network():
    calls = []

    def network(params, x, t, label=None, keys=None):
        jax.debug.callback(lambda t: calls.append(int(t[0])), t)
        return x

    for config in (
        SolverConfig("ddpm", 5),
        SolverConfig("ddim", 7, spacing="trailing"),
        SolverConfig("dpm_solver_pp", 9, spacing="linspace"),
    ):
        calls.clear()
        sampler = make_sampler(network, LINEAR, (2, 2, 1), config)
        jax.block_until_ready(sampling.generate(sampler, {}, sampling.sample_keys(0, 0, 1)))
        jax.effects_barrier()
        assert len(calls) == sampler.nfe == config.steps
        assert sorted(calls, reverse=True) == sampler.timesteps.tolist()


def test_an_equal_sampler_does_not_compile_again():
    keys = sampling.sample_keys(0, 0, 2)
    make = lambda: oracle_sampler(0.75, DDIM(), 4)  # noqa: E731
    sampling.generate(make(), {}, keys)
    before = sampling.generate._cache_size()
    sampling.generate(make(), {}, keys)
    assert sampling.generate._cache_size() == before
    assert make() is not make()


def test_prediction_types_of_one_oracle_draw_the_same_samples():
    keys, drawn = sampling.sample_keys(6, 0, 4), []
    for prediction in ("epsilon", "x0", "v"):
        config = DiffusionConfig(prediction=prediction)
        schedule = Schedule(config)

        def network(params, x, t, label=None, keys=None, config=config, schedule=schedule):
            epsilon = GaussianOracle(0.5)(params, x, t)
            weights = diffusion.x0_weights("epsilon", schedule.alpha_bar)
            x0 = at(weights[0], t) * x + at(weights[1], t) * epsilon
            return diffusion.target(config, schedule, x0, t, epsilon)

        for solver in (Ancestral(), DDIM(0.5), DPMSolverPP()):
            sampler = DiffusionSampler(network, config, (4, 4, 1), TimeGrid(20), solver, clip=None)
            drawn.append(np.asarray(sampling.generate(sampler, {}, keys)))
    for i in range(3):
        np.testing.assert_allclose(drawn[i], drawn[i + 3], atol=1e-4)
        np.testing.assert_allclose(drawn[i], drawn[i + 6], atol=1e-4)
