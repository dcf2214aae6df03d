"""The simulator's room: the planner's and the admission code's decisions against a modelled engine.

Empty so far. What it will share with the runtime stands in ``blendserve.planner``: the cost model,
the dual scanner and ``Admission``, which decides from plain numbers and knows no engine.
"""
