"The search behind the presets, from its log."
import shutil

import pytest
from pages import ROOT, run_page


@pytest.mark.parametrize("preset", ["quick", "small"])
def test_the_presets_are_what_the_log_says(tmp_path, preset):
    "The page asserts it; a log that is complete means that nothing is trained."
    (tmp_path / "results").mkdir()
    log = f"results/figure1.{preset}.csv"
    shutil.copy(ROOT / "data" / log, tmp_path / log)
    found = run_page("figure1", data_dir=str(tmp_path), device="cpu", preset=preset)
    assert {*found["best"].index} == {"PGD-AT", "TRADES", "MART", "dual-branch linear", "Adv-DPNP"}
    assert (tmp_path / log).read_bytes() == (ROOT / "data" / log).read_bytes()
    assert (tmp_path / f"results/figure1.{preset}.png").exists() and not (tmp_path / "runs").exists()
