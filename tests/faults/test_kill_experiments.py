"""Experiments that are killed at random moments of any phase, and started again."""

import random
import signal
import time

import pytest
from processes import LEAST_STAGES, LEAST_TEXT, ForkedExperiment, assert_same_results

pytestmark = pytest.mark.long

RUNS = {
    "gpt_text": (
        f"{LEAST_TEXT} --train.steps 9 --train.checkpoint-every 2 --sample.number 8 "
        "--sample.micro-batch 1 --evaluate.batch 4",
        ("all", "export"),
    ),
    "two_stage": (
        f"{LEAST_STAGES} --coder-train.steps 4 --coder-train.checkpoint-every 1 "
        "--train.steps 4 --train.checkpoint-every 1 --sample.number 8 --sample.micro-batch 1 "
        "--evaluate.batch 4",
        ("all",),
    ),
}
FINISHED = (
    "*/checkpoints/[0-9]*",
    "codes/*",
    "parts/*/*.npz",
    "samples.*",
    "samples/*",
    "trajectory.png",
    "summary.json",
    "gpt2/*",
)


class Life:
    """Lives of the processes of one run, and what they have finished so far, as seen from outside.

    Args:
      program: of the experiment.
      commands: that are run, one after the other.
    """

    def __init__(self, program, commands):
        self.program, self.commands = program, list(commands)
        self.workdir, self.finished = program.folder / "run", set()

    def until(self, number, seconds=0.0):
        """A life that is killed so long after this many things are finished; whether it was."""
        with self.program.start(self.commands[0], "--workdir", "run") as process:
            end = float("inf")
            while process.poll() is None and time.monotonic() < end:
                self.look()
                if len(self.finished) >= number:
                    end = min(end, time.monotonic() + seconds)
                time.sleep(0.005)
            process.kill()
            _, stderr = process.communicate()
        self.look()
        assert process.returncode in (0, -signal.SIGKILL), stderr
        if process.returncode == 0:
            del self.commands[0]
        return process.returncode != 0

    def to_the_end(self):
        """Lives that are not killed, until all commands have run."""
        while self.commands:
            assert not self.until(float("inf"))

    def look(self):
        self.finished.update(path for place in FINISHED for path in self.workdir.glob(place))


@pytest.mark.parametrize(
    ("name", "kills"),
    [
        ("gpt_text", 3),
        pytest.param("gpt_text", 20, marks=pytest.mark.slow),
        pytest.param("two_stage", 20, marks=pytest.mark.slow),
    ],
)
def test_an_experiment_that_was_killed_ends_as_one_that_was_not(folder, name, kills):
    """Where a run ends before it is killed, as on a busy machine, another begins."""
    options, commands = RUNS[name]

    def begin(place):
        (folder / place).mkdir()
        return Life(ForkedExperiment(name, folder / place, options), commands)

    whole = begin("whole")
    whole.to_the_end()
    moments, times, runs = random.Random(kills), 0, [begin("killed")]
    for number in sorted(moments.uniform(0, 0.9 * len(whole.finished)) for _ in range(kills)):
        if not runs[-1].commands:
            runs.append(begin(f"killed {len(runs)}"))
        times += runs[-1].until(number, moments.uniform(0, 0.3))
    print(f"{name}: {len(runs)} runs, killed {times} times")
    assert times > kills / 2, "they end before they are killed"
    for run in runs:
        run.to_the_end()
        assert_same_results(run.workdir, whole.workdir)
