"""What a refused command line leaves on the screen."""

__all__ = ["refused_in"]


def refused_in(capsys) -> str:
    """The line that was printed: the only one, on standard error."""
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("error: ")
    return line
