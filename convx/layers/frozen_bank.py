"""A bank of filters that a checkpoint stores as its seed (the corollary of frozen random filters, arXiv
2301.11360).

A frozen bank is no parameter and not in the state dict, which holds ``key`` = (seed, checksum) instead:
loading redraws the filters and compares. They stay float32 under ``half()`` and ``bfloat16()``: bits that are
lost could not be redrawn, and under a lower precision the layer casts what it uses, not what it keeps.
"""

import torch
from torch import Tensor, nn

from .filter_banks import draw_bank


def checksum(filters: Tensor) -> int:
    """Return the sum of the float32 bit patterns, whatever the device and the order of summation."""
    return int(filters.detach().float().contiguous().view(torch.int32).sum(dtype=torch.int64))


class FilterBank(nn.Module):
    """Filters [M, c, k_h, k_w] as ``filters``: a buffer drawn from a seed; unless ``frozen``, a parameter.

    ``shared_shape`` and ``root``: see ``draw_bank``; the root is data and is stored with the key.
    """

    def __init__(
        self,
        kind: str,
        shape: tuple[int, int, int, int],
        seed: int,
        frozen: bool = True,
        shared_shape: tuple[int, int] | None = None,
        root: Tensor | None = None,
    ):
        super().__init__()
        self.kind, self.shape, self.frozen, self.shared_shape = kind, shape, frozen, shared_shape
        drawn = draw_bank(kind, shape, seed, shared_shape, root)
        if frozen:
            self.register_buffer("filters", drawn, persistent=False)
            self.register_buffer("key", torch.tensor([seed, checksum(drawn)], device="cpu"))
            self.register_buffer("root", root)
        else:
            self.filters = nn.Parameter(drawn)

    def _apply(self, fn, recurse=True):
        kept = {name: self._buffers.get(name) for name in ("filters", "root")}
        super()._apply(fn, recurse)
        for name, tensor in kept.items():
            if tensor is not None and self._buffers[name].dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = tensor.to(self._buffers[name].device)
        if not self.filters.is_contiguous():  # memory_format: the product A F would copy it in each step
            self.filters.data = self.filters.data.contiguous()
        return self

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        if not self.frozen or prefix + "key" not in state_dict:
            return
        seed, expected = state_dict[prefix + "key"].tolist()
        if not self.filters.is_meta and checksum(self.filters) == expected:
            return
        drawn = draw_bank(self.kind, self.shape, seed, self.shared_shape, self.root)
        if checksum(drawn) != expected:
            errors.append(f"{prefix}key: here seed {seed} draws another {self.kind} bank than the one that was saved")
            return
        device = self.key.device if self.filters.is_meta else self.filters.device
        self.filters = drawn.to(device, self.filters.dtype)

    def extra_repr(self) -> str:
        """Return kind and shape in one line."""
        return f"{self.kind}, {self.shape}, frozen={self.frozen}"
