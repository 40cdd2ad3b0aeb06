"""Our samplers step by step beside the schedulers of diffusers, on the same outputs and noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_networks import FunctionNetwork

import kernels
from gen_jax.condition import Condition
from gen_jax.keys import fold_in_each
from gen_jax.models.diffusion import (
    DDIM,
    Ancestral,
    DiffusionConfig,
    DiffusionModel,
    DiffusionSampler,
    DiffusionState,
    DPMSolverPP,
    Schedule,
    TimeGrid,
    samplers,
)
from gen_jax.sampling import sample_keys
from kernels.threefry import normal_each

# diffusers hands torch tensors to numpy in a way that newer ones warn of.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation")

BATCH, SHAPE = 2, (4, 4, 3)
TOLERANCE = 5e-6  # of values of order 1, in float32

PREDICTIONS = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
SCHEDULES = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "cosine": "squaredcos_cap_v2",
}
BOTH_KINDS = ["linear", "cosine"]  # solvers read tables: those of two schedules say enough
STEP_COUNTS = [1, 2, 3, 7, 10, 20, 50, 333, 999, 1000]


@pytest.fixture(scope="module", autouse=True)
def compiled_parts():
    """What all samplers share is compiled once, with coefficients as arguments: steps are run here
    by the thousand, outside of any compiled loop."""
    step = jax.jit(kernels.diffusion_step, static_argnames=("clip", "implementation"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "diffusion_step", step)
        patch.setattr(samplers, "fold_in_each", jax.jit(fold_in_each))
        yield


@jax.jit
def noise_of(keys, i):
    return normal_each(fold_in_each(keys, i), SHAPE)


@pytest.fixture(scope="module")
def schedulers():
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield diffusers
    torch.set_num_threads(threads)


def options(process, **changes):
    """The process in the words of diffusers."""
    return {
        "num_train_timesteps": process.timesteps,
        "beta_start": process.beta_start,
        "beta_end": process.beta_end,
        "beta_schedule": SCHEDULES[process.schedule],
        "prediction_type": PREDICTIONS[process.prediction],
    } | changes


def with_our_table(scheduler, process):
    """The scheduler with alpha_bar in float64.

    diffusers multiplies it up in float32 and loses more digits in 1 - alpha_bar and in
    1 - alpha_bar_t / alpha_bar_s; that its table is ours is a test of its own.
    """
    import torch

    scheduler.alphas_cumprod = torch.from_numpy(Schedule(process).alpha_bar)
    return scheduler


def to_torch(x):
    import torch

    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)


def to_numpy(x):
    return x.permute(0, 2, 3, 1).numpy()


@jax.jit
def from_table(params, x, t, label):
    """What was prepared for the time step."""
    return params["outputs"][jnp.argmax(params["timesteps"] == t[0])]


def sampler_of(process, solver):
    return DiffusionSampler(DiffusionModel(FunctionNetwork(from_table), process, SHAPE), solver)


def walk(sampler, seed=0):
    """Steps our sampler through random outputs.

    Returns:
      (t, output, noise, x, next) for each step: the time step, what the network said there, the
      noise that was added or not, and the images before and after.
    """
    channels = (2 if sampler.model.process.variance == "learned" else 1) * SHAPE[-1]
    generator = np.random.default_rng(seed)
    shape = (sampler.steps, BATCH, *SHAPE[:-1], channels)
    outputs = generator.normal(size=shape).astype(np.float32)
    params = {"timesteps": jnp.asarray(sampler.timesteps), "outputs": jnp.asarray(outputs)}
    state = sampler.init(params, sample_keys(seed, 0, BATCH), Condition())
    for i, t in enumerate(sampler.timesteps):
        following = sampler.step(params, state, i)
        noise = noise_of(state.keys, i)
        yield int(t), outputs[i], noise, state.x, following.x
        state = following


def assert_close(ours, theirs):
    ours, theirs = np.asarray(ours), to_numpy(theirs)
    scale = max(1.0, np.abs(theirs).max())
    np.testing.assert_allclose(ours / scale, theirs / scale, rtol=0, atol=TOLERANCE)


@pytest.mark.oracle
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_the_forward_process_is_that_of_diffusers(schedulers, schedule, timesteps):
    process = DiffusionConfig(schedule=schedule, timesteps=timesteps)
    ours, theirs = Schedule(process), schedulers.DDPMScheduler(**options(process))
    np.testing.assert_allclose(ours.beta, theirs.betas.numpy(), rtol=1e-6)
    # A product of 1000 float32 factors.
    np.testing.assert_allclose(ours.alpha_bar, theirs.alphas_cumprod.numpy(), rtol=5e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["DDPMScheduler", "DDIMScheduler"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_time_steps_are_those_of_diffusers(schedulers, name, spacing):
    scheduler = getattr(schedulers, name)(timestep_spacing=spacing)
    for steps in STEP_COUNTS:
        if steps == 1 and spacing != "trailing":
            continue  # diffusers takes t = 0, where there is no noise to take out; ours refuses
        scheduler.set_timesteps(steps)
        ours = TimeGrid(steps, spacing).timesteps(1000)
        # In "trailing" rounding can give diffusers one step more than was asked for.
        np.testing.assert_array_equal(ours, scheduler.timesteps.numpy()[:steps], str(steps))


@pytest.mark.oracle
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_time_steps_of_dpm_solver_are_those_of_diffusers(schedulers, spacing):
    scheduler = schedulers.DPMSolverMultistepScheduler(timestep_spacing=spacing)
    for steps in STEP_COUNTS[:-1]:
        scheduler.set_timesteps(steps)
        ours = TimeGrid(steps, spacing).timesteps(1000, skip_last=True)
        np.testing.assert_array_equal(ours, scheduler.timesteps.numpy()[:steps], str(steps))


@pytest.mark.oracle
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", BOTH_KINDS)
@pytest.mark.parametrize(
    ("variance", "variance_type"),
    [
        ("fixed_small", "fixed_small"),
        ("fixed_small", "fixed_small_log"),  # the same deviation by way of the logarithm
        ("fixed_large", "fixed_large"),  # "fixed_large_log" is the root of a logarithm: nan
        ("learned", "learned_range"),
    ],
)
def test_every_step_of_ddpm_is_that_of_diffusers(
    schedulers, monkeypatch, prediction, schedule, variance, variance_type
):
    process = DiffusionConfig(prediction=prediction, schedule=schedule, variance=variance)
    noises = []
    monkeypatch.setattr(
        "diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: noises[-1]
    )
    for spacing, steps, clip in [
        ("leading", 10, True),
        ("leading", 7, False),
        ("trailing", 10, True),
        ("trailing", 20, False),
        ("linspace", 7, True),
    ]:
        scheduler = schedulers.DDPMScheduler(
            **options(
                process, variance_type=variance_type, timestep_spacing=spacing, clip_sample=clip
            )
        )
        with_our_table(scheduler, process).set_timesteps(steps)
        sampler = sampler_of(process, Ancestral(steps, spacing, clip))
        for t, output, noise, x, following in walk(sampler):
            # diffusers leaves the noise of the last step out where t = 0, which is the last step
            # of "leading" and "linspace" but not of "trailing"; ours is without noise in all.
            last = t == sampler.timesteps[-1]
            noises.append(to_torch(noise) * (0.0 if last else 1.0))
            theirs = scheduler.step(to_torch(output), t, to_torch(x)).prev_sample
            assert_close(following, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", BOTH_KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [True, False])
def test_every_step_of_ddim_is_that_of_diffusers(schedulers, prediction, schedule, eta, clip):
    process = DiffusionConfig(prediction=prediction, schedule=schedule)
    for spacing, steps, clipped_direction in [
        ("leading", 10, False),
        ("leading", 7, True),
        ("trailing", 20, False),
    ]:
        scheduler = schedulers.DDIMScheduler(
            **options(process, timestep_spacing=spacing, clip_sample=clip)
        )
        with_our_table(scheduler, process).set_timesteps(steps)
        solver = DDIM(steps, spacing, clip, eta=eta, clipped_direction=clipped_direction)
        sampler = sampler_of(process, solver)
        for t, output, noise, x, following in walk(sampler):
            theirs = scheduler.step(
                to_torch(output),
                t,
                to_torch(x),
                eta=eta,
                variance_noise=to_torch(noise) if eta > 0 else None,
                use_clipped_model_output=clipped_direction,
            ).prev_sample
            assert_close(following, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("end", ["clean", "first"])
def test_every_step_of_latent_diffusion_is_that_of_diffusers(schedulers, eta, offset, end):
    process = DiffusionConfig(schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195)
    scheduler = schedulers.DDIMScheduler(
        **options(process, steps_offset=offset, set_alpha_to_one=end == "clean", clip_sample=False)
    )
    with_our_table(scheduler, process).set_timesteps(7)
    if end == "first":
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    sampler = sampler_of(process, DDIM(7, clip=False, eta=eta, offset=offset, end=end))
    np.testing.assert_array_equal(sampler.timesteps, scheduler.timesteps.numpy())
    for t, output, noise, x, following in walk(sampler):
        variance_noise = to_torch(noise) if eta > 0 else None
        step = scheduler.step(
            to_torch(output), t, to_torch(x), eta=eta, variance_noise=variance_noise
        )
        assert_close(following, step.prev_sample)


@pytest.mark.oracle
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_step_of_ddim_between_two_given_times_is_that_of_diffusers(schedulers, prediction, eta):
    # DDIMScheduler steps from t to t - T // S whatever its grid. With "linspace", and with
    # "trailing" where S does not divide T, that is not the next point of the grid, so that only
    # single steps can be compared.
    process, steps = DiffusionConfig(prediction=prediction), 7
    alpha_bar = Schedule(process).alpha_bar
    for spacing in ("linspace", "trailing"):
        scheduler = schedulers.DDIMScheduler(**options(process, timestep_spacing=spacing))
        with_our_table(scheduler, process).set_timesteps(steps)
        for i, t in enumerate(scheduler.timesteps.tolist()):
            before = t - 1000 // steps
            table = DDIM(eta=eta).coefficients(
                alpha_bar[[t]], alpha_bar[[before]] if before >= 0 else np.ones(1), process
            )
            coefficients = kernels.StepCoefficients(*(np.float32(entry[0]) for entry in table))
            keys = sample_keys(i, 0, BATCH)
            x, output = (noise_of(keys, j) for j in range(2))
            ours, _ = kernels.diffusion_step(
                x, output, coefficients, keys=keys if eta > 0 else None, clip=1.0
            )
            noise = to_torch(normal_each(keys, SHAPE)) if eta > 0 else None
            theirs = scheduler.step(
                to_torch(output), t, to_torch(x), eta=eta, variance_noise=noise
            ).prev_sample
            assert_close(ours, theirs)


@pytest.mark.oracle
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("schedule", BOTH_KINDS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_every_step_of_dpm_solver_is_that_of_diffusers(schedulers, prediction, schedule, spacing):
    # DPMSolverMultistepScheduler does not clip.
    process = DiffusionConfig(prediction=prediction, schedule=schedule)
    for steps in (1, 2, 5, 10, 20, 50):
        scheduler = schedulers.DPMSolverMultistepScheduler(
            **options(
                process,
                timestep_spacing=spacing,
                solver_order=2,
                algorithm_type="dpmsolver++",
                solver_type="midpoint",
                lower_order_final=True,
                final_sigmas_type="zero",
            )
        )
        with_our_table(scheduler, process).set_timesteps(steps)
        sampler = sampler_of(process, DPMSolverPP(steps, spacing, clip=False))
        for t, output, _, x, following in walk(sampler):
            theirs = scheduler.step(to_torch(output), t, to_torch(x)).prev_sample
            assert_close(following, theirs)


def test_ten_steps_of_ddim_give_the_figures_of_diffusers():
    # The full loop of diffusers' own test of DDIMScheduler.
    def network(params, x, t, label):
        t = t.astype(jnp.float32)[:, None, None, None]
        return x * t / (t + 1)

    count = 4 * 3 * 8 * 8
    x = (jnp.arange(count, dtype=jnp.float32) / count).reshape(3, 8, 8, 4)
    x = x.transpose(3, 1, 2, 0)  # [C, height, width, B] -> [B, ..., C]
    model = DiffusionModel(FunctionNetwork(network), DiffusionConfig(), (8, 8, 3))
    sampler = DiffusionSampler(model, DDIM(10))
    state = DiffusionState(x=x, x0=jnp.zeros_like(x), keys=sample_keys(0, 0, 4), label=None)
    for i in range(sampler.steps):
        state = sampler.step(None, state, i)
    total = jnp.abs(sampler.finish(None, state))
    np.testing.assert_allclose(total.sum(), 172.0067, atol=1e-2)
    np.testing.assert_allclose(total.mean(), 0.223967, atol=1e-3)
