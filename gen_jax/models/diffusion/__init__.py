"""Denoising diffusion: the process, the loss, the variational bound, and the solvers.

Papers: DDPM (Ho et al. 2020, 2006.11239); cosine schedule and learned variance (Nichol & Dhariwal
2021, 2102.09672); beta with a linear root (Rombach et al. 2022, 2112.10752); v-prediction (Salimans
& Ho 2022, 2202.00512); DDIM (Song et al. 2020, 2010.02502); DPM-Solver++ (Lu et al. 2022,
2211.01095); classifier-free guidance (Ho & Salimans 2022, 2207.12598); spacings of the time steps
(Lin et al. 2023, 2305.08891).

    q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, (1 - alpha_bar_t) I)             2006.11239 eq. 4
    L_simple     = E |eps - eps_theta(x_t, t)|^2                             2006.11239 eq. 14
    L_vlb        = L_T + sum_{t > 0} KL(q(x_{t-1} | x_t, x_0) || p) + L_0    2006.11239 eq. 5
    log sigma^2  = u log beta_t + (1 - u) log beta-tilde_t, u = (v + 1) / 2  2102.09672 eq. 15
    L_hybrid     = L_simple + lambda L_vlb, whose mean has no gradient       2102.09672 eq. 16
    x_s          = sqrt(alpha_bar_s) x_0 + sqrt(1 - alpha_bar_s - sigma^2) eps + sigma z
                                                                             2010.02502 eq. 12
    x_s          = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) D, with
    D            = (1 + 1 / 2r) x_0(x_t) - 1 / 2r x_0(x before)              2211.01095 alg. 2

Where we differ: time steps count from 0 to T - 1 here, from 1 to T in the papers; the bound is in
bits per dimension; every solver is a table of coefficients for one affine update
(`kernels.diffusion_step`), for any sub-sequence of the time steps, and no solver adds noise in a
step to the clean image.

`config`, `schedule`, `time_grid` and `solvers` load no jax; names are imported when they are used.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "config": ["DiffusionConfig", "Prediction", "Variance"],
        "exact": ["ExactNetwork"],
        "losses": ["DiffusionModel", "Network"],
        "samplers": ["DiffusionSampler", "DiffusionState"],
        "schedule": ["Schedule"],
        "solvers": ["DDIM", "Ancestral", "DPMSolverPP", "Solver", "StepTable"],
        "time_grid": ["Spacing", "TimeGrid"],
    },
)
