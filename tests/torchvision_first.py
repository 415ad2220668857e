"""Lets `import torchvision`, and so `import timm`, come first where torchvision was built for another torch.

`make` puts this file into its environment, with a .pth file that imports it at every start. It does nothing until
torchvision is looked for. The package itself needs it not: `import advdpnp` does the same, if it comes first.
"""
import sys
from importlib.machinery import PathFinder
from pathlib import Path


class First:
    "A finder that finds nothing, and looks at torchvision's operators before it is imported."

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare_operators()


def declare_operators():
    "Declare the operators that torchvision looks up, unless its own can be loaded."
    import torch

    found = PathFinder.find_spec("torchvision")
    try:
        for library in Path(found.origin).parent.glob("_C*.so") if found else ():
            torch.ops.load_library(str(library))
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, First())
