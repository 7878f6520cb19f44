"""Where the plugin enters SGLang: two functions, through SGLang's own registry of hooks.

Every process of SGLang loads plugins, also those without a model: what needs the model's code is
imported when it is called.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import add_load_format_choices

if TYPE_CHECKING:
    from sglang.srt.configs.load_config import LoadConfig

FORMAT = "headrace"


def install() -> None:
    """Make --load-format headrace known, and measure memory when the weights are resident."""
    add_load_format_choices([FORMAT])
    HookRegistry.register(
        "sglang.srt.configs.load_config.LoadConfig._verify_load_format",
        name_the_loader,
        HookType.AROUND,
    )
    HookRegistry.register(
        "sglang.srt.distributed.bootstrap.measure_pre_model_load_memory",
        wait_first,
        HookType.BEFORE,
    )


def name_the_loader(verify: Callable[["LoadConfig"], None], config: "LoadConfig") -> None:
    """Give SGLang the loader's class, which it takes in place of a name it knows."""
    if config.load_format != FORMAT:
        verify(config)
        return
    from headrace_engine.sglang_loader import HeadraceModelLoader

    config.load_format = HeadraceModelLoader


def wait_first(*, device: str, is_draft_worker: bool) -> None:
    """Wait for the weights, if they come from the loader."""
    from sglang.srt.runtime_context import get_model

    if get_model().load_format == FORMAT:
        from headrace_engine.sglang_loader import wait_for_weights

        wait_for_weights(device=device, is_draft_worker=is_draft_worker)
