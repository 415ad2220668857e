"The search behind the presets, from its log."
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_presets_are_what_the_log_says(tmp_path):
    "The notebook asserts it; a log that is complete means that nothing is trained."
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "data/results/figure1.quick.csv", tmp_path / "results")
    command = [Path(sys.executable).parent / "papermill", "nbs/figure1.ipynb", tmp_path / "out.ipynb", "-p", "data_dir", tmp_path, "-p", "device", "cpu", "--no-progress-bar"]
    done = subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "results/figure1.quick.csv").read_bytes() == (ROOT / "data/results/figure1.quick.csv").read_bytes()
    assert (tmp_path / "results/figure1.quick.png").exists() and not (tmp_path / "runs").exists()
