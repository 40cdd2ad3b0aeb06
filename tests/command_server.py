"""Runs command lines of experiments, each in a fork of one process that has imported them.

The modules take half a second to import, a command line that is refused a fiftieth. Read from
standard input and written to standard output are JSON lines: {"experiment", "arguments", "folder"},
then {"code", "out", "err"}.
"""

import importlib
import json
import os
import sys
import tempfile

from gen_jax import cli


def answer(experiments, request):
    """The exit code of a command line, and what it wrote."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = os.fork()
        if process == 0:
            os.chdir(request["folder"])
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            sys.argv = [request["experiment"], *request["arguments"]]
            sys.exit(cli.main(experiments[request["experiment"]]))
        _, status = os.waitpid(process, 0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": _written(out),
            "err": _written(err),
        }


def _written(file):
    file.seek(0)
    return file.read().decode()


def main():
    """Serves until standard input ends."""
    names = sys.argv[1:]
    experiments = {
        name: importlib.import_module(f"experiments.{name}").EXPERIMENT for name in names
    }
    for line in sys.stdin:
        print(json.dumps(answer(experiments, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
