"""A tokenizer.json of others, tried in a process of its own before it is loaded here.

The native code of `tokenizers` trusts its files: some of them abort the process, or never come to
an end. This module is that process, too, and loads neither NumPy nor jax.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

__all__ = ["LARGEST", "MOST_TOKENS", "check", "main"]

LARGEST = 2**26
"""Most bytes of a tokenizer.json; those of published models have up to 34 MB."""
MOST_TOKENS = 2**20

_SECONDS, _MEMORY = 60, 2**32  # of processor time, and of address space
_REFUSED = 3  # an exit code that Python does not use
_PROGRAM = "from gen_jax.data import tokenizer_check; tokenizer_check.main()"
_TEXTS = (
    "The quick brown fox doesn't jump over 0123456789 lazy dogs.\n",
    "".join(map(chr, range(256))),
    "a" * 200 + "b" + " " * 200,
    "e\u0301 \u65e5\u672c\u8a9e \U0001f469\u200d\U0001f467 \ufffd\U0010ffff",
)


def check(content: str, fields: dict[str, Any], source: str) -> None:
    """Refuses what this process should not load.

    Args:
      content: the text of a tokenizer.json with a model of `tokenizers`.
      fields: the same, parsed.
      source: its name, for errors.

    Raises:
      ValueError: its tokens are drawn at random or too many, or loading it, or a first text, ends
        the process that tries it, or takes too long or too much memory.
      ChildProcessError: that process cannot be run.
    """
    if problem := _problem(fields):
        raise ValueError(f"{source} is refused: {problem}")
    path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
    settings = {"PYTHONPATH": path, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    slow = f"{source} is refused: it takes more than {_SECONDS} s for a short text"
    try:
        tried = subprocess.run(
            [sys.executable, "-c", _PROGRAM, str(_SECONDS)],
            input=content.encode(),
            capture_output=True,
            env=os.environ | settings,
            timeout=20 * _SECONDS,  # which only a process that waits for ever comes to
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ValueError(slow) from None
    if tried.returncode == 0:
        return
    if tried.returncode == _REFUSED:
        raise ValueError(f"{source} is no tokenizer of `tokenizers` ({tried.stdout.decode()})")
    if tried.returncode in (-signal.SIGXCPU, -signal.SIGKILL):
        raise ValueError(slow)
    if tried.returncode < 0:
        name = signal.Signals(-tried.returncode).name
        raise ValueError(f"{source} is refused: it ends the process that reads it ({name})")
    lines = tried.stderr.decode(errors="replace").splitlines() or ["no reason given"]
    raise ChildProcessError(f"the process that tries {source} failed: {lines[-1]}")


def _problem(fields):
    """What is wrong with the options that can be judged without the package; None if nothing is."""
    model, added = fields["model"], fields.get("added_tokens")
    if not isinstance(model, dict):
        return None  # which the package says better
    if model.get("dropout"):
        return f"its dropout is {str(model['dropout'])[:20]}, so that no text has certain tokens"
    vocabulary = model.get("vocab")
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else []
    added = added if isinstance(added, list) else []
    ids += [token.get("id") for token in added if isinstance(token, dict)]
    if wrong := [id for id in ids if type(id) is not int or not 0 <= id < MOST_TOKENS]:
        return f"it has the token {str(wrong[0])[:20]}, and they must lie in [0, {MOST_TOKENS})"
    if isinstance(vocabulary, list) and len(vocabulary) > MOST_TOKENS:
        return f"it has {len(vocabulary)} tokens, and at most {MOST_TOKENS} are read"
    return None


def main() -> None:
    """Tries the tokenizer.json on standard input; refuses it with a sentence on standard output."""
    seconds = int(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    content = sys.stdin.buffer.read().decode()
    import tokenizers

    try:
        model = tokenizers.Tokenizer.from_str(content)
        model.no_truncation()
        model.no_padding()
        for text in (*_TEXTS, *_named_texts(json.loads(content))):
            _try_text(model, text)
    except MemoryError:
        sys.stdout.write("it needs too much memory")
        sys.exit(_REFUSED)
    except BaseException as error:  # a panic of the package is no Exception
        sys.stdout.write(" ".join(str(error).split())[:500])
        sys.exit(_REFUSED)


def _try_text(model, text):
    """Encodes and decodes a text, which need not have tokens: only a panic is no answer."""
    try:
        ids = model.encode(text, add_special_tokens=False).ids
        model.decode(ids, skip_special_tokens=False)
    except Exception:
        return


def _named_texts(fields: dict[str, Any]) -> Iterator[str]:
    """What the rules of the file look for, a few characters of each."""
    left = [fields.get(part) for part in ("normalizer", "pre_tokenizer", "decoder")]
    found = []
    while left:
        value = left.pop()
        if isinstance(value, str):
            found.append(value[:100])
        elif isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
    yield "".join(found[:1000])
