"""Types of arguments that the public functions share.

Array types are those of jaxtyping. Under its import hook they are checked at every call, while a
program is traced as well as outside; without the hook they cost nothing.
"""

import jax
import numpy as np

__all__ = ["AnyArray", "IntScalar", "Scalar"]

AnyArray = jax.Array | np.ndarray
IntScalar = int | np.integer
Scalar = float | int | np.floating | np.integer
