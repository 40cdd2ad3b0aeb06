"""Annotations are checked while tests run; tests of refusals look behind that check."""

import contextlib

import jaxtyping


@contextlib.contextmanager
def unchecked_annotations():
    """Within it a function refuses by its own checks alone, as it does for those who use it."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", before)
