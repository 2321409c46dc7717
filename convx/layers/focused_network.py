"""A network with focused convolutions: which layer the focus follows, and how images, boxes and reports get there."""

import torch
from torch import nn

from .focused import Focus, Found
from .focused_carrier import Passing, plain
from .focused_regions import Region, scaled


class _Hook:
    def __init__(self, focus: Focus, owner: nn.Module):
        self.focus, self.owner = focus, owner

    def __call__(self, module, args, output):
        return self.focus(output) if int(self.owner.depth) == self.focus.place_in_order else None


class Focused(nn.Module):
    """A network whose layers after ``after`` are focused: images [B, C, H, W] in, what the network returns out.

    ``after`` may name several layers, of which ``depth`` (a buffer, set by calibration) is the one in use.
    ``forward(x, boxes=None, report=None)``: ``boxes`` [B, 4] (left, top, right, bottom in pixels of x, the last two
    exclusive) for ``place="given"``; ``report`` is a list that gets the :class:`Region` at the insertion point and, after it,
    the notes of ``OfficialMap``. ``dense(x)`` is the network without focus.
    """

    input_dependent = True  # cost and latency depend on the pixels: measure them on images

    def __init__(self, model: nn.Module, after: list[str], threshold: float | None = None, **settings):
        super().__init__()
        self.model, self.after = model, list(after)
        self.register_buffer("depth", torch.tensor(0))
        self.focus = nn.ModuleList(Focus(threshold, k, **settings) for k in range(len(self.after)))
        for name, focus in zip(self.after, self.focus):
            model.get_submodule(name).register_forward_hook(_Hook(focus, self))

    @property
    def takes_boxes(self) -> bool:
        return self.focus[0].settings["place"].startswith("given")

    @property
    def whole(self) -> bool:
        """Tell whether nothing is skipped."""
        return self.focus[0].settings["region"] == "whole"

    def forward(self, x, boxes=None, report: list | None = None):
        if boxes is None and report is None and self.focus[0].settings["region"] != "input":
            return plain(self.model(x))
        try:
            out = self.model(Passing(x, boxes, report=report, source=tuple(x.shape[2:])))
        except Found as found:
            return self._of_crops(x, found.found)
        return plain(out)

    def _of_crops(self, x, region: Region):
        """Return the outputs for the images cropped to their boxes, each computed alone from the first layer on."""
        rows = []
        for image, box in zip(x, region.boxes):
            y1, y2, x1, x2 = scaled(box, region.size, tuple(x.shape[2:]))
            rows.append(self.dense(image[None, :, y1:y2, x1:x2]))
        return torch.cat(rows)

    def dense(self, x):
        """Return the outputs of the network without focus."""
        return plain(self.model(Passing(x, dense=True)))

    def change(self, settings: dict, threshold: float | None = None) -> None:
        """Change settings of the focus, and the threshold where one is given."""
        for focus in self.focus:
            focus.settings |= settings
            if threshold is not None:
                focus.threshold.fill_(threshold)

    def tune(self, x) -> float:
        """Measure costs with one image x [1, C, H, W] on this machine and plan by them; return the break-even share.

        Crops are grouped by the measured table, which changes no output. Images whose region is above the break-even share
        are computed densely from now on, so that focus is never slower than the dense network by more than the region
        costs; their outputs are then those of the network without focus.
        """
        from .focused_costs import break_even, cost_table, layer_costs

        table = cost_table(layer_costs(self, x))
        for focus in self.focus:
            focus.costs = table
        most = break_even(self, x)
        for focus in self.focus:
            focus.settings["dense_above"] = min(most, focus.settings["dense_above"])
        return most

    def region(self, x, boxes=None) -> Region:
        """Return the regions of a batch at the insertion point; what follows it is not computed."""
        return self._early(x, boxes, "region")

    def with_region(self, x, boxes=None):
        """Return (outputs, :class:`Region` at the insertion point, notes of ``OfficialMap``) of a batch, in one pass."""
        report: list = []
        out = self(x, boxes, report)
        return out, report[0], report[1:]

    def brightness(self, x) -> torch.Tensor:
        """Return the brightness [B, H, W] that the threshold is compared with."""
        return self._early(x, None, "brightness")

    def activations(self, x) -> torch.Tensor:
        """Return the map [B, C, H, W] that the focus is put on."""
        return self._early(x, None, "activations")

    def _early(self, x, boxes, what: str):
        try:
            self.model(Passing(x, boxes, source=tuple(x.shape[2:]), stop=what))
        except Found as found:
            return found.found
        raise ValueError(f"after: {self.after[int(self.depth)]} did not run")
