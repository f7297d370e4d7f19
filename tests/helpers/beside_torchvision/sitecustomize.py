"""On PYTHONPATH, for processes that import PyPI's torchvision beside torch's CPU build.

That torchvision's own library is for CUDA and can't be loaded; what it says of the shapes of two
operators in it fails where they aren't known. Nothing here computes with them.
"""

import sys
from importlib.abc import MetaPathFinder


class _Declared(MetaPathFinder):
    """Declares the operators when torchvision is first looked for, and finds nothing itself."""

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        import torch

        self.library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            self.library.define(
                f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        sys.modules[__name__].declared = self  # kept, and the library with it
        return None


sys.meta_path.insert(0, _Declared())
