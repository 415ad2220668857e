"Curves for TensorBoard, read back as TensorBoard reads them."
import pytest

from advdpnp.runs import Ledger, make_config
from advdpnp.training import Trainer

from conftest import TINY

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")


def test_curves_have_each_epoch_once_whatever_interrupts_the_run(tmp_path, monkeypatch):
    config = make_config("PGD-AT", "quick", device="cpu", **TINY | dict(epochs=4, val_size=40))
    ledger = Ledger(tmp_path, "cpu", quiet=True, tensorboard=True)
    real, killed = Trainer._save, []

    def save(self, last=None):
        real(self, last)
        if last is not None and self.epoch == 2 and not killed:  # between the checkpoint and the hook
            killed.append(True)
            raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "_save", save)
    with pytest.raises(KeyboardInterrupt):
        ledger.train(config)
    assert ledger.train(config) and killed
    read = accumulator.EventAccumulator(str(ledger.folder(config) / "tensorboard"))
    read.Reload()
    assert {"loss", "adv_ce", "clean", "robust", "rate"} <= {*read.Tags()["scalars"]}
    for name in read.Tags()["scalars"]:
        assert [event.step for event in read.Scalars(name)] == [1, 2, 3, 4], name
    trainer = ledger.trainer(config)
    assert [event.value for event in read.Scalars("robust")] == pytest.approx([h["robust"] for h in trainer.history])
    assert [event.step for event in read.Images("adversarial")] == [4]


def test_curves_change_nothing(tmp_path):
    config = make_config("PGD-AT", "quick", device="cpu", **TINY)
    sums = []
    for tensorboard in (False, True):
        ledger = Ledger(tmp_path / str(tensorboard), "cpu", quiet=True, tensorboard=tensorboard)
        ledger.train(config)
        sums.append(ledger.sha256(config, "last"))
    assert sums[0] == sums[1]
