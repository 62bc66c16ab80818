"""Seeded faults are found, and healthy networks have no findings: a part by default, all of it with `-m slow`.

`python -m benchmarks.doctor_corpus` makes the table in the docs from the same corpus.
"""

from collections.abc import Callable

import pytest
import torch

from batchnorm import diagnose
from tests.doctor.faults import faults
from tests.doctor.healthy import healthy

# The default part holds every code. The other cases are slow, because many train a network.
_EVERY_FAULT, _EVERY_HEALTHY = 11, 9


def _cases(corpus, every: int) -> list:
    """Return all cases. Those outside the default part, which has the first case of each code, are marked slow."""
    seen, cases = set(), []
    for number, case in enumerate(corpus):
        first = len(case) == 3 and case[1] not in seen
        seen.add(case[1])
        mark = () if first or number % every == 0 else (pytest.mark.slow,)
        cases.append(pytest.param(*case[1:], id=case[0], marks=mark))
    return cases


@pytest.mark.parametrize(("code", "call"), _cases(faults(), _EVERY_FAULT))
def test_a_fault_is_found(code: str, call: Callable):
    found = [finding for finding in diagnose(**call()).findings if finding.code == code]
    assert found
    for finding in found:
        assert finding.evidence
        assert finding.fix
        assert finding.false_alarm
        assert (finding.severity == "info") == (code in ("BN104", "BN402"))


@pytest.mark.parametrize("call", _cases(healthy(), _EVERY_HEALTHY))
def test_a_healthy_network_is_left_in_peace(call: Callable):
    diagnosis = diagnose(**call())
    assert [str(f) for f in diagnosis.findings if f.severity != "info"] == []


def _of_transformers(which: str) -> list:
    pytest.importorskip("transformers", reason="a development dependency: pip install 'batchnorm[dev]'")
    from tests.doctor import pretrained

    return list(getattr(pretrained, which)())


def test_transformers_networks_are_left_in_peace():
    for name, call in _of_transformers("healthy"):
        torch.manual_seed(0)
        alarms = [str(f) for f in diagnose(**call()).findings if f.severity != "info"]
        # Some stages have one pixel. There BN201 is right: sixteen samples are sixteen values.
        assert [a for a in alarms if not a.startswith("BN201")] == [], name


def test_faults_in_transformers_networks_are_found():
    for name, code, call in _of_transformers("faults"):
        assert code in diagnose(**call()).codes, name
