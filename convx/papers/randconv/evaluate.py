"""How far the random filters of a network reach: the spans of its blocks of linear combinations (arXiv 2301.11360).

Accuracy, attacks and the look of the filters are measured by convx.evaluate on every network; this adds what only these
blocks have.
"""

from torch import nn

from convx.evaluate import EvaluationData, Result, row
from convx.layers.linear_combination import LinearCombinationConv2d

METHOD = "number of filters over the weights of one filter; from 1 on random filters span every kernel"


def span_ratios(model: nn.Module) -> dict[str, float]:
    """Return {layer: M / (c_in k_h k_w)} of the blocks that are one convolution, M = c_out E random filters.

    With random filters the relative distance of a random kernel from their span is sqrt(1 - ratio), and 0 from 1 on; in the
    depthwise form a block counts the filters of one input channel against k_h k_w.
    """
    ratios = {}
    for name, module in model.named_modules():
        if isinstance(module, LinearCombinationConv2d) and module.foldable:
            height, width = module.kernel_size
            depthwise = module.form == "depthwise"
            filters = module.filters // (module.in_channels if depthwise else module.groups)
            weights = height * width * (1 if depthwise else module.in_channels // module.groups)
            ratios[name] = filters / weights
    return ratios


def run(model: nn.Module, recipe: dict, data: EvaluationData) -> Result:
    """Return ``span_ratio`` (least and median of n layers) and ``spanned_layers`` (percent); nothing without blocks."""
    ratios = sorted(span_ratios(model).values())
    if not ratios:
        return Result([])
    middle = (ratios[(len(ratios) - 1) // 2] + ratios[len(ratios) // 2]) / 2
    spanned = 100 * sum(ratio >= 1 for ratio in ratios) / len(ratios)
    return Result(
        [
            row("span_ratio", ratios[0], "ratio", n=len(ratios), method=METHOD, statistic="min"),
            row("span_ratio", middle, "ratio", n=len(ratios), method=METHOD, statistic="median"),
            row("spanned_layers", spanned, "%", n=len(ratios), method=f"layers of ratio 1 or more: {METHOD}"),
        ]
    )
