"""Prepares a GPU node for GPUDirect Storage from FSx for Lustre over EFA, and says what it found.

    host      files and programs of the node, below a root
    facts     what is there: operating system, drivers, EFA devices, LNet, mounts
    steps     what is to be done; each step can be checked, applied and reverted
    cufile    the cuFile configuration that fits what was found
    checks    the same facts as findings with fixes, for `headrace doctor --node`
    publish   labels of the Node, and a NodeFeature

It needs the standard library alone, and runs in a container with the host's PID namespace.
"""
