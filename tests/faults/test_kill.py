import random
import signal
import time

import pytest
from processes import assert_same_leaves, read_leaves, records, saved_steps, wait_until

pytestmark = pytest.mark.long

KILLS = 10
AT_START = 3  # of them fall anywhere in the first moments of a process
STEPS = 140


@pytest.mark.parametrize("kind", [(), pytest.param(("--game",), marks=pytest.mark.slow)])
def test_a_run_killed_ten_times_ends_as_one_that_was_not(toy, folder, kind):
    """Every other checkpoint of the game is in the middle of a round, which has two turns."""
    every = 5 if kind else 4
    options = (*kind, "--train.steps", STEPS, "--train.checkpoint-every", every, "--pause", 0.02)
    whole = toy.run("--workdir", "whole", *options)
    assert whole.returncode == 0, whole.stderr

    moments, workdir = random.Random(0), folder / "killed"
    at_start = set(moments.sample(range(KILLS), AT_START))
    for life in range(KILLS):
        with toy.start("--workdir", "killed", *options) as process:
            if life in at_start:
                time.sleep(moments.uniform(0, 0.6))
            else:
                before = saved_steps(workdir)[-1:]
                wait_until(lambda before=before: saved_steps(workdir)[-1:] > before, process)
                time.sleep(moments.uniform(0, 0.15))  # a little more than the next steps and save
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 0 < saved_steps(workdir)[-1] < STEPS

    assert toy.run("--workdir", "killed", *options).returncode == 0
    last = [STEPS - 2 * every, STEPS - every, STEPS]
    assert saved_steps(workdir) == saved_steps(folder / "whole") == last
    assert_same_leaves(read_leaves(workdir), read_leaves(folder / "whole"))
    lines = [records(workdir), records(folder / "whole")]
    for record in [*lines[0], *lines[1]]:
        del record["examples_per_second"]
    assert lines[0] == lines[1]
    assert [record["step"] for record in lines[0]] == list(range(1, STEPS + 1))
    leftovers = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert sorted(leftovers, key=int) == [str(step) for step in last]
