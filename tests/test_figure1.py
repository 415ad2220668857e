"The search behind the presets, from its log."
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("preset", ["quick", "small"])
def test_the_presets_are_what_the_log_says(tmp_path, preset):
    "The notebook asserts it; a log that is complete means that nothing is trained."
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / f"data/results/figure1.{preset}.csv", tmp_path / "results")
    command = [Path(sys.executable).parent / "papermill", "nbs/figure1.ipynb", tmp_path / "out.ipynb", "-p", "data_dir",
               tmp_path, "-p", "device", "cpu", "-p", "preset", preset, "--no-progress-bar"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / f"results/figure1.{preset}.csv").read_bytes() == (
        ROOT / f"data/results/figure1.{preset}.csv"
    ).read_bytes()
    assert (tmp_path / f"results/figure1.{preset}.png").exists() and not (tmp_path / "runs").exists()
