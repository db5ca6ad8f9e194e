"""A small run whose counts are written down: a change that should not alter results leaves them alone.

One that should alter them says so in CHANGELOG.md and writes them again: FEDSIM_WRITE_GOLDEN=1 pytest this file.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim import run
from fedsim.params import flatten
from fedsim.training.client_store import PrivateStore

GOLDEN = Path(__file__).with_name("golden.json")
RUNS = {
    "fedclip": {"method": {"name": "fedclip", "lr": 1e-3, "weight_decay": 0.0}},
    "probe under fedadam": {
        "method": "probe",
        "server": "fedadam",
        "partition": "dirichlet",
        "clients": 6,
        "cohort": 4,
    },
    "local only": {"server": "local_only", "clients": 4},
}


@pytest.mark.parametrize("name", RUNS)
def test_results_are_those_that_were_written_down(name, config):
    ours = config(**RUNS[name])
    report = run(ours)
    private = PrivateStore(ours.folder() / "private")
    own = {f"client_{k}": torch.from_numpy(flatten(private.read(k, r))) for k, r in enumerate(report.private)}
    ours = {
        "scores": [[round, *row[:5]] for round, counts in report.counts.items() for row in counts.scores.tolist()],
        "adapter": [float(f"{value:.5g}") for value in np.abs(flatten(report.adapter | own)[:: 50]).tolist()],
    }  # fmt: skip
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    if os.environ.get("FEDSIM_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps(golden | {name: ours}) + "\n")
        golden[name] = ours
    assert ours["scores"] == golden[name]["scores"]
    # Other processors round otherwise; the counts above should not feel that.
    np.testing.assert_allclose(ours["adapter"], golden[name]["adapter"], rtol=1e-3, atol=1e-5)
