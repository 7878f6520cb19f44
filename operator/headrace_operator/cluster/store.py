"""What is known of the cluster: the newest state of every watched object.

Fed by watch events, by complete listings and by the answers to the operator's own writes;
the newest resource version wins. A listing also removes what is gone: a watch that had to
start over does not tell which objects disappeared meanwhile.

Objects are kept as compressed JSON, a twentieth of what they take as dictionaries, and
unpacked by those who look: few look at the same time, but all are kept. pydantic's JSON is
compiled and takes half the time of the standard library's.
"""

import zlib
from collections.abc import Collection, Iterable, Iterator
from typing import NamedTuple

from pydantic_core import from_json, to_json

from headrace_operator.cluster.api import Listing, Object
from headrace_operator.cluster.kinds import CLAIM, MODEL_DEPLOYMENT, Kind
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
        self._users: dict[Key, set[Key]] = {}
        self._used: dict[Key, frozenset[Key]] = {}

    def observe(self, kind: Kind, body: Object, *, gone: bool, listed: bool = False) -> set[Key]:
        """Take over a watch event; return the ModelDeployments it is about.

        Args:
            listed: the watch began, or went on after a break, with a listing: what is known
                from elsewhere has been told of.
        """
        table = self._tables[kind]
        table.watched_version = max(table.watched_version, _version(body))
        if gone:
            table.remove(body)
        elif not table.put(body) and listed:
            return set()
        return self._concerned(kind, body)

    def watch_from(self, kind: Kind, version: int) -> None:
        """Note that a watch begins after a version: what is older it will not deliver."""
        table = self._tables[kind]
        table.watched_version = max(table.watched_version, version)

    def put(self, kind: Kind, body: Object) -> None:
        """Take over the answer to a write."""
        self._tables[kind].put(body)

    def remove(self, kind: Kind, body: Object) -> None:
        """Take over that a write was an object's end; the watch may tell of its children first."""
        self._tables[kind].remove(body)

    def replace(self, kind: Kind, listing: Listing) -> set[Key]:
        """Take over a complete listing; return the ModelDeployments whose objects changed."""
        changed = self.take(kind, listing.objects)
        listed = set(map(key_of, listing.objects))
        return changed | self.finish(kind, listed, listing.resource_version, listing.newest)

    def take(self, kind: Kind, page: Iterable[Object]) -> set[Key]:
        """Take over a page of a listing; return the ModelDeployments whose objects changed."""
        table = self._tables[kind]
        return {key for b in page if table.put(b) for key in self._concerned(kind, b)}

    def finish(self, kind: Kind, listed: Collection[Key], version: int, newest: int) -> set[Key]:
        """Remove what a listing did not have whose pages have all been taken over.

        Args:
            version: the version of the listing.
            newest: the version of the object in it that changed last.

        Returns the ModelDeployments whose objects are gone.
        """
        gone = self._tables[kind].finish(listed, version, newest)
        return {key for body in gone for key in self._concerned(kind, body)}

    def is_behind(self, kind: Kind) -> bool:
        """Whether the last but one listing showed changes that the watch has not delivered yet."""
        table = self._tables[kind]
        return table.watched_version < table.earlier_version

    def resource(self, key: Key) -> Object | None:
        """Return a ModelDeployment."""
        return self._tables[MODEL_DEPLOYMENT].get(key)

    def claim(self, key: Key) -> Object | None:
        """Return a claim, whoever it belongs to."""
        return self._tables[CLAIM].get(key)

    def use_claims(self, user: Key, names: Iterable[str | None]) -> None:
        """Note which claims a ModelDeployment depends on: their changes concern it."""
        used = frozenset(Key(user.namespace, name) for name in names if name)
        for claim in self._used.pop(user, frozenset()) - used:
            self._users[claim].discard(user)
            if not self._users[claim]:
                del self._users[claim]
        for claim in used:
            self._users.setdefault(claim, set()).add(user)
        if used:
            self._used[user] = used

    def resources(self) -> list[Key]:
        """Return the keys of all ModelDeployments."""
        return list(self._tables[MODEL_DEPLOYMENT].entries)

    def versions(self) -> dict[Key, int]:
        """Return the resource versions of all ModelDeployments."""
        return {key: e.version for key, e in self._tables[MODEL_DEPLOYMENT].entries.items()}

    def children(self, kind: Kind, owner: Key) -> Iterator[Object]:
        """Return the objects of a kind that carry the label of a ModelDeployment."""
        table = self._tables[kind]
        return (_unpack(table.entries[key]) for key in sorted(table.by_owner.get(owner, ())))

    def child(self, kind: Kind, owner: Key, name: str) -> Object | None:
        """Return the object of a name that carries the label of a ModelDeployment."""
        entry = self._tables[kind].entries.get(Key(owner.namespace, name))
        return _unpack(entry) if entry is not None and entry.owner == owner else None

    def _concerned(self, kind: Kind, body: Object) -> set[Key]:
        """Return the ModelDeployments that an object is, belongs to by its label, or serves."""
        key = key_of(body)
        if kind is MODEL_DEPLOYMENT:
            return {key}
        owner = _owner(body)
        users = self._users.get(key, set()) if kind is CLAIM else set()
        return users | ({owner} if owner else set())


