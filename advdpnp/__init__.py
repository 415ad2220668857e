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
