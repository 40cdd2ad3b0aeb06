"""Models and samplers, a package for each family."""

from gen_jax import clash

clash.check_kernels()
