"""Draws what compression buys and costs: priors over ever fewer codes, from finished runs.

    python docs/compression.py PICTURE RUN ...

RUN is a work directory of experiments.two_stage whose prior is over codes; the table is printed.
"""

import json
import sys
from pathlib import Path

import matplotlib
from matplotlib import pyplot

matplotlib.use("Agg")
_COLUMNS = {
    "codes": "codes_per_image",
    "NFE": "nfe",
    "valid": "validity",
    "total variation": "tv_joint",
    "error of the decoder": "reconstruction_mse",
    "nats of the codes": "nats_of_codes",
    "bits/dim": "bits_per_dim",
    "samples/s": "samples_per_second",
}


def main(picture: Path, runs: list[Path]) -> None:
    """Prints a row for each run, most codes first, and draws validity and rate against NFE."""
    reports = [json.loads((run / "summary.json").read_text(encoding="utf-8")) for run in runs]
    reports.sort(key=lambda report: -report["codes_per_image"])
    print(f"| {' | '.join(_COLUMNS)} |\n|{'---|' * len(_COLUMNS)}")
    for report in reports:
        print(f"| {' | '.join(f'{report[key]:.4g}' for key in _COLUMNS.values())} |")
    figure, axes = pyplot.subplots(1, 2, figsize=(8, 3), layout="constrained")
    evaluations = [report["nfe"] for report in reports]
    rows = (("validity", "valid samples"), ("samples_per_second", "samples/s"))
    for axis, (key, label) in zip(axes, rows, strict=True):
        axis.plot(evaluations, [report[key] for report in reports], "o-")
        for report in reports:
            place = (report["nfe"], report[key])
            axis.annotate(f" {report['codes_per_image']} codes", place, fontsize=8)
        axis.set(xlabel="evaluations of networks, one after the other", ylabel=label)
        axis.set_xscale("log", base=2)
    axes[0].set_ylim(0, 1.05)
    axes[1].set_yscale("log")
    figure.savefig(picture, dpi=100)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        print("error: give the picture to write, and work directories", file=sys.stderr)
        sys.exit(2)
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
