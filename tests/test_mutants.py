"""The mutations of mutants.py still fit the scripts and the tests; see there for running them."""

import mutants
import pytest


def test_mutations_fit_the_scripts_and_the_tests():
    """Old texts, tests and syntax; every script and most shared blocks have some."""
    assert mutants.complaints() == []
    names, places = zip(*[(m.name, m.place) for m in mutants.MUTANTS], strict=True)
    assert len(set(names)) == len(names) >= 40
    assert {"gsflow", "flowq", "fmq", "sac_flow", "online", "runs", "data"} <= set(places)


@pytest.mark.parametrize(
    "changes,sentence",
    [
        (dict(old="self.evals[-4:]"), "last-three: 'self.evals[-4:]' occurs 0 times in flowq.py"),
        (dict(old="self."), "times in flowq.py"),
        (dict(place="walks"), "last-three: no script or shared block is called 'walks'"),
        (dict(new="self.evals[:3"), "last-three: "),
        (dict(tests="test_wiring::test_no"), "there is no test tests/test_wiring.py::test_no"),
    ],
)
def test_what_no_longer_fits_is_said(changes, sentence):
    (mutant,) = (m for m in mutants.MUTANTS if m.name == "last-three")
    (found,) = mutants.complaints(mutants=[mutant._replace(**changes)])
    assert sentence in found
