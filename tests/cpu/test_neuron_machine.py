# SPDX-License-Identifier: Apache-2.0
"""Which bundles a machine takes, by the variables that AWS documents."""

import pytest

from neuron_paged.collect_env import instance_type
from neuron_paged.errors import GraphError
from neuron_paged.neuron_machine import neuron_machine

TARGET, CORES = "NEURON_PLATFORM_TARGET_OVERRIDE", "NEURON_LOGICAL_NC_CONFIG"


@pytest.mark.parametrize(
    ("named", "cores", "found"),
    [("inf2", None, ("inf2", 1)), ("trn2", "1", ("trn2", 1)), ("gen3", None, ("trn2", 2)), ("gen4", "2", ("trn3", 2))],
)
def test_the_variables_name_target_and_lnc(
    monkeypatch: pytest.MonkeyPatch, named: str, cores: str | None, found: tuple[str, int]
) -> None:
    monkeypatch.setenv(TARGET, named)
    monkeypatch.delenv(CORES, raising=False) if cores is None else monkeypatch.setenv(CORES, cores)
    machine = neuron_machine()
    assert (machine.target, machine.lnc) == found


@pytest.mark.parametrize(
    ("named", "cores", "says"),
    [
        ("gen2", None, f"got {TARGET}=gen2, need one of trn1, inf2, trn2, trn3"),  # trn1 or inf2
        ("trn2", "two", f"{CORES}: got 'two', need a number of cores"),
        ("trn1", "2", f"{CORES}: got '2': lnc: got 2 for trn1, need 1"),
    ],
)
def test_what_they_can_not_say(monkeypatch: pytest.MonkeyPatch, named: str, cores: str | None, says: str) -> None:
    monkeypatch.setenv(TARGET, named)
    monkeypatch.delenv(CORES, raising=False) if cores is None else monkeypatch.setenv(CORES, cores)
    if named == "gen2" and (instance_type() or "").startswith(("trn1", "inf2")):
        pytest.skip("this instance says which of the two it is")
    with pytest.raises(GraphError, match=says):
        neuron_machine()
