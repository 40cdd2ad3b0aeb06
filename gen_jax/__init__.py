"""gen_jax: one sampling loop for every strategy between one unit at a time and all at once."""

__version__ = "0.1.0"
