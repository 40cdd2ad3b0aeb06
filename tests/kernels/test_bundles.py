"""Cycles of small programs of bundles that are counted by hand, and of what may go wrong."""

import re

import pytest

from kernels.machine.bundles import walk
from kernels.machine.chips import CHIPS

UNITS = "MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU"
V5E, V6E = CHIPS["v5e"], CHIPS["v6e"]


def written(tmp_path, *bundles, spills=()):
    """A program as libtpu dumps it, with its table of used slots; "@7 ..." starts region 7."""
    lines = []
    for i, code in enumerate(bundles):
        region, code = re.fullmatch(r"(?:@(\d+) )?(.*)", code).groups()
        comment = f" /* Start region {region} */" if region else ""
        lines.append(f"{i:#5x}   :  {{ {code} }}{comment}")
    path = tmp_path / "123-kernel-03-final_bundles.txt"
    path.write_text("LH: loop header\n\n" + "\n".join(lines) + "\n")
    rows = [" ".join(["0"] * 8 + [str(int(i in spills)), "1"]) for i in range(len(bundles))]
    table = tmp_path / "123-kernel-01-final_hlo-static-per-bundle-utilization.txt"
    heads = ["== CAPACITY:", UNITS, "2 2 4 2 1 3 3 2 2 2", "== UTILIZATION:"]
    table.write_text("\n".join(heads + rows) + "\n")
    return path


LOOP = (
    "%s1_s0 = smov 0",
    "@7 %s2_s0 = sadd.s32 1, %s3_s0",
    "%p4_p0 = scmp.lt.s32.totalorder %s2_s0, 10",
    "%5 = sbr.rel (%p4_p0) target = $region7",
    *[""] * 4,  # issued before the branch is taken
)


def test_a_loop_of_ten_trips(tmp_path):
    found = walk(written(tmp_path, *LOOP, spills=(2,)), V5E)
    assert found.cycles == found.bundles == 1 + 10 * 7
    assert found.spills == 10
    assert found.slots["SALU"] == 0.5
    assert not found.unknown
    assert found.copy_wait == found.matrix_wait == found.hbm_bytes == 0


@pytest.mark.parametrize("chip", [V5E, V6E])
def test_a_copy_takes_its_bytes_and_a_latency(tmp_path, chip):
    path = written(
        tmp_path,
        "%1 = dma.hbm_to_vmem [thread:$0]  %s9_s1, 4096, %s9_s2, [#allocation2]",
        "",
        "%2 = dma.done.wait [#allocation2], 4096",
    )
    found = walk(path, chip)
    copied = 4096 * 32
    assert found.hbm_bytes == copied
    assert found.cycles == round(1 + copied / (chip.gigabytes / chip.gigahertz) + 810)
    assert found.copy_wait == found.cycles - 3


def test_copies_queue_and_flags_are_told_apart(tmp_path):
    path = written(
        tmp_path,
        "%s1_s5 = scalar_lea.sflag [#allocation2], 1",
        "%s2_s6 = scalar_lea.sflag %s1_s5, 1 [#allocation2]",
        "%3 = dma.hbm_to_vmem [thread:$0]  %s9_s1, 4096, %s9_s2, %s1_s5",
        "%4 = dma.hbm_to_vmem [thread:$0]  %s9_s1, 8192, %s9_s2, %s2_s6",
        "%5 = dma.done.wait %s2_s6, 8192",  # the later one, so that nothing is left to wait for
        "%6 = dma.done.wait %s1_s5, 4096",
    )
    found = walk(path, V5E)
    assert found.cycles == round(3 + 3 * 4096 * 32 / V5E.bytes_per_cycle + 810) + 1
    assert not found.unknown


def test_matrix_units_work_behind_what_they_are_given(tmp_path):
    product = "%v1_v0 = vmatmul.mubr.bf16.gmra.mxu0 %v2_v2"
    for chip in (V5E, V6E):
        found = walk(written(tmp_path, *[product] * 100), chip)
        each = 16 / chip.rows
        assert found.matrix == 100 * each
        assert found.cycles == pytest.approx(100 * each - 64, abs=each)
        assert found.matrix_wait == found.cycles - 100


def test_what_depends_on_arguments_is_unknown_unless_it_is_given(tmp_path):
    path = written(
        tmp_path,
        "%s1_s0 = sld [smem:[#allocation3]]",
        "%p2_p0 = scmp.lt.s32.totalorder %s1_s0, 5",
        "%3 = dma.hbm_to_vmem (%p2_p0), %s9_s1, 4096, %s9_s2, [#allocation2]",
    )
    assert walk(path, V5E).hbm_bytes == 4096 * 32  # counts as made
    assert walk(path, V5E, scalar=4).hbm_bytes == 4096 * 32
    assert walk(path, V5E, scalar=5).hbm_bytes == 0
    branch = written(tmp_path, "%s1_s0 = sld [smem:[#allocation3]]", *LOOP[1:])
    assert walk(branch, V5E).unknown == {"branch on what is not known": 1}
    assert walk(branch, V5E, scalar=7).cycles == 1 + 3 * 7


def test_a_donated_argument_is_not_copied(tmp_path):
    path = written(
        tmp_path,
        "%s1_s0 = scalar_parameter_address 3",
        "%s2_s1 = sld [smem:[#allocation6]]",
        "%p3_p2 = scmp.eq.s32.totalorder %s2_s1, %s1_s0",
        "%4 = sbr.rel (%p3_p2) target = $region8",
        *[""] * 4,
        "%5 = dma.hbm_to_vmem %s9_s1, 4096, %s9_s2, [#allocation2]",
        "@8 ",
    )
    found = walk(path, V5E)
    assert found.hbm_bytes == 0
    assert not found.unknown


def test_an_instruction_that_is_new_is_told(tmp_path):
    found = walk(written(tmp_path, "%s1_s0 = sfrob.s32 1, %s3_s0, 4"), V5E)
    assert found.unknown == {"sfrob.s32": 1}


def test_files_that_are_no_program(tmp_path):
    path = tmp_path / "1-x-03-final_bundles.txt"
    path.write_text("nothing")
    with pytest.raises(ValueError, match="has no bundles"):
        walk(path, V5E)
    path.write_text("   0   :  { }\n")
    with pytest.raises(ValueError, match="has 0 tables of used slots beside it"):
        walk(path, V5E)
    (tmp_path / "1-x-01-final_hlo-static-per-bundle-utilization.txt").write_text(
        f"==\n{UNITS}\n2 2 4 2 1 3 3 2 2 2\n==\n"
    )
    with pytest.raises(ValueError, match="has 0 rows for 1 bundles"):
        walk(path, V5E)
