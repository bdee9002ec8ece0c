# SPDX-License-Identifier: Apache-2.0
"""Which versions of driver, runtime, compiler and NKI don't go together, and where they are read from."""

from pathlib import Path

import pytest

from neuron_paged.neuron_versions import neff_problems, system_versions, version_problems

GOOD = {
    "driver": "2.30.2.0", "runtime": "2.34.10.0-1a2b3c", "compiler": "2.27.5334.0+abc", "nki": "0.6.0", "nrtpy": None
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"driver": "2.19.64.0"}, "need a driver after 2.26"),
        ({"driver": "2.26.5.0"}, "need a driver after 2.26"),
        ({"driver": "2.26.5.0", "runtime": "2.31.1.0"}, None),
        ({"nki": "0.4.0"}, "nki 0.4.0 belongs to SDK 2.30"),
        ({"nki": "0.5.0+28631259367.ga768afa6"}, "nki 0.5.0+28631259367.ga768afa6 belongs to SDK 2.31"),
        ({"compiler": "2.15.1.0"}, "not a release this version knows"),
        ({"compiler": "nonsense", "driver": None, "nki": None}, None),
        ({"nki": None, "nrtpy": "2.34.10"}, None),
        ({"nki": None, "nrtpy": "2.33.10"}, "nrtpy 2.33.10 with runtime 2.34.10.0-1a2b3c: their versions must match"),
        ({"nrtpy": "2.34.10"}, "nrtpy and nki in one environment"),
        ({}, None),
    ],
)
def test_problems(changes: dict, says: str | None) -> None:
    found = version_problems(**(GOOD | changes))
    assert found == [] if says is None else len(found) == 1 and says in found[0]


def test_a_neff_of_a_newer_sdk_than_the_runtimes() -> None:
    [line] = neff_problems("2.27.5334.0", "2.31.24.0")
    assert "neuronx-cc 2.27.5334.0 (SDK 2.32) → runtime 2.31.24.0 (SDK 2.29)" in line
    assert neff_problems("2.24.8799.0", "2.34.10.0") == neff_problems("2.27.5334.0", "2.34.10.0") == []
    assert neff_problems("2.27.5334.0", None) == neff_problems("9.9.9", "2.34.10.0") == []


def test_the_loaded_driver_names_its_version(tmp_path: Path) -> None:
    (tmp_path / "version").write_text("2.19.64.0\n")
    assert system_versions(tmp_path / "version")["driver"] == "2.19.64.0"
    assert set(system_versions(tmp_path / "none")) == {"driver", "runtime"}
