"""Settings of the policy's property tests."""

from hypothesis import settings

# Machines that build this are shared and slow at times: no deadline per example.
settings.register_profile("blendserve", deadline=None, database=None)
settings.load_profile("blendserve")
