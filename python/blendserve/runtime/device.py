"""What this engine runs on, as the cost model knows it."""

from __future__ import annotations

from typing import Any

import torch

from blendserve.config import Settings
from blendserve.planner import CostModel, Hardware, ModelSpec, hardware

# Names under which torch reports the chips of the planner's hardware table.
_CHIPS = {
    "A100": "a100-80g-sxm",
    "H100": "h100-80g-sxm",
    "H200": "h200-141g-sxm",
    "L40S": "l40s",
}


def cost_model_of(model_config: Any, tp_size: int | None, settings: Settings) -> CostModel:
    """The cost model of a server, from SGLang's model configuration.

    Raises:
        ValueError: no row of the hardware table fits the device.
    """
    return CostModel.tensor_parallel(
        ModelSpec.from_config(model_config.hf_config.to_dict()),
        choose_hardware(settings.hardware),
        int(tp_size or 1),
    )


def choose_hardware(name: str) -> Hardware:
    """The row of the hardware table to plan for; "auto" asks torch which device there is."""
    if name != "auto":
        return hardware(name)
    if not torch.cuda.is_available():
        return hardware("cpu")
    device = torch.cuda.get_device_name()
    for chip, row in _CHIPS.items():
        if chip in device:
            return hardware(row)
    raise ValueError(
        f"No row of the hardware table fits {device!r}. Set BLENDSERVE_HARDWARE to one of: "
        + ", ".join(sorted(_CHIPS.values()))
    )
