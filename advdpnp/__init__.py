import importlib

__version__ = "0.1.0"

# A torchvision built for CUDA beside a CPU-only torch cannot load its compiled operators, and then `import torchvision`
# (so `import timm`) stops at the first operator it looks up. Declaring the two it looks up lets the rest of it import.
try:
    import torchvision  # noqa: F401
except RuntimeError as error:
    if "torchvision::nms" not in str(error):
        raise
    import torch

    for _name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{_name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision  # noqa: F401

_NAMES = {  # by module: `advdpnp.PGD` imports advdpnp.attacks when it is asked for
    "prototypes": "PrototypeHead PrototypeNet LinearNet",
    "losses": "positive_alignment negative_repulsion consistency",
    "attacks": "ThreatModel FGSM PGD CW PrototypePGD",
    "methods": "AdvDPNP TRADES METHODS", "training": "Trainer",
    "evaluation": "evaluate", "autoattack": "AutoAttack", "geometry": "discriminability",
    "data": "Dataset load_dataset",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name):
    if name not in _MODULES:
        raise AttributeError(f"module 'advdpnp' has no attribute {name!r}")
    return getattr(importlib.import_module(f"advdpnp.{_MODULES[name]}"), name)


def __dir__():
    return sorted({*globals(), *_MODULES})
