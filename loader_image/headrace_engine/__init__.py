"""Engine side: maps resident weights into the serving process.

vLLM finds `register` through the entry point group vllm.general_plugins, SGLang
`register_sglang` through sglang.srt.plugins. Other engines call `headrace_engine.attach`, which
needs torch alone (docs/engines.md).
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from headrace_engine.weights import Weights, attach

__all__ = ["Weights", "attach", "register", "register_sglang"]

_registered = False


def __getattr__(name: str) -> object:
    """Import what needs torch at first use: vLLM's processes import this module before torch."""
    if name in ("Weights", "attach"):
        from headrace_engine import weights

        return getattr(weights, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def register() -> None:
    """Make --load-format headrace known to vLLM; called in each of its processes, maybe twice."""
    global _registered  # noqa: PLW0603 - one per process, as vLLM's own table of load formats
    if _registered:
        return
    from vllm.model_executor.model_loader import register_model_loader

    from headrace_engine.vllm_loader import HeadraceModelLoader
    from headrace_engine.vllm_versions import leave_room_for_external_weights

    register_model_loader("headrace")(HeadraceModelLoader)
    leave_room_for_external_weights("headrace")
    _registered = True


def register_sglang() -> None:
    """Make --load-format headrace known to SGLang, which calls this once in each process."""
    from headrace_engine import sglang_hooks

    sglang_hooks.install()
