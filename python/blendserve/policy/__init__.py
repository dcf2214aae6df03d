"""What starts next, how much prefill a step carries, when a job is planned again.

Pure: numpy and the standard library, no clock. SGLang's scheduler, the simulator's engine and the
benchmarks tell it what has happened and do what it says.
"""

from .admission import Admission, KVView, PacedAdmission
from .blend_policy import BlendPolicy, Steps
from .decodes import Decodes
from .gather import Gather
from .kv_account import Candidate, KVAccount
from .memory_forecast import MemoryForecast
from .overtaking import LOOK_BEHIND, PATIENCE_STEPS, Overtaking
from .pacing import rest_density
from .replanning import Replanning

__all__ = [
    "LOOK_BEHIND",
    "PATIENCE_STEPS",
    "Admission",
    "BlendPolicy",
    "Candidate",
    "Decodes",
    "Gather",
    "KVAccount",
    "KVView",
    "MemoryForecast",
    "Overtaking",
    "PacedAdmission",
    "Replanning",
    "Steps",
    "rest_density",
]
