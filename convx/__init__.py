"""convx: does this idea about convolutions hold up when everything is run side by side?

The public verbs take any ``nn.Module`` and return a new one with layers swapped; they are imported on first use, so that
``import convx`` stays free of torch (2-4 s) for the workflow and the command line.
"""

from importlib import import_module

__version__ = "0.1.0"

VERBS = (
    "recast_attention",
    "freeze_spatial",
    "linear_combinations",
    "learnable_spacings",
    "freeze_spacings",
    "focus",
    "agent_of",
    "fold",
    "custom",
)
__all__ = [*VERBS, "__version__"]


def __getattr__(name: str):
    if name in VERBS:
        return getattr(import_module("convx.surgery"), name)
    raise AttributeError(f"module 'convx' has no attribute {name!r}; the verbs are {', '.join(VERBS)}")


def __dir__():
    return sorted(__all__)
