"""Plans a job: prompts and (estimated) output lengths in, an order and densities out.

Pure: numpy and the standard library, deterministic for a seed. Knows neither torch nor SGLang.
"""

from .cost_model import CostModel
from .cost_sources import DATASHEET, fitted_costs, linear_costs, step_costs
from .dual_scanner import DualScanner, Side, account_tokens, partition_memory
from .flat_tokens import FlatTokens
from .hardware import (
    HARDWARE,
    Hardware,
    HardwareError,
    UnknownHardwareError,
    hardware,
    known_device,
    nearest_device,
)
from .interference import INTERFERENCE, best_split, separate_parts
from .length_estimator import DEFAULT_OUTPUT_TOKENS, estimate
from .length_model import LengthModel
from .length_sample import choose_sample, choose_second_sample, first_part, sample_size
from .measured_steps import MeasuredSteps, StepTerms, UnusableSteps, fit_steps
from .media import EncoderWork, MediaRuns
from .model_spec import MODEL_SPECS, ModelSpec, ModelSpecError, model_spec
from .next_use import NextUse, NextUses, Timetable, make_timetable, next_uses
from .partition import Partition, partition
from .plan import Job, Plan, PlannerConfig, make_plan
from .prediction import (
    OrderPrediction,
    Prediction,
    dual_scan_sequence,
    kv_capacity_tokens,
    predict,
)
from .prefix_tree import PrefixTree
from .progress_curve import ProgressCurve, progress_curve
from .step_costs import Rates, StepCosts
from .step_pace import StepPace
from .transform import Transformed, transform

__all__ = [
    "DATASHEET",
    "DEFAULT_OUTPUT_TOKENS",
    "HARDWARE",
    "INTERFERENCE",
    "MODEL_SPECS",
    "CostModel",
    "DualScanner",
    "EncoderWork",
    "FlatTokens",
    "Hardware",
    "HardwareError",
    "Job",
    "LengthModel",
    "MeasuredSteps",
    "MediaRuns",
    "ModelSpec",
    "ModelSpecError",
    "NextUse",
    "NextUses",
    "OrderPrediction",
    "Partition",
    "Plan",
    "PlannerConfig",
    "Prediction",
    "PrefixTree",
    "ProgressCurve",
    "Rates",
    "Side",
    "StepCosts",
    "StepPace",
    "StepTerms",
    "Timetable",
    "Transformed",
    "UnknownHardwareError",
    "UnusableSteps",
    "account_tokens",
    "best_split",
    "choose_sample",
    "choose_second_sample",
    "dual_scan_sequence",
    "estimate",
    "first_part",
    "fit_steps",
    "fitted_costs",
    "hardware",
    "known_device",
    "kv_capacity_tokens",
    "linear_costs",
    "make_plan",
    "make_timetable",
    "model_spec",
    "nearest_device",
    "next_uses",
    "partition",
    "partition_memory",
    "predict",
    "progress_curve",
    "sample_size",
    "separate_parts",
    "step_costs",
    "transform",
]
