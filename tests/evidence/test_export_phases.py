"""The division of an export's time into phases: every phase is there, and together they are the process's time."""

from __future__ import annotations

import two_layers
from evidence.export_phases import PHASES, phases, table

checkpoint = two_layers.checkpoint


def test_the_phases_of_an_export_are_all_measured(checkpoint, tmp_path):
    found = phases(checkpoint, tmp_path, 1)
    assert list(found) == list(PHASES)
    assert [len(values) for values in found.values()] == [1] * len(PHASES)
    assert min(values[0] for values in found.values()) > 0, "weights are copied in a thread of their own, too"
    lines = table({phase: [1.0, 3.0, 2.0] for phase in PHASES})
    assert lines[2] == "| interpreter | 2.00 | 11% |"
    assert lines[-1] == "| together | 18.00 | |"
