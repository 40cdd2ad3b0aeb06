import json
import random
import signal
import time

from processes import assert_same_leaves, read_leaves, saved_steps, wait_until

KILLS = 20
AT_START = 5  # of them fall anywhere in the first two seconds of a process
STEPS = 140
OPTIONS = ("--train.steps", STEPS, "--train.checkpoint-every", 4, "--pause", 0.02)


def test_a_run_killed_twenty_times_ends_as_one_that_was_not(toy, folder):
    assert toy.run("--workdir", "whole", *OPTIONS).returncode == 0

    moments, workdir = random.Random(0), folder / "killed"
    at_start = set(moments.sample(range(KILLS), AT_START))
    for life in range(KILLS):
        with toy.start("--workdir", "killed", *OPTIONS) as process:
            if life in at_start:
                time.sleep(moments.uniform(0, 2))
            else:
                before = saved_steps(workdir)[-1:]
                wait_until(lambda before=before: saved_steps(workdir)[-1:] > before, process)
                time.sleep(moments.uniform(0, 0.25))  # a little more than a save and the next
            process.kill()
            process.communicate()
        assert process.returncode == -signal.SIGKILL
    assert 0 < saved_steps(workdir)[-1] < STEPS

    assert toy.run("--workdir", "killed", *OPTIONS).returncode == 0
    assert saved_steps(workdir) == saved_steps(folder / "whole") == [132, 136, 140]
    assert_same_leaves(read_leaves(workdir), read_leaves(folder / "whole"))
    records = [
        [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("killed", "whole")
    ]
    for record in [*records[0], *records[1]]:
        del record["examples_per_second"]
    assert records[0] == records[1]
    assert [record["step"] for record in records[0]] == list(range(1, STEPS + 1))
    leftovers = [path.name for path in (workdir / "checkpoints").iterdir()]
    assert sorted(leftovers) == ["132", "136", "140"]
