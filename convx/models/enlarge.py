"""Enlarging images inside a model, on their device: 32 px sets for networks that want 224, with nothing enlarged on disk."""

import torch.nn.functional as F
from torch import Tensor, nn


class Enlarge:
    """Bilinear resize of [N, C, H, W] to ``size`` x ``size``; images of that size pass. It holds no weights.

    :meth:`attach` lets a module do it to its first argument whenever it is called; state dict and type stay as they are.
    A caller that goes past the module's ``forward`` finds it as ``module.enlarge`` and calls it itself.
    """

    def __init__(self, size: int):
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"input_size={size!r} should be a whole number of pixels")
        self.size = size

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[-2:] == (self.size, self.size):
            return x
        return F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False)

    def attach(self, module: nn.Module) -> nn.Module:
        """Return the module, which now enlarges what it is given."""
        module.enlarge = self
        module.register_forward_pre_hook(self._before)
        return module

    def _before(self, module: nn.Module, arguments: tuple) -> tuple:
        return (self(arguments[0]), *arguments[1:])
