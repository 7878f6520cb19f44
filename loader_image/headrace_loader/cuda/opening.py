"""Opens a worker's GPU in the background: it takes longer than anything else before a load."""

import threading
from functools import cache

from headrace_loader.cuda.driver import CudaError, Device
from headrace_loader.errors import BackendUnavailable
from headrace_loader.topology import see_only


class Opening:
    """The GPU of a rank, being opened from the moment this is made.

    Raises:
        BackendUnavailable: the process may use fewer GPUs than the rank needs.
    """

    def __init__(self, local_rank: int) -> None:
        self._local_rank = local_rank
        see_only(local_rank)
        self._found = threading.Event()
        self._bus_id = ""
        self._opened: Device | CudaError | None = None
        self._thread = threading.Thread(target=self._open, daemon=True)
        self._thread.start()

    def bus_id(self) -> str:
        """Return where the GPU is on the PCI bus, known in half the time; "" if it fails."""
        self._found.wait()
        return self._bus_id

    def device(self) -> Device:
        """Wait for it and make it the calling thread's; raises BackendUnavailable."""
        self._thread.join()
        if isinstance(self._opened, Device):
            self._opened.use()
            return self._opened
        raise BackendUnavailable(
            f"--backend cuda: GPU {self._local_rank} cannot be used: {self._opened}; check that "
            "the container sees its GPUs (spec.gpu.sharing)"
        )

    def _open(self) -> None:
        try:
            self._opened = Device(found=self._note)
        except CudaError as error:
            self._opened = error
        finally:
            self._found.set()

    def _note(self, device: Device) -> None:
        self._bus_id = device.pci_bus_id
        self._found.set()


@cache
def opening(local_rank: int) -> Opening:
    """Return what opens the GPU of a rank; the first call begins."""
    return Opening(local_rank)
