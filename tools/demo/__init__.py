"""The demonstration: a real cluster, one manifest in, one answer out, everything torn down.

    python -m demo

Its parts also set up the cluster of the tests that need a real node.
"""
