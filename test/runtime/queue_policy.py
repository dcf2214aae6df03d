"""The policy of queues that no scheduler drives."""

from blendserve.planner import StepPace, linear_costs
from blendserve.policy import BlendPolicy, Steps


def separate_steps(total_tokens: int) -> BlendPolicy:
    pace = StepPace(linear_costs(1.0, 0.0, 1.0, 0.0), chunk_tokens=0)
    return BlendPolicy(total_tokens, pace, Steps.SEPARATE)