def key_of(body: Object) -> Key:
    """Return the key of an object."""
    return Key(text(body, "metadata", "namespace"), name_of(body))


def _version(body: Object) -> int:
    version = text(body, "metadata", "resourceVersion")
    return int(version) if version.isdigit() else 0


def _owner(body: Object) -> Key | None:
    owner = text(body, "metadata", "labels", OWNER_LABEL)
    return Key(text(body, "metadata", "namespace"), owner) if owner else None


class _Entry(NamedTuple):
    """One object, packed."""

    version: int
    owner: Key | None
    data: bytes


def _pack(body: Object) -> _Entry:
    # Field ownership is as large as the object and of no use here.
    metadata = {k: v for k, v in body["metadata"].items() if k != "managedFields"}
    data = to_json({**body, "metadata": metadata})
    return _Entry(_version(body), _owner(body), zlib.compress(data, 1))


def _unpack(entry: _Entry) -> Object:
    body: Object = from_json(zlib.decompress(entry.data))
    return body


class _Table:
    """Objects of one kind, indexed by owner."""

    def __init__(self) -> None:
        self.entries: dict[Key, _Entry] = {}
        self.by_owner: dict[Key, set[Key]] = {}
        self.watched_version = 0
        self.listed_version = 0
        self.earlier_version = 0
        self._gone: dict[Key, int] = {}

    def get(self, key: Key) -> Object | None:
        """Return an object."""
        entry = self.entries.get(key)
        return None if entry is None else _unpack(entry)

    def put(self, body: Object) -> bool:
        """Store an object unless a newer state is known; return whether it was stored."""
        key, version = key_of(body), _version(body)
        if version <= max(self._known(key), self._gone.get(key, 0)):
            return False
        self._unlink(key)
        entry = self.entries[key] = _pack(body)
        if entry.owner is not None:
            self.by_owner.setdefault(entry.owner, set()).add(key)
        return True

    def remove(self, body: Object) -> None:
        """Forget an object, and remember its last version against older listings."""
        key, version = key_of(body), _version(body)
        if version >= self._known(key):
            self._unlink(key)
            self._gone[key] = version

    def finish(self, listed: Collection[Key], version: int, newest: int) -> list[Object]:
        """Remove what a complete listing did not have; return it."""
        missing = [
            key for key, e in self.entries.items() if key not in listed and e.version <= version
        ]
        gone = [_unpack(self.entries[key]) for key in missing]
        for key in missing:
            self._unlink(key)
        self._gone = {k: v for k, v in self._gone.items() if v > version}
        self.earlier_version = self.listed_version
        self.listed_version = newest
        return gone

    def _known(self, key: Key) -> int:
        entry = self.entries.get(key)
        return 0 if entry is None else entry.version

    def _unlink(self, key: Key) -> None:
        entry = self.entries.pop(key, None)
        siblings = self.by_owner.get(entry.owner) if entry and entry.owner else None
        if entry and entry.owner and siblings is not None:
            siblings.discard(key)
            if not siblings:
                del self.by_owner[entry.owner]
