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

    def put(self, host: Host) -> None:
        """Write it, and keep what was there before; raises StepFailed."""
        before = host.read(self.path)
        if before is not None and not host.exists(self._mark):
            host.write(self._kept, before)
        host.write(self._mark, self.path + "\n")
        host.write(self.path, self.content)

    def take_back(self, host: Host) -> None:
        """Bring back what was there before; nothing where the file is not ours."""
        if not host.exists(self._mark):
            return
        before = host.read(self._kept)
        if before is None:
            host.remove(self.path)
        else:
            host.write(self.path, before)
            host.remove(self._kept)
        host.remove(self._mark)

    @property
    def _kept(self) -> str:
        return f"{_STATE}/{self.name}.before"

    @property
    def _mark(self) -> str:
        return f"{_STATE}/{self.name}.ours"
