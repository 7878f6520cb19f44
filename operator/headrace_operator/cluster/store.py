"""What is known of the cluster: the newest state of every watched object.

Fed by watch events, by complete listings and by the answers to the operator's own writes;
the newest resource version wins. A listing also removes what is gone: a watch that had to
start over does not tell which objects disappeared meanwhile.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from headrace_operator.cluster.api import Listing, Object
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, Kind
from headrace_operator.plan.names import OWNER_LABEL
from headrace_operator.plan.objects import name_of, text


class Key(NamedTuple):
    """Namespace and name of an object."""

    namespace: str
    name: str


class Store:
    """Objects of the watched kinds by kind and key, and by the ModelDeployment they belong to."""

    def __init__(self, kinds: Iterable[Kind]) -> None:
        self._tables = {kind: _Table() for kind in kinds}

    def observe(self, kind: Kind, body: Object, *, gone: bool) -> Key | None:
        """Take over a watch event; return the ModelDeployment it is about."""
        table = self._tables[kind]
        table.watched_version = max(table.watched_version, _version(body))
        table.remove(body) if gone else table.put(body)
        return owner_key(kind, body)

    def put(self, kind: Kind, body: Object) -> None:
        """Take over the answer to a write."""
        self._tables[kind].put(body)

    def replace(self, kind: Kind, listing: Listing) -> set[Key]:
        """Take over a complete listing; return the ModelDeployments whose objects changed."""
        changed = self._tables[kind].replace(listing)
        return {key for body in changed if (key := owner_key(kind, body)) is not None}

    def is_behind(self, kind: Kind) -> bool:
        """Whether the last but one listing showed changes that the watch has not delivered yet."""
        table = self._tables[kind]
        return table.watched_version < table.earlier_version

    def resource(self, key: Key) -> Object | None:
        """Return a ModelDeployment."""
        return self._tables[MODEL_DEPLOYMENT].objects.get(key)

    def resources(self) -> list[Key]:
        """Return the keys of all ModelDeployments."""
        return list(self._tables[MODEL_DEPLOYMENT].objects)

    def children(self, kind: Kind, owner: Key) -> Iterator[Object]:
        """Return the objects of a kind that carry the label of a ModelDeployment."""
        table = self._tables[kind]
        return (table.objects[key] for key in sorted(table.by_owner.get(owner, ())))


def owner_key(kind: Kind, body: Object) -> Key | None:
    """Return the ModelDeployment an object is, or belongs to by its label."""
    key = key_of(body)
    if kind is MODEL_DEPLOYMENT:
        return key
    owner = text(body, "metadata", "labels", OWNER_LABEL)
    return Key(key.namespace, owner) if owner else None


def key_of(body: Object) -> Key:
    """Return the key of an object."""
    return Key(text(body, "metadata", "namespace"), name_of(body))


def _version(body: Object) -> int:
    version = text(body, "metadata", "resourceVersion")
    return int(version) if version.isdigit() else 0


class _Table:
    """Objects of one kind, indexed by owner."""

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.by_owner: dict[Key, set[Key]] = {}
        self.watched_version = 0
        self.listed_version = 0
        self.earlier_version = 0
        self._gone: dict[Key, int] = {}

    def put(self, body: Object) -> bool:
        """Store an object unless a newer state is known; return whether it was stored."""
        key, version = key_of(body), _version(body)
        known = max(_version(self.objects.get(key, {})), self._gone.get(key, 0))
        if version <= known:
            return False
        self._unlink(key)
        # Field ownership is as large as the object and of no use here.
        metadata = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
        self.objects[key] = {**body, "metadata": metadata}
        owner = text(body, "metadata", "labels", OWNER_LABEL)
        if owner:
            self.by_owner.setdefault(Key(key.namespace, owner), set()).add(key)
        return True

    def remove(self, body: Object) -> None:
        """Forget an object, and remember its last version against older listings."""
        key, version = key_of(body), _version(body)
        if version >= _version(self.objects.get(key, {})):
            self._unlink(key)
            self.objects.pop(key, None)
            self._gone[key] = version

    def replace(self, listing: Listing) -> list[Object]:
        """Take over a complete listing; return the objects that changed or are gone."""
        changed = [body for body in listing.objects if self.put(body)]
        listed = {key_of(body) for body in listing.objects}
        for key, body in list(self.objects.items()):
            if key not in listed and _version(body) <= listing.resource_version:
                self._unlink(key)
                del self.objects[key]
                changed.append(body)
        self._gone = {k: v for k, v in self._gone.items() if v > listing.resource_version}
        self.earlier_version = self.listed_version
        self.listed_version = max((_version(body) for body in listing.objects), default=0)
        return changed

    def _unlink(self, key: Key) -> None:
        owner = Key(key.namespace, text(self.objects.get(key), "metadata", "labels", OWNER_LABEL))
        siblings = self.by_owner.get(owner)
        if siblings is not None:
            siblings.discard(key)
            if not siblings:
                del self.by_owner[owner]
