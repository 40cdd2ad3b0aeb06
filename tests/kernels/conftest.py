"""Annotations of the kernels are checked while their tests run."""

import pathlib
import sys
import types

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


@pytest.fixture
def plant(monkeypatch):
    """Puts a changed copy in the place of a kernel: plant(entry, line, other line)."""
    from kernels import dispatch

    def planted(entry, line, other):
        path = pathlib.Path(sys.modules[entry.run.__module__].__file__)
        source = path.read_text(encoding="utf-8")
        assert source.count(line) == 1, "the line is not there once"
        copy = {op: dict(found) for op, found in dispatch._REGISTRY.items()}
        monkeypatch.setattr(dispatch, "_REGISTRY", copy)
        for entries in copy.values():
            entries.pop(entry.name, None)
        module = types.ModuleType("changed")
        monkeypatch.setitem(sys.modules, "changed", module)
        exec(compile(source.replace(line, other), "changed", "exec"), module.__dict__)

    return planted
