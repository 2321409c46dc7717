"""Data sets as arrays on disk: where they come from, how they are prepared, how they are opened. No torch.

``prepare`` writes a set once, ``open_set`` maps it into memory, ``describe_sets`` lists what there is.
"""

from convx.data.prepare import DataSet, open_set, prepare
from convx.data.sets import SETS, describe_sets

__all__ = ["SETS", "DataSet", "describe_sets", "open_set", "prepare"]
