"""A page of a single run, in one file that needs no network: curves, pictures, configuration.

python -m experiments.report --workdir runs/ddpm_cifar_tiny
    Writes index.html there. The run may be of any experiment, and still be training.
"""

import sys

import tyro

from gen_jax import arguments, cli
from gen_jax.config import frozen, resolve
from gen_jax.workdir import Workdir


@frozen
class ReportConfig:
    """Which run."""

    workdir: str
    """Its work directory."""


def main(argv: list[str] | None = None) -> int:
    """Writes the page that the arguments ask for; the exit code of `cli.guarded`."""

    def run():
        with arguments.refusals_in_one_line():
            config = tyro.cli(
                ReportConfig,
                prog="python -m experiments.report",
                description="A page of a single run.",
                args=argv,
            )
        workdir = Workdir(config.workdir)
        if workdir.stored_config() is None:
            raise ValueError(f"no run in {workdir.path}; train one first, or give its --workdir")
        resolve("gen_jax.comparison.figures:check_installed")()
        print(resolve("gen_jax.comparison.single:write")(workdir))

    return cli.guarded(run)


if __name__ == "__main__":
    sys.exit(main())
