"""What all tests share."""

from hypothesis import settings

# An example that takes long says something of the machine, not of the code.
settings.register_profile("tests", deadline=None)
settings.load_profile("tests")
