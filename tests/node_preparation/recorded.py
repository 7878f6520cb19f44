"""A fake sysroot and recorded programs: what a GPU node's files and programs show.

Neither Lustre over EFA nor nvidia-fs can be had here. The programs note how they were called and
print what the real ones print; lnetctl and lctl change what is shown next, as the real ones do.
Formats: `lnetctl net show` of Lustre 2.15, `gdscheck -p` of GDS 1.16.
"""

from pathlib import Path

from headrace_node.host import Host, Outcome


def respond(state: dict, name: str, arguments: list[str]) -> tuple[int, str]:
    """Return status and output of a program, and change what the next ones show."""
    line = " ".join([name, *arguments])
    state["calls"].append(line)
    if line in state["failing"]:
        return 1, state["failing"][line]
    program = {"lnetctl": lnetctl, "lctl": lctl}.get(name)
    if program is not None:
        return program(state, arguments)
    if name == "modinfo":
        known = state["modules"].get(arguments[-1])
        return (1, "modinfo: ERROR: Module not found.") if known is None else (0, known)
    if line == "dnf install -y lustre-client":
        state["modules"]["lustre"] = "2.15.6"
    if name == "gdscheck":
        return 0, f" NVMe               : Supported\n LUSTRE             : {state['gds']}\n"
    return 0, ""


def lnetctl(state: dict, arguments: list[str]) -> tuple[int, str]:
    match arguments:
        case ["lnet", "configure"]:
            state["lnet"] = True
        case ["net", "show"]:
            return (0, shown_nets(state)) if state["lnet"] else (1, "show: - net: errno: -100")
        case ["net", "add", "--net", net, "--if", device, *_]:
            if [net, device] in state["nets"]:
                return 239, "add: - net: errno: -17 descr: cannot add network: File exists"
            state["nets"].append([net, device])
        case ["net", "del", "--net", net]:
            state["nets"] = [known for known in state["nets"] if known[0] != net]
        case ["udsp", "add", *_]:
            if state["preferred"]:
                return 142, "add: - udsp: errno: -114 descr: Operation already in progress"
            state["preferred"] = True
        case ["discover", _]:
            state["peers"] = True
        case ["peer", "show"]:
            over_efa = "        - nid: 10.0.1.9@efa\n" if state["peers"] else ""
            return 0, f"peer:\n    - primary nid: 10.0.1.9@tcp\n      peer ni:\n{over_efa}"
    return 0, ""


def shown_nets(state: dict) -> str:
    nets = [["lo", ""], *state["nets"]]
    text = "net:\n"
    for net in dict.fromkeys(name for name, _ in nets):
        text += f"    - net type: {net}\n      local NI(s):\n"
        for number, device in enumerate(device for name, device in nets if name == net):
            up = "down" if device in state["down"] else "up"
            text += f"        - nid: 10.0.0.{5 + number}@{net}\n          status: {up}\n"
            text += f"          interfaces:\n              0: {device}\n" if device else ""
    return text


def lctl(state: dict, arguments: list[str]) -> tuple[int, str]:
    if arguments[0] == "get_param":
        return 0, state["parameters"].get(arguments[-1], "1") + "\n"
    name, _, value = arguments[1].partition("=")
    state["parameters"][name] = value
    return 0, ""


ROUTES = "Iface\tDestination\tGateway\nenp71s0\t00000000\t0100000A\n"


class RecordedNode:
    """A node that was recorded: P5en-like, with as many EFA devices as asked for."""

    def __init__(self, root: Path, *, efa: int = 4, system: str = "amzn", gds: bool = True) -> None:
        self.root = root / "sysroot"
        modules = {"nvidia-fs": "2.29.4"} if gds else {}
        self.state = {
            "calls": [],
            "failing": {},
            "lnet": False,
            "nets": [],
            "down": [],
            "preferred": False,
            "peers": False,
            "modules": modules,
            "parameters": {},
            "gds": "Supported" if gds else "Unsupported",
        }
        version = "2023" if system == "amzn" else "1.2"
        self.put("etc/os-release", f'ID="{system}"\nVERSION_ID="{version}"\n')
        self.put("proc/sys/kernel/osrelease", "6.12.40-63.114.amzn2023.x86_64\n")
        self.put(
            "proc/driver/nvidia/version", "NVRM version: NVIDIA UNIX Open  580.95.05  Release\n"
        )
        if gds:
            self.put("proc/driver/nvidia-fs/version", "version: 2.29.4\n")
        self.put("proc/sys/vm/nr_hugepages", "0\n")
        self.put("proc/net/route", ROUTES)
        self.put("proc/cpuinfo", "processor\t: 0\n" * 192)
        self.put("proc/mounts", "/dev/root / xfs rw 0 0\n")
        for number in range(efa):
            self._add_device(f"rdmap{100 + number}s0", number // 2, "efa")
        self._add_device("mlx5_0", 0, "mlx5_core")
        self.put("usr/local/cuda/gds/tools/gdscheck", "")

    def host(self, *, dry_run: bool = False) -> Host:
        """Return the node as headrace-node sees it."""
        return Host(self.root, self._run, dry_run)

    def put(self, path: str, content: str) -> None:
        """Write a file of the node."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(content)

    def mount(self) -> None:
        """Let a Lustre file system be mounted."""
        self.put("proc/mounts", "10.0.1.9@tcp:/fsx /var/lib/kubelet/x lustre rw,flock 0 0\n")

    def change(self, **state: object) -> None:
        """Change what the programs show."""
        self.state |= state

    def calls(self, program: str = "") -> list[str]:
        """Return the command lines that changed something, in order."""
        asks = ("net show", "peer show", "get_param")
        changing = [x for x in self.state["calls"] if not any(ask in x for ask in asks)]
        return [x for x in changing if x.split()[0] not in ("modinfo", "gdscheck") and program in x]

    def files(self) -> dict[str, str]:
        """Return all files below etc and var with their content."""
        paths = [p for d in ("etc", "var") for p in (self.root / d).rglob("*") if p.is_file()]
        return {str(path.relative_to(self.root)): path.read_text() for path in paths}

    def _run(self, arguments: list[str]) -> Outcome:
        name, *others = arguments
        return Outcome(*respond(self.state, Path(name).name, list(others)))

    def _add_device(self, name: str, numa: int, driver: str) -> None:
        self.put(f"sys/class/infiniband/{name}/device/numa_node", f"{numa}\n")
        link = self.root / f"sys/class/infiniband/{name}/device/driver"
        link.symlink_to(f"../../../bus/pci/drivers/{driver}")
