"""Laws of the samplers: exact Gaussians, limits, orders of convergence, the loop itself."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_networks import FunctionNetwork, GaussianNetwork, LabelledNetwork

from gen_jax import sampling
from gen_jax.condition import Condition
from gen_jax.config import choices, from_dict, frozen, to_dict
from gen_jax.models.diffusion import (
    DDIM,
    Ancestral,
    DiffusionConfig,
    DiffusionModel,
    DiffusionSampler,
    DPMSolverPP,
    Schedule,
    Solver,
    TimeGrid,
)
from gen_jax.nn.config import UNetConfig
from gen_jax.nn.unet import UNetNetwork
from gen_jax.testing import check_sampler

LINEAR = DiffusionConfig()
SMALL = DiffusionConfig(variance="fixed_small")
SPACINGS = ["leading", "trailing", "linspace"]
PARAMS = {"deviation": jnp.float32(0.5)}  # of a GaussianNetwork


def gaussian_sampler(solver, process=LINEAR):
    model = DiffusionModel(GaussianNetwork(process), process, (8, 8, 1))
    return DiffusionSampler(model, solver)


def draw_gaussian(solver, process=LINEAR, **params):
    """Samples [256, 8, 8, 1]; in one shape, so that tests share programs."""
    keys = sampling.sample_keys(3, 0, 256)
    return np.asarray(sampling.generate(gaussian_sampler(solver, process), PARAMS | params, keys))


def labelled_sampler(solver, process=LINEAR):
    network = LabelledNetwork(learned=process.variance == "learned")
    return DiffusionSampler(DiffusionModel(network, process, (4, 4, 1)), solver)


def labelled_params(sampler):
    return sampler.model.init(jax.random.key(0))


def exact_deviation(deviation, solver, process=LINEAR):
    """Standard deviation of the samples, propagated in float64 through the affine steps.

    The state is (x, history), and every step is a matrix.
    """
    alpha_bar, _ = solver.alpha_bars(process)
    table, covariance = solver.table(process), np.diag([1.0, 0.0])
    for i, alpha in enumerate(alpha_bar):
        c = type(table)(*(column[i] for column in table))
        slope = np.sqrt(1 - alpha) / (alpha * deviation**2 + 1 - alpha)
        x0 = c.x0_x + c.x0_output * slope
        factor = c.next_x0 * x0 + c.next_x + c.next_output * slope
        step = np.array([[factor, c.next_history], [x0, 0.0]])
        covariance = step @ covariance @ step.T + np.diag([c.next_noise**2, 0.0])
    return np.sqrt(covariance[0, 0])


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
    got = [exact_deviation(deviation, DDIM(steps=s, eta=eta)) for s in steps]
    np.testing.assert_allclose(got, expected, atol=6e-6)


def test_other_exact_deviations():
    # One trailing step lands on the mean image: a model must be probabilistic.
    for deviation, solver, expected in (
        (0.5, DDIM(1, "trailing"), 0.00159),
        (0.5, DDIM(10, "trailing"), 0.36995),
        (0.5, Ancestral(), 0.50075),
        (2.0, Ancestral(), 1.99764),
    ):
        assert exact_deviation(deviation, solver) == pytest.approx(expected, abs=6e-6)


@pytest.mark.parametrize(
    ("solver", "process"),
    [
        (DDIM(20, clip=False), LINEAR),
        (DDIM(20, clip=False, eta=1.0), LINEAR),
        (Ancestral(20, clip=False), SMALL),
        (Ancestral(20, clip=False), LINEAR),
        (DPMSolverPP(20, clip=False), LINEAR),
    ],
    ids=["ddim", "ddim_eta_1", "fixed_small", "fixed_large", "dpm_solver_pp"],
)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_loop_draws_from_the_exact_gaussian(solver, process, spacing):
    solver = dataclasses.replace(solver, spacing=spacing)
    samples = draw_gaussian(solver, process)
    exact = exact_deviation(0.5, solver, process)
    assert abs(samples.std() - exact) < 4 * exact / np.sqrt(2 * samples.size)
    assert abs(samples.mean()) < 4 * exact / np.sqrt(samples.size)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
def test_ddim_with_eta_1_is_ddpm_on_the_full_grid(schedule, prediction):
    process = dataclasses.replace(SMALL, schedule=schedule, prediction=prediction)
    ddpm = Ancestral().table(process)
    ddim = DDIM(eta=1.0, clipped_direction=True).table(process)
    posterior = Schedule(process).posterior_variance[::-1]
    np.testing.assert_allclose(ddim.next_noise**2, posterior, rtol=1e-6, atol=1e-15)
    for name in ("x0_x", "x0_output", "next_x0", "next_x", "next_noise"):
        np.testing.assert_allclose(getattr(ddim, name), getattr(ddpm, name), rtol=1e-6, atol=1e-9)


def test_ddim_directions_agree_where_nothing_is_clipped():
    alpha_bar = Schedule(LINEAR).alpha_bar[::-50]
    following = np.append(alpha_bar[1:], 1.0)
    for prediction in ("epsilon", "x0", "v"):
        process, ends = DiffusionConfig(prediction=prediction), []
        for clipped in (False, True):
            solver = DDIM(eta=0.3, clipped_direction=clipped)
            c = solver.coefficients(alpha_bar, following, process)
            x, output = np.random.default_rng(1).normal(size=(2, len(alpha_bar)))
            x0 = c.x0_x * x + c.x0_output * output
            ends.append(c.next_x0 * x0 + c.next_x * x + c.next_output * output)
        np.testing.assert_allclose(*ends, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("end", ["clean", "first"])
@pytest.mark.parametrize("offset", [0, 1])
def test_ddim_ends_where_it_is_told_to(end, offset):
    """Where the data is a point, the path from x_T is straight: x_t = alpha x_0 + sigma epsilon."""
    solver, x0, epsilon = DDIM(10, clip=False, offset=offset, end=end), 0.7, -1.3
    np.testing.assert_array_equal(solver.timesteps(1000), np.arange(900, -1, -100) + offset)
    first, table = Schedule(LINEAR).alpha_bar[0], solver.table(LINEAR)
    alpha_bar, _ = solver.alpha_bars(LINEAR)
    x = np.sqrt(alpha_bar[0]) * x0 + np.sqrt(1 - alpha_bar[0]) * epsilon
    for i in range(10):
        c = type(table)(*(column[i] for column in table))
        predicted = c.x0_x * x + c.x0_output * epsilon
        x = c.next_x0 * predicted + c.next_x * x + c.next_output * epsilon
    noisy = np.sqrt(first) * x0 + np.sqrt(1 - first) * epsilon
    assert x == pytest.approx({"clean": x0, "first": noisy}[end], rel=1e-9)


@pytest.mark.parametrize(("solver", "order"), [(DDIM(), 1), (DPMSolverPP(), 2)])
def test_order_of_convergence(solver, order):
    # A grid even in log(alpha / sigma), between two noise levels, where the exact flow of the
    # Gaussian is x proportional to the deviation of x_t.
    deviation, errors = 0.5, []
    counts = np.array([16, 32, 64, 128, 256])
    for steps in counts:
        log_odds = 2 * np.linspace(-3.0, 3.0, steps + 1)
        levels = 1 / (1 + np.exp(-log_odds))
        table = solver.coefficients(levels[:-1], levels[1:], LINEAR)
        x, history = 1.0, 0.0
        for i, alpha in enumerate(levels[:-1]):
            c = type(table)(*(column[i] for column in table))
            output = np.sqrt(1 - alpha) * x / (alpha * deviation**2 + 1 - alpha)
            x0 = c.x0_x * x + c.x0_output * output
            x = c.next_x0 * x0 + c.next_x * x + c.next_output * output + c.next_history * history
            history = x0
        spread = np.sqrt(levels * deviation**2 + 1 - levels)
        errors.append(abs(x - spread[-1] / spread[0]))
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.15


@pytest.mark.parametrize("steps", [10, 20, 50])
def test_dpm_solver_beats_ddim_at_the_same_cost(steps):
    errors = [
        abs(exact_deviation(0.5, kind(steps, "trailing")) - 0.5) for kind in (DDIM, DPMSolverPP)
    ]
    assert errors[1] < errors[0]


@pytest.mark.parametrize("spacing", SPACINGS)
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
    with pytest.raises(ValueError, match="spacing must be one of"):
        TimeGrid(10, "karras")
    with pytest.raises(ValueError, match="steps must be at least 1"):
        TimeGrid(0)
    with pytest.raises(ValueError, match="offset 100 must be below the stride of 10 steps, 100"):
        TimeGrid(10, offset=100).timesteps(1000)
    with pytest.raises(ValueError, match='offset 1 is for spacing "leading", not "trailing"'):
        TimeGrid(10, "trailing", offset=1)


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (Ancestral, {"spacing": "karras"}, "spacing must be one of 'leading', 'trailing'"),
        (Ancestral, {"steps": 0}, "steps must be at least 1, got 0"),
        (DDIM, {"steps": 0}, "steps must be at least 1, got 0"),
        (DDIM, {"eta": -0.1}, "eta must not be negative"),
        (DDIM, {"eta": float("inf")}, "eta must be finite"),
        (DDIM, {"offset": -1}, "offset must not be negative, got -1"),
        (DDIM, {"end": "noisy"}, "end must be one of 'clean', 'first'"),
        (DPMSolverPP, {"guidance": float("nan")}, "guidance must be finite"),
        (DPMSolverPP, {"clip": 1.0}, "clip must be of type bool"),
    ],
)
def test_solvers_that_cannot_be(kind, values, message):
    with pytest.raises(ValueError, match=message):
        kind(**values)


def test_a_solver_that_does_not_fit_the_process_is_refused_at_construction():
    for solver, process, message in (
        (Ancestral(1001), LINEAR, "1001 sampling steps do not fit in 1000 time steps"),
        (DPMSolverPP(1000), LINEAR, "1000 sampling steps do not fit .* leaves out"),
        (DDIM(1), LINEAR, 'use "trailing"'),
        (DDIM(1000, offset=1), LINEAR, "offset 1 must be below the stride of 1000 steps, 1"),
        (DDIM(guidance=2.0), DiffusionConfig(label_dropout=0.0), "trained with label_dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            gaussian_sampler(solver, process)


def test_solvers_are_stored_by_name():
    @frozen
    class Config:
        sampler: Solver = Ancestral()

    kinds = {"ddpm": Ancestral, "ddim": DDIM, "dpm_solver_pp": DPMSolverPP}
    assert kinds.items() <= choices(Solver).items()
    for kind in kinds.values():
        config = Config(kind(steps=7, spacing="trailing", guidance=2.0))
        stored = to_dict(config)
        assert stored["sampler"]["name"] == kind.name
        assert from_dict(Config, stored) == config
    with pytest.raises(ValueError, match="'euler' is none of ddpm, ddim, dpm_solver_pp"):
        from_dict(Config, {"sampler": {"name": "euler"}})


@pytest.mark.parametrize(
    ("solver", "process"),
    [
        (Ancestral(5), LINEAR),
        (Ancestral(5, guidance=2.0), DiffusionConfig(variance="learned")),
        (DDIM(5, eta=0.5, guidance=0.5), DiffusionConfig(prediction="v")),
        (DPMSolverPP(5, "trailing"), LINEAR),
    ],
    ids=["ddpm", "learned", "ddim", "dpm_solver_pp"],
)
def test_the_laws_of_samplers(solver, process):
    sampler = labelled_sampler(solver, process)
    cond = Condition(label=np.array([0, 1, 2, 0, 1, 2]))
    samples = check_sampler(sampler, labelled_params(sampler), cond, tolerance=2e-5)
    assert samples.shape == (6, 4, 4, 1)


@pytest.mark.parametrize(
    "solver", [Ancestral(6), DDIM(6, eta=0.5), DPMSolverPP(6)], ids=lambda solver: solver.name
)
def test_the_compiled_trajectory_is_the_python_loop(solver):
    sampler = labelled_sampler(solver)
    params, keys = labelled_params(sampler), sampling.sample_keys(1, 0, 4)
    cond = Condition(label=jnp.array([0, 1, 2, 1]))
    samples, (xs, x0s) = sampling.generate(
        sampler, params, keys, cond, trajectory=sampler.trajectory
    )
    step = jax.jit(sampler.step)
    state = sampler.init(params, keys, cond)
    for i in range(sampler.steps):
        state = step(params, state, i)
        np.testing.assert_allclose(xs[i], state.x, atol=2e-5)
        np.testing.assert_allclose(x0s[i], state.x0, atol=2e-5)
    np.testing.assert_allclose(samples, sampler.finish(params, state), atol=2e-5)


@pytest.mark.parametrize("variance", ["fixed_large", "learned"])
def test_guidance_is_an_extrapolation_from_the_unconditional(variance):
    process = DiffusionConfig(variance=variance)
    x, label = jax.random.normal(jax.random.key(0), (3, 4, 4, 1)), jnp.array([0, 1, 2])
    t = jnp.full(3, 500)

    def guided(scale):
        sampler = labelled_sampler(DDIM(6, guidance=scale), process)
        return sampler._predict(labelled_params(sampler), x, t, label)

    model = labelled_sampler(DDIM(), process).model
    params = model.init(jax.random.key(0))
    conditional, variance_output = model.predict(params, x, t, label)
    unconditional, _ = model.predict(params, x, t)
    for scale in (0.0, 0.5, 3.0):
        output, guided_variance = guided(scale)
        expected = unconditional + scale * (conditional - unconditional)
        np.testing.assert_allclose(output, expected, atol=1e-6)
        # The variance is that of the conditional prediction.
        if variance == "learned":
            np.testing.assert_array_equal(guided_variance, variance_output)
        else:
            assert guided_variance is variance_output is None


def test_no_guidance_by_the_label_is_a_draw_without_labels():
    keys, label = sampling.sample_keys(2, 0, 3), jnp.array([0, 1, 2])
    sampler = labelled_sampler(DDIM(6, guidance=0.0))
    params = labelled_params(sampler)
    none = sampling.generate(sampler, params, keys, Condition(label=label))
    free = sampling.generate(labelled_sampler(DDIM(6)), params, keys)
    np.testing.assert_allclose(none, free, atol=2e-5)


def test_labels_may_be_of_any_integer_type():
    # -1, for no class, is 255 as uint8.
    sampler, keys = labelled_sampler(DDIM(3, guidance=2.0)), sampling.sample_keys(2, 0, 3)
    cond = Condition(label=np.array([0, 1, 2], np.uint8))
    assert sampler.init(labelled_params(sampler), keys, cond).label.dtype == np.int32


def test_what_does_not_fit_is_refused_before_the_loop():
    keys, sampler = sampling.sample_keys(0, 0, 3), labelled_sampler(DDIM(4))
    params, guided = labelled_params(sampler), labelled_sampler(DDIM(4, guidance=2.0))
    gaussian = gaussian_sampler(DDIM(4))
    label = Condition(label=jnp.array([0, 1, 2]))
    assert (sampler.conditions, gaussian.conditions) == (("label",), ())
    for taker, given, cond, message in (
        (guided, params, None, "guidance 2.0 needs a label for each sample"),
        (gaussian_sampler(DDIM(4, guidance=2.0)), PARAMS, None, "needs a label"),
        (gaussian, PARAMS, label, "no use for the condition 'label'"),
        (sampler, params, Condition(label=jnp.array([0, 1, 3])), "labels must be in 0 to 2"),
        (sampler, params, Condition(label=jnp.array([0, 1, -1])), "labels must be in 0 to 2"),
        (sampler, {"slope": params["slope"]}, label, "table is missing"),
        (sampler, params | {"table": jnp.zeros(5)}, label, r"has the shape \[5\], not \[4\]"),
        (sampler, {"params": params}, label, "pass what is in it"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.generate(taker, given, keys, cond)


def test_parameters_of_a_deeper_unet_are_refused():
    def model(blocks):
        config = UNetConfig(widths=(8,), blocks=blocks, attention=(), groups=4)
        return DiffusionModel(UNetNetwork(config), LINEAR, (4, 4, 3))

    deeper = jax.eval_shape(model(2).init, jax.random.key(0))
    with pytest.raises(ValueError, match="do not fit the DiffusionModel"):
        DiffusionSampler(model(1), DDIM(4)).check(deeper, Condition())


def test_the_check_does_not_need_values():
    sampler = labelled_sampler(DDIM(2, guidance=2.0))
    params, keys = labelled_params(sampler), sampling.sample_keys(0, 0, 3)

    def draw(params, label):
        return sampling.generate(sampler, params, keys, Condition(label=label))

    shape = jax.eval_shape(jax.jit(draw), params, jnp.array([0, 1, 2])).shape
    assert shape == (3, 4, 4, 1)


def test_a_learned_variance_at_its_ends_is_a_fixed_one():
    learned = DiffusionConfig(variance="learned")
    for end, fixed in ((1.0, LINEAR), (-1.0, SMALL)):
        drawn = draw_gaussian(Ancestral(20, clip=False), learned, variance=jnp.float32(end))
        expected = draw_gaussian(Ancestral(20, clip=False), fixed)
        np.testing.assert_allclose(drawn, expected, atol=1e-5)


def test_clipping_bounds_the_prediction():
    keys = sampling.sample_keys(5, 0, 2)
    for clip in (True, False):
        sampler = labelled_sampler(DDIM(6, clip=clip))
        big = {"slope": jnp.float32(2.0), "table": jnp.full(4, 9.0)}
        _, (_, x0) = sampling.generate(sampler, big, keys, trajectory=sampler.trajectory)
        assert (np.abs(x0).max() <= 1) == clip


def test_the_program_is_one_loop():
    sampler = labelled_sampler(DDIM(50))
    program = sampling.compile_generate(
        sampler, labelled_params(sampler), sampling.sample_keys(0, 0, 4)
    )
    # The other loops of the program are those of the random bits, before it.
    loops = re.findall(r' while\(.*op_name="jit\([^)"]*\)/while"', program.as_text())
    assert len(loops) == 1


def test_the_loop_is_around_one_network():
    config = UNetConfig(widths=(8,), blocks=1, attention=(), groups=4)
    model = DiffusionModel(UNetNetwork(config), LINEAR, (4, 4, 3))
    sampler, keys = DiffusionSampler(model, DDIM(50)), sampling.sample_keys(0, 0, 4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    x, t = jax.ShapeDtypeStruct((4, 4, 4, 3), np.float32), jax.ShapeDtypeStruct((4,), np.int32)

    def convolutions(function, *arguments):
        return jax.jit(function).lower(params, *arguments).as_text().count(".convolution(")

    one = convolutions(lambda params, x, t: model.predict(sampler.prepare(params), x, t), x, t)
    whole = convolutions(lambda params, keys: sampling.generate(sampler, params, keys), keys)
    assert 0 < whole == one


@pytest.mark.parametrize(
    "solver",
    [Ancestral(5), DDIM(7, "trailing"), DPMSolverPP(9, "linspace")],
    ids=lambda solver: solver.name,
)
def test_nfe_counts_evaluations_of_the_network(solver):
    calls = []

    def network(params, x, t, label):
        jax.debug.callback(lambda t: calls.append(int(t[0])), t)
        return x

    model = DiffusionModel(FunctionNetwork(network), LINEAR, (2, 2, 1))
    sampler = DiffusionSampler(model, solver)
    params = model.init(jax.random.key(0))
    jax.block_until_ready(sampling.generate(sampler, params, sampling.sample_keys(0, 0, 1)))
    jax.effects_barrier()
    assert len(calls) == sampler.nfe == solver.steps
    assert sorted(calls, reverse=True) == sampler.timesteps.tolist()


def test_an_equal_sampler_does_not_compile_again():
    solver = DDIM(20, clip=False)
    draw_gaussian(solver)
    before = sampling._generate._cache_size()
    draw_gaussian(dataclasses.replace(solver))
    assert sampling._generate._cache_size() == before
    trajectories = [gaussian_sampler(DDIM(steps)).trajectory for steps in (4, 5)]
    assert trajectories[0] is trajectories[1]


@pytest.mark.parametrize(
    "solver",
    [Ancestral(20, clip=False), DDIM(20, clip=False, eta=1.0), DPMSolverPP(20, clip=False)],
    ids=lambda solver: solver.name,
)
def test_prediction_types_of_one_oracle_draw_the_same_samples(solver):
    drawn = [
        draw_gaussian(solver, DiffusionConfig(prediction=prediction))
        for prediction in ("epsilon", "x0", "v")
    ]
    np.testing.assert_allclose(drawn[0], drawn[1], atol=1e-4)
    np.testing.assert_allclose(drawn[0], drawn[2], atol=1e-4)
