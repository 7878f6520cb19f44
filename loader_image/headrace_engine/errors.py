"""Exception tree of the engine side; messages name the parameter, its value, the rule, the fix."""
# Read as conditions, not as Python errors: no "Error" suffix.
# ruff: noqa: N818


class EngineSideError(Exception):
    """Base of all errors this package raises on purpose."""


class MappingFailed(EngineSideError):
    """The loader's memory cannot be mapped into this process."""


class SettingsInvalid(EngineSideError):
    """The engine's arguments or environment ask for something that does not exist."""


class Unsupported(EngineSideError):
    """The engine is asked for a feature that mapped weights do not have."""


class WeightsMismatch(EngineSideError):
    """The weights that are resident do not fit the model that is built."""
