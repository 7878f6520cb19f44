"""Engine side: maps resident weights into the serving process.

vLLM finds `register` through the entry point group vllm.general_plugins. Other engines
use `headrace_engine.weights.attach_weights`, which needs torch alone.
"""

_registered = False


def register() -> None:
    """Make --load-format headrace known to vLLM; called in each of its processes, maybe twice."""
    global _registered  # noqa: PLW0603 - one per process, as vLLM's own table of load formats
    if _registered:
        return
    from vllm.model_executor.model_loader import register_model_loader

    from headrace_engine.vllm_loader import HeadraceModelLoader

    register_model_loader("headrace")(HeadraceModelLoader)
    _registered = True
