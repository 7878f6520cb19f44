"""In the place of SGLang's kernels, whose CPU build no registry has.

SGLang imports them by name, and on processors without AMX tiles it does without: its layers then
compute with torch, and weights stay as they were loaded. Without the packing kernels it takes every
processor for such a one.
"""


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_arguments, **_options):
        raise NotImplementedError(f"sgl_kernel.{name} is not installed")

    return missing
