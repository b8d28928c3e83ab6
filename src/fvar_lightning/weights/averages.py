"""Averaged and raw weights: where a checkpoint of Lightning's `EMAWeightAveraging` keeps which."""

from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

Weights = Literal["ema", "raw"]
"""Averaged weights where training kept them, or those of the last step."""

_RAW = "current_model_state"
"""The averages take the place of the weights, which move here."""


def holds_both(checkpoint: Mapping[str, Any]) -> bool:
    """Whether the last step's weights lie beside the state dictionary, which then holds the averages, or, before the
    first of them, the weights that training began with."""
    return _RAW in checkpoint


def has_averages(checkpoint: Mapping[str, Any]) -> bool:
    """Whether training kept averaged weights; not before the first step of which it did."""
    return holds_both(checkpoint) and bool(checkpoint.get("averaging_state", {}).get("n_averaged", True))


def state_of(checkpoint: Mapping[str, Any], weights: Weights) -> dict[str, Tensor]:
    """The state dictionary of the task with these weights; without averages both are the same."""
    if weights == "raw" or not has_averages(checkpoint):
        return checkpoint.get(_RAW, checkpoint.get("state_dict", {}))
    return checkpoint["state_dict"]
