"""Files that headrace-node writes on a node. What others had written there comes back on revert."""

from dataclasses import dataclass

from headrace_node.host import Host

_STATE = "/var/lib/headrace"


@dataclass(frozen=True, slots=True)
class OwnFile:
    """A file of ours; `name` is that of the notes about it below /var/lib/headrace."""

    name: str
    path: str
    content: str

    def is_there(self, host: Host) -> bool:
        """Whether it is there as it should be."""
        return host.read(self.path) == self.content

    def is_ours(self, host: Host) -> bool:
        """Whether it was written here, and not taken back."""
        return host.exists(self._mark)

    def put(self, host: Host) -> None:
        """Write it, and keep what was there before; raises StepFailed."""
        if not self.is_ours(host):
            host.remove(self._kept)
            if host.exists(self.path):
                host.copy(self.path, self._kept)
        host.write(self._mark, self.path + "\n")
        host.write(self.path, self.content)

    def take_back(self, host: Host) -> None:
        """Bring back what was there before; nothing where the file is not ours."""
        if not self.is_ours(host):
            return
        if host.exists(self._kept):
            host.copy(self._kept, self.path)
        else:
            host.remove(self.path)
        host.remove(self._mark)  # before what was kept: it says whose the file is
        host.remove(self._kept)

    @property
    def _kept(self) -> str:
        return f"{_STATE}/{self.name}.before"

    @property
    def _mark(self) -> str:
        return f"{_STATE}/{self.name}.ours"
