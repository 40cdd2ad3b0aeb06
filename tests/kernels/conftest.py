"""Annotations of the kernels are checked while their tests run."""

import sys

import jaxtyping
import pytest

if "kernels" not in sys.modules:
    jaxtyping.install_import_hook("kernels", "beartype.beartype")


@pytest.fixture
def unchecked_types():
    """Our own refusals of wrong types, which the checks of annotations would come before."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
