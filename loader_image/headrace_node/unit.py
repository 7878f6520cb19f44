"""What brings the network of LNet back after a reboot: files for modprobe, sysctl and systemd.

AWS's own unit asks the instance metadata for the type, once, and loses the race at boot: LNet then
has TCP alone, silently. This unit asks nothing: which devices there are is written down, it
waits for them, and it ends before the kubelet starts, so that no mount comes first.
"""

from headrace_node.facts import EfaDevice, Facts

NAME = "headrace-lnet.service"
UNIT_PATH = f"/etc/systemd/system/{NAME}"
MODPROBE_PATH = "/etc/modprobe.d/headrace.conf"
MODULES_PATH = "/etc/modules-load.d/headrace.conf"
SYSCTL_PATH = "/etc/sysctl.d/90-headrace.conf"
PEER_CREDITS = 128
_WAIT_SECONDS = 120


def net_add(device: EfaDevice) -> tuple[str, ...]:
    """Return the command that gives LNet an EFA device, near its own processors.

    Lustre makes a CPU partition (cpt) of each NUMA node, unless libcfs is told otherwise.
    """
    near = () if device.numa < 0 else ("--cpt", f"[{device.numa}]")
    peer_credits = ("--peer-credits", str(PEER_CREDITS))
    return ("lnetctl", "net", "add", "--net", "efa", "--if", device.name, *peer_credits, *near)


PREFER_EFA = ("lnetctl", "udsp", "add", "--src", "efa", "--priority", "0")


def unit(facts: Facts) -> str:
    """Return the systemd unit. Should it fail for good, the kubelet starts all the same."""
    devices = " ".join(f"/sys/class/infiniband/{device.name}" for device in facts.efa)
    # systemd takes programs by absolute path; "-" lets one fail, as on a second start.
    added = "\n".join(f"ExecStart=/usr/sbin/{' '.join(net_add(device))}" for device in facts.efa)
    return f"""# Written by headrace-node; `headrace-node revert` removes it.
[Unit]
Description=LNet over EFA for FSx for Lustre
Wants=network-online.target
After=network-online.target systemd-modules-load.service
After=configure-efa-fsx-lustre-client.service
Before=kubelet.service remote-fs-pre.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStartPre=/usr/bin/udevadm wait --timeout={_WAIT_SECONDS} {devices}
ExecStartPre=/usr/sbin/modprobe kefalnd
ExecStartPre=/usr/sbin/lnetctl lnet configure
ExecStartPre=-/usr/sbin/lnetctl net add --net tcp --if {facts.ethernet}
ExecStartPre=-/usr/sbin/lnetctl net del --net efa
{added}
ExecStart=/usr/sbin/lnetctl set discovery 1
ExecStart=-/usr/sbin/{" ".join(PREFER_EFA)}
ExecStart=/usr/sbin/modprobe lustre
TimeoutStartSec={_WAIT_SECONDS * 2}
Restart=on-failure
RestartSec=5

[Install]
WantedBy=multi-user.target
"""


def modprobe_options(facts: Facts) -> str:
    """Return the options of the modules, for the next time they are loaded.

    kefalnd finds its peers over the interface; the others are AWS's advice for EKS nodes
    ("Optimize Amazon FSx for Lustre performance on nodes").
    """
    return (
        f"options kefalnd ipif_name={facts.ethernet}\n"
        "options ptlrpc ptlrpcd_per_cpt_max=64\n"
        "options ksocklnd credits=2560\n"
    )


def modules(facts: Facts) -> str:
    """Return the modules to load at boot."""
    return "lnet\nksocklnd\n" + ("nvidia-fs\n" if facts.nvidia_fs else "")


def sysctl(huge_pages: int) -> str:
    """Return the kernel's settings."""
    return f"vm.nr_hugepages = {huge_pages}\n"
