"""Mask schedules: compositions of L, known sizes, and the optimum by brute force."""

import functools
import itertools
import subprocess
import sys
import typing

import numpy as np
import pytest

from annotations import unchecked_annotations
from gen_jax.data.exact_sets import NoisyMixture, binary_chain, even_parity
from gen_jax.metrics.gaps import random_order_gap
from gen_jax.models.masked.config import ScheduleName
from gen_jax.models.masked.schedules import (
    SCHEDULES,
    Cosine,
    Exponential,
    Fixed,
    Logarithmic,
    Optimal,
    Power,
    check_rounds,
    masked_after,
)

MIXTURE = NoisyMixture(3, 6, 3, 0.2).data.entropy_profile
CHAIN = binary_chain(8, 0.85).entropy_profile
PARITY = even_parity(8).entropy_profile
PROFILES = {"mixture": MIXTURE, "chain": CHAIN, "parity": PARITY}
CURVES = pytest.mark.parametrize("name", SCHEDULES)


def compositions(length, rounds):
    for cuts in itertools.combinations(range(1, length), rounds - 1):
        yield tuple(np.diff((0, *cuts, length)).tolist())


def optimal(profile):
    return Optimal(tuple(profile.tolist()))


@CURVES
def test_sizes_are_a_composition(name):
    for length in range(1, 17):
        for rounds in range(1, length + 1):
            sizes = SCHEDULES[name].sizes(length, rounds)
            assert all(isinstance(size, int) for size in sizes)
            assert len(sizes) == rounds
            assert min(sizes) >= 1
            assert sum(sizes) == length
        assert SCHEDULES[name].sizes(length, 1) == (length,)
        assert SCHEDULES[name].sizes(length, length) == (1,) * length


@CURVES
def test_curves_fall_from_one_to_zero(name):
    ratios = np.linspace(0.001, 0.999, 50)
    shares = np.array([SCHEDULES[name].gamma(ratio, 16) for ratio in ratios])
    assert (shares > 0).all()
    assert (shares <= 1).all()
    assert (np.diff(shares) <= 0).all()
    ends = [SCHEDULES[name].gamma(ratio, 16) for ratio in (1e-9, 1 - 1e-9)]
    first = 1 - 1 / 16 if name == "exponential" else 1
    np.testing.assert_allclose(ends, [first, 0], atol=1e-4)


@pytest.mark.parametrize(
    ("schedule", "length", "rounds", "sizes"),
    [
        (Cosine(), 8, 2, (3, 5)),
        (Cosine(), 8, 3, (2, 2, 4)),
        (Power(0.5), 8, 3, (5, 2, 1)),
        (Power(), 8, 4, (2, 2, 2, 2)),
        (Power(2.0), 8, 2, (2, 6)),
        (Exponential(), 16, 2, (4, 12)),
        (Logarithmic(), 16, 2, (12, 4)),
        (Fixed((2, 5, 1)), 8, 3, (2, 5, 1)),
    ],
)
def test_known_sizes(schedule, length, rounds, sizes):
    assert schedule.sizes(length, rounds) == sizes


@pytest.mark.parametrize("name", PROFILES)
def test_nothing_beats_the_optimum(name):
    profile = PROFILES[name]
    length = len(profile) - 1
    for rounds in range(1, length + 1):
        sizes = optimal(profile).sizes(length, rounds)
        assert len(sizes) == rounds
        found = random_order_gap(profile, sizes)
        best = min(random_order_gap(profile, other) for other in compositions(length, rounds))
        assert found == pytest.approx(best, abs=1e-12)


@pytest.mark.parametrize("name", ["mixture", "chain"])
@pytest.mark.parametrize("rounds", [2, 3, 4])
def test_slow_starts_win_where_few_tokens_tell_the_rest(name, rounds):
    profile = PROFILES[name]
    length = len(profile) - 1
    best, cosine, linear, root = (
        random_order_gap(profile, schedule.sizes(length, rounds))
        for schedule in (optimal(profile), Cosine(), Power(), Power(0.5))
    )
    assert best <= cosine + 1e-12
    assert cosine < linear < root


def test_slow_starts_lose_on_parity():
    cosine, root = (
        random_order_gap(PARITY, SCHEDULES[name].sizes(8, 3)) for name in ("cosine", "square_root")
    )
    assert root == pytest.approx(0, abs=1e-12)
    assert cosine == pytest.approx(np.log(2))


@CURVES
def test_masked_after_follows_the_sizes(name):
    schedule = SCHEDULES[name]
    for rounds in (1, 3, 7, 12):
        table = masked_after(schedule, 12, rounds)
        assert table.dtype == np.int32
        assert table.shape == (13, rounds)
        assert (table[:, -1] == 0).all()
        counts = np.concatenate([np.arange(13)[:, None], table], axis=1)
        revealed = -np.diff(counts, axis=1)
        assert (revealed >= 0).all()
        for number in range(rounds, 13):
            assert tuple(revealed[number]) == schedule.sizes(number, rounds)
        for number in range(rounds):
            np.testing.assert_array_equal(revealed[number], np.arange(rounds) < number)


def test_masked_after_of_written_sizes():
    for schedule in (Fixed((3, 4, 1)), optimal(CHAIN)):
        row = masked_after(schedule, 8, 3)[8]
        np.testing.assert_array_equal(row, 8 - np.cumsum(schedule.sizes(8, 3)))


def test_the_command_line_knows_every_schedule():
    assert typing.get_args(ScheduleName) == tuple(SCHEDULES)


def test_choices_load_no_jax():
    modules = ("masked", "masked.config", "masked.schedules", "parallel", "parallel.config")
    imports = "; ".join(f"import gen_jax.models.{name}" for name in modules)
    code = f"import sys; {imports}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_equal_schedules_are_one():
    assert len({Cosine(), Cosine(), Power(1.0), SCHEDULES["linear"]}) == 2
    assert hash(optimal(CHAIN)) == hash(optimal(CHAIN))


@pytest.mark.parametrize(
    "schedule", [Cosine(), Fixed((8,)), optimal(CHAIN), Power()], ids=lambda s: type(s).__name__
)
@unchecked_annotations()
def test_impossible_rounds(schedule):
    after = functools.partial(masked_after, schedule)
    for call in (schedule.sizes, schedule.check, after, check_rounds):
        with pytest.raises(ValueError, match=r"^the number of rounds must be at least 1, got 0$"):
            call(8, 0)
        with pytest.raises(ValueError, match=r"^9 rounds are more than the 8 positions: .*most 8$"):
            call(8, 9)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Fixed((2, 2)).sizes(5, 2), r"^\(2, 2\) is a schedule of 2 .* not of 2 over 5$"),
        (lambda: Fixed((2, 2)).sizes(4, 3), r"not of 3 over 4$"),
        (lambda: Fixed((2, 0)), r"at least one position, got \(2, 0\)$"),
        (lambda: Fixed(()), r"at least one position, got \(\)$"),
        (lambda: optimal(CHAIN).sizes(7, 2), r"^this profile is of 8 positions, not 7$"),
        (lambda: Fixed((2, 1.5)), r"^groups must be a tuple of which each entry is a whole number"),
        (lambda: Optimal((0.0,)), r"^a profile has at least two values"),
        (lambda: Optimal((0.0, float("nan"))), r"^profile must be .* each entry is finite"),
        (lambda: Power(0.0), r"^the exponent must be above 0, got 0\.0$"),
        (lambda: Power(float("inf")), r"^exponent must be finite, got inf$"),
    ],
)
@unchecked_annotations()
def test_what_is_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()
