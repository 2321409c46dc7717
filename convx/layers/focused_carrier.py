"""Values that flow through unmodified networks in place of tensors: torch calls them back for each of its functions."""

import torch


class Carrier:
    """Base of what stands in for a tensor of shape [B, C, H, W] between two modules.

    Every torch function, method and operator that meets one calls ``handle(function, args, kwargs)`` of the class; nothing
    is stored in the modules it passes through, so that threads do not see each other. ``tensor()`` is the whole map.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        return cls.handle(function, args, kwargs or {})

    @classmethod
    def handle(cls, function, args: tuple, kwargs: dict):
        raise NotImplementedError

    def tensor(self) -> torch.Tensor:
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return len(self.shape)

    ndim = property(dim)

    def __getattr__(self, name: str):
        method = getattr(torch.Tensor, name, None)
        if name.startswith("__") or not callable(method):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return lambda *args, **kwargs: self.handle(method, (self, *args), kwargs)

    def __getitem__(self, key):
        return self.tensor()[key]


def _operator(name: str):
    method = getattr(torch.Tensor, name)
    return lambda self, other: self.handle(method, (self, other), {})


for _name in ("add", "radd", "iadd", "mul", "rmul", "imul", "sub", "rsub", "isub", "truediv", "itruediv", "pow"):
    setattr(Carrier, f"__{_name}__", _operator(f"__{_name}__"))


def plain(value):
    """Return a value, or the values in a list or tuple, with every carrier replaced by its whole map."""
    if isinstance(value, Carrier):
        return value.tensor()
    return type(value)(plain(part) for part in value) if type(value) in (list, tuple) else value


class Passing(Carrier):
    """A plain tensor on its way to the insertion point, with the boxes of its images, or with the word to stay dense."""

    def __init__(
        self, values: torch.Tensor, boxes=None, dense=False, report: list | None = None, source=None, stop=None
    ):
        self.values, self.boxes, self.dense, self.report = values, boxes, dense, report
        self.source, self.stop = source, stop

    def tensor(self) -> torch.Tensor:
        return self.values

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    dtype = property(lambda self: self.values.dtype)
    device = property(lambda self: self.values.device)
    requires_grad = property(lambda self: self.values.requires_grad)

    @classmethod
    def handle(cls, function, args, kwargs):
        first = next(a for a in _flat(args) + _flat(tuple(kwargs.values())) if isinstance(a, Passing))
        out = function(*plain(args), **{key: plain(value) for key, value in kwargs.items()})
        if isinstance(out, torch.Tensor) and out.dim() == 4:
            return cls(out, first.boxes, first.dense, first.report, first.source, first.stop)
        return out


def _flat(values) -> list:
    return [p for v in values for p in (_flat(v) if isinstance(v, list | tuple) else [v])]


class Pooled(Carrier):
    """A map pooled in cells without padding, of which only the windows that are asked for are computed.

    After the insertion point the whole map is true, but of its pooled form the first convolution sees the region and a halo.
    A window inside the last one of the same images comes from it; a second one elsewhere makes the whole map, once.
    """

    def __init__(self, source: torch.Tensor, size: tuple[int, int], kernel, stride, pool):
        self.source, self.kernel, self.step, self.pool = source, kernel, stride, pool
        self._shape = torch.Size((*source.shape[:2], *size))
        self._whole: torch.Tensor | None = None
        self._windows: dict = {}

    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self.source.dtype)
    device = property(lambda self: self.source.device)
    requires_grad = property(lambda self: self.source.requires_grad)

    def stride(self, dim: int) -> int:
        """Return the stride over channels (dim 1), which tells the memory format; pooling keeps it."""
        return self.source.stride(dim)

    @classmethod
    def handle(cls, function, args, kwargs):
        return function(*plain(args), **{key: plain(value) for key, value in kwargs.items()})

    def tensor(self) -> torch.Tensor:
        if self._whole is None:
            self._whole = self.pool(self.source)
        return self._whole

    def __getitem__(self, key):
        if self._whole is not None or not isinstance(key, tuple) or len(key) != 4 or key[1] != slice(None):
            return self.tensor()[key]
        images, _, *sides = key
        (y1, y2, _), (x1, x2, _) = (side.indices(n) for side, n in zip(sides, self._shape[2:]))
        of = images if isinstance(images, int) else images.indices(len(self.source))
        if of in self._windows:
            (v1, v2, u1, u2), window = self._windows[of]
            if v1 <= y1 and y2 <= v2 and u1 <= x1 and x2 <= u2:
                return window[..., y1 - v1 : y2 - v1, x1 - u1 : x2 - u1]
            return self.tensor()[key]
        (ky, kx), (sy, sx) = self.kernel, self.step
        part = self.source[images, :, y1 * sy : (y2 - 1) * sy + ky, x1 * sx : (x2 - 1) * sx + kx]
        self._windows[of] = (y1, y2, x1, x2), self.pool(part)
        return self._windows[of][1]
