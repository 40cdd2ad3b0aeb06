"""The command of estimates where nothing is compiled: what it refuses, counts and compares."""

import jax.numpy as jnp
import pytest

from experiments.benchmarks import absent_gpu, absent_tpu
from kernels import dispatch, estimate, inspection, operands
from kernels.machine import calls
from kernels.machine.chips import CHIPS
from kernels.machine.cuda import Kernel, Program


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["fft"], "error: there are no estimates of 'fft'; there are some of decode_attention, d"),
        (["--chip", "v5e,v9"], "error: argument --chip: there is no chip 'v9'; there are v5e, v6e"),
        (["--chip", "v5e,h100"], "error: h100 has no cycles: ask for it alone, without --check"),
        (["--chip", "h100", "--check"], "error: h100 has no cycles: ask for it alone, without"),
        (["--check", "--store"], "error: argument --store: not allowed with argument --check"),
    ],
)
def test_it_refuses_in_one_line(arguments, line, capsys):
    with pytest.raises(SystemExit) as refused:
        estimate.main(arguments)
    assert refused.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(line)
    assert err.count("\n") == 1


def test_without_libtpu_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(estimate, "missing", lambda: "libtpu is not installed: pip install it")
    with pytest.raises(SystemExit) as refused:
        estimate.main([])
    assert refused.value.code == 2
    assert capsys.readouterr().err == "error: libtpu is not installed: pip install it\n"


def test_without_the_compilers_of_cuda_it_says_how_to_get_them(capsys, monkeypatch):
    monkeypatch.setattr(estimate.cuda, "missing", lambda: "they are not installed: install them")
    with pytest.raises(SystemExit) as refused:
        estimate.main(["--chip", "h100"])
    assert refused.value.code == 2
    assert capsys.readouterr().err == "error: they are not installed: install them\n"


def test_five_percent_more_than_stored_are_too_many():
    stored = {"a": 1000, "b": 1000}
    assert estimate.exceeded({"a": 1050, "b": 900}, stored) == []
    assert estimate.exceeded({"a": 1051}, stored) == ["a: 1,051 cycles, and 1,000 are stored"]
    assert estimate.exceeded({"c": 1}, stored) == ["c: no figure is stored; add it with --store"]


def test_peaks_of_the_chips_are_the_published_ones():
    """In TFLOP/s of bfloat16: two operations for each weight and row."""
    for name, peak in (("v5e", 197), ("v6e", 918)):
        chip = CHIPS[name]
        rate = 2 * chip.width**2 * chip.mxus * chip.rows * chip.gigahertz / 1e3
        assert rate == pytest.approx(peak, rel=0.01)


HLO = """
%body (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %a = f32[8]{0} add(%p, %p), metadata={op_name="one"}
}
%same (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %b = f32[8]{0} add(%q, %q), metadata={op_name="two"}
}
%other (r: f32[8]) -> f32[8] {
  %r = f32[8]{0} parameter(0)
  ROOT %c = f32[8]{0} multiply(%r, %r)
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %fusion.1 = f32[8]{0} fusion(%x), kind=kLoop, calls=%body, metadata={op_name="one"}
  %fusion.2 = f32[8]{0} fusion(%fusion.1), kind=kLoop, calls=%same, backend_config={"x":1}
  %fusion.3 = f32[8]{0} fusion(%fusion.2), kind=kLoop, calls=%other
  %search.1 = f32[8]{0} custom-call(%fusion.3), custom_call_target="tpu_custom_call"
  ROOT %draw.1 = f32[8]{0} custom-call(%search.1), custom_call_target="tpu_custom_call"
}
"""


def frame(*names):
    return "\n".join(f" 0x1 : {{ %1 = inlined_call %s1_s0 /* %{n} = op(%x) */ }}" for n in names)


def test_kernels_that_are_alike_are_counted_as_one():
    text = frame("fusion.1", "fusion.2", "fusion.3", "search.1", "draw.1")
    counted, strange = calls.count(text, HLO, {"fusion.1", "fusion.3", "search.1"})
    assert counted == {"fusion.1": 2, "fusion.3": 1, "search.1": 1}
    assert strange == 1  # a kernel of another name, although its operands are the same


def test_left_out_implementations_are_no_defaults():
    operation = dispatch.operations()["keep_most_confident"]
    values = jnp.zeros((1, 100)), jnp.zeros(1, jnp.int32)
    assert operation.defaults(*values)["default"].name == "threshold"
    with dispatch.leave_out("threshold"):
        assert operation.defaults(*values)["default"].name == "reference"
    assert operation.defaults(*values)["default"].name == "threshold"


def test_preferred_implementations_are_the_defaults_where_they_can_be():
    codes = dispatch.operations()["nearest_code"]
    small, wide = (jnp.zeros((4, width)) for width in (8, 400))
    assert codes.defaults(small, small).keys() == {"default", "tpu"}
    with dispatch.prefer("gpu", "blocks"):
        chosen = codes.defaults(small, small)
        assert chosen["cuda"].name == "gpu"
        assert chosen["default"].name == "blocks"
        assert "cuda" not in codes.defaults(wide, wide)  # for which it has no room
    with pytest.raises(ValueError, match="has an implementation 'gpus'"), dispatch.prefer("gpus"):
        pass


def test_the_least_multiple():
    assert [operands.up_to(number, 8) for number in (0, 1, 8, 9)] == [0, 8, 8, 16]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"chips": ("v9",)}, "no chip v9; there are v5e"), ({"steps": ("x",)}, "no step x; there")],
)
def test_loops_that_are_not_known(options, message):
    with pytest.raises(ValueError, match=message):
        absent_tpu.Config(**options)
    if "steps" in options:
        with pytest.raises(ValueError, match=message):
            absent_gpu.Config(**options)


HLO_OF_A_GPU = """
%fused (p: f32[8]) -> f32[8] {
  ROOT %a = f32[8]{0} copy(%p)
}
%few (p: f32[8]) -> f32[8] {
  ROOT %b = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
}
%many (p: f32[8]) -> f32[8] {
  %c = f32[8]{0} fusion(%p), kind=kLoop, calls=%fused
  ROOT %d = f32[8]{0} custom-call(%c), custom_call_target="mosaic_gpu_v2"
}
%body (p: f32[8]) -> f32[8] {
  ROOT %e = f32[8]{0} conditional(%i, %p, %p), branch_computations={%few, %many}
}
ENTRY %main (x: f32[8]) -> f32[8] {
  %f = f32[8]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %g = f32[8]{0} while(%f), condition=%cond, body=%body
}
"""


def test_launches_and_branches_of_a_program():
    program = Program((), 0, HLO_OF_A_GPU)
    assert program.launches == 3  # one before the loop, and in it the longer branch
    assert program.branches == 1


KERNEL = Kernel("search", 111, 0, 4096, {"HGMMA": 2, "UTMALDG": 3, "IMAD": 100})


@pytest.mark.parametrize(
    ("row", "line"),
    [
        (
            {"name": "gpu", "temporaries": 300_000, "kernels": (KERNEL,)},
            "| few | gpu | 111 | 0 | 4.0 | 2 | 3 | 105 | 0.3 |",
        ),
        (
            {"name": "reference", "temporaries": 2_000_000, "kernels": ()},
            "| few | reference |  |  |  |  |  |  | 2.0 |",
        ),
        ({"name": "gpu", "refuses": "takes less"}, "| few | gpu | takes less |"),
    ],
)
def test_lines_of_gpus(row, line):
    assert inspection._line("few", row) == line
