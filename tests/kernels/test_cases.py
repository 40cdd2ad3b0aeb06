"""Every implementation of every operation computes the cases of the operation, or refuses them."""

import dataclasses

import jax
import pytest

from kernels import dispatch, testing

SUITES = testing.suites()
CASES = [
    pytest.param(suite, case, id=f"{suite.op}: {case}")
    for suite in SUITES.values()
    for case in suite.cases
]


def assert_agrees_or_refuses(suite, case, name):
    """Whether it computes the case; where it does not, that a forced call says why."""
    reason = testing.check(suite, case, name)
    if reason is None:
        return True
    assert name != "reference", "the reference refuses nothing"
    assert reason.split()[0] in ("needs", "has", "takes", "knows"), reason
    assert "\n" not in reason
    return False


@pytest.mark.parametrize(("suite", "case"), CASES)
def test_every_implementation_agrees_or_says_why_not(suite, case):
    for name in suite.implementations():
        assert_agrees_or_refuses(suite, case, name)


def test_every_operation_has_cases_with_names_of_their_own():
    assert SUITES.keys() == dispatch.operations().keys()
    for suite in SUITES.values():
        for cases in (suite.cases, suite.timed):
            assert cases
            assert len({str(case) for case in cases}) == len(cases)


@pytest.mark.parametrize("op", SUITES)
def test_every_implementation_computes_a_case(op):
    suite = SUITES[op]
    for name, entry in suite.implementations().items():
        with testing.interpreted_elsewhere(entry):
            assert any(computes(suite, case, name) for case in suite.cases), name


def computes(suite, case, name):
    def run(*arguments, **options):
        return suite.call(*arguments, implementation=name, **options)

    jitted, arrays = testing.program(run, case)
    try:
        jitted.trace(*arrays)
    except dispatch.Refusal:
        return False
    return True


def test_a_wrong_implementation_fails_its_cases(monkeypatch):
    suite = SUITES["keep_most_confident"]
    entries = dict(dispatch._REGISTRY[suite.op])
    monkeypatch.setitem(dispatch._REGISTRY, suite.op, entries)

    @dispatch.register(suite.op, "wrong")
    def one_too_many(confidence, count):
        return entries["reference"].run(confidence, count + 1)

    with pytest.raises(AssertionError, match="keep_most_confident, 64 x 64, wrong: not as defined"):
        testing.check(suite, suite.cases[1], "wrong")


def test_a_wrong_dtype_fails(monkeypatch):
    suite = SUITES["group_norm_silu"]
    entries = dict(dispatch._REGISTRY[suite.op])
    monkeypatch.setitem(dispatch._REGISTRY, suite.op, entries)
    run = entries["reference"].run

    @dispatch.register(suite.op, "wrong")
    def in_half_precision(x, *rest, **options):
        return run(x, *rest, **options).astype("bfloat16")

    loose = dataclasses.replace(suite.cases[0], atol=1.0)
    with pytest.raises(AssertionError, match="wrong: not the reference: bfloat16 is not float32"):
        testing.check(suite, loose, "wrong")


def test_a_wrong_gradient_fails(monkeypatch):
    suite = SUITES["group_norm_silu"]
    entries = dict(dispatch._REGISTRY[suite.op])
    monkeypatch.setitem(dispatch._REGISTRY, suite.op, entries)
    run = entries["reference"].run

    @dispatch.register(suite.op, "wrong")
    def without_the_gradient_of_the_scale(x, scale, bias, **options):
        return run(x, jax.lax.stop_gradient(scale), bias, **options)

    case = next(case for case in suite.cases if case.gradient)
    with pytest.raises(AssertionError, match="gradients, wrong: gradient"):
        testing.check(suite, case, "wrong")
