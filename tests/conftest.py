"""Order of the suite: what is quick comes first, so that a failure shows early."""

MARKERS = ("cluster", "engine", "node")  # from quick to slow


def cost(item):
    """Rank of a test: 0 without a marker, else that of its slowest one."""
    return max(
        (MARKERS.index(m.name) + 1 for m in item.iter_markers() if m.name in MARKERS), default=0
    )


def pytest_collection_modifyitems(items):
    items.sort(key=cost)
