"""Plans a job: prompts and (estimated) output lengths in, an order and densities out.

Pure: numpy and the standard library, deterministic for a seed. Knows neither torch nor SGLang.
"""

from .admission import (
    Admission,
    Candidate,
    Growth,
    KVState,
    PacedAdmission,
    account_side,
    account_tokens,
)
from .cost_model import CostModel
from .dual_scanner import DualScanner, Side, partition_memory
from .flat_tokens import FlatTokens
from .hardware import HARDWARE, Hardware, UnknownHardwareError, hardware
from .length_estimator import DEFAULT_OUTPUT_TOKENS, choose_sample, estimate
from .length_model import LengthModel
from .memory_forecast import MemoryForecast
from .model_spec import MODEL_SPECS, ModelSpec, ModelSpecError, model_spec
from .pacing import StepPace, rest_density
from .partition import Partition, partition
from .plan import Job, Plan, PlannerConfig, make_plan
from .prediction import OrderPrediction, Prediction, kv_capacity_tokens, predict
from .prefix_tree import PrefixTree
from .transform import Transformed, transform

__all__ = [
    "DEFAULT_OUTPUT_TOKENS",
    "HARDWARE",
    "MODEL_SPECS",
    "Admission",
    "Candidate",
    "CostModel",
    "DualScanner",
    "FlatTokens",
    "Growth",
    "Hardware",
    "Job",
    "KVState",
    "LengthModel",
    "MemoryForecast",
    "ModelSpec",
    "ModelSpecError",
    "OrderPrediction",
    "PacedAdmission",
    "Partition",
    "Plan",
    "PlannerConfig",
    "Prediction",
    "PrefixTree",
    "Side",
    "StepPace",
    "Transformed",
    "UnknownHardwareError",
    "account_side",
    "account_tokens",
    "choose_sample",
    "estimate",
    "hardware",
    "kv_capacity_tokens",
    "make_plan",
    "model_spec",
    "partition",
    "partition_memory",
    "predict",
    "rest_density",
    "transform",
]
