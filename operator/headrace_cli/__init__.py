"""The command line for people: `headrace`, and the same as `kubectl headrace`."""
