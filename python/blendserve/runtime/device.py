"""What this engine runs on, as the cost model knows it."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from blendserve.config import Settings
from blendserve.planner import (
    CostModel,
    Hardware,
    ModelSpec,
    hardware,
    known_device,
    nearest_device,
)

logger = logging.getLogger(__name__)


def cost_model_of(model_config: Any, tp_size: int | None, settings: Settings) -> CostModel:
    """The cost model of a server, from SGLang's model configuration. The log says what of the model
    or the device is not known."""
    spec = ModelSpec.from_config(model_config.hf_config.to_dict())
    for caveat in spec.caveats:
        _warn(caveat)
    chip, ranks = choose_hardware(settings.hardware), int(tp_size or 1)
    # The CPU's row is a stand-in: nothing that it attains is known any better.
    of = CostModel.tensor_parallel if chip.name == "cpu" else CostModel.attained
    return of(spec, chip, ranks)


def choose_hardware(name: str) -> Hardware:
    """The row of the hardware table to plan for; "auto" asks torch which device there is, and takes
    the row of the most similar memory for one that the table lacks."""
    if name != "auto":
        return hardware(name)
    if not torch.cuda.is_available():
        return hardware("cpu")
    device = torch.cuda.get_device_name()
    row = known_device(device)
    if row is None:
        row = nearest_device(torch.cuda.get_device_properties(0).total_memory)
        _warn(
            f"{device!r} is not in the hardware table; plans are made for {row.name}, whose memory "
            "is nearest. Measure it (benchmark/gpu) and give the file of its figures: --hardware "
            "FILE.json"
        )
    return row


@functools.cache
def _warn(message: str) -> None:
    """Once in a process."""
    logger.warning(message)
