"""Informers: one kind each, listed once and watched from there, into the store.

kopf runs a task, a queue and a chain of handler look-ups per object and lists whatever was
listed before; for the children, twenty times as many as ModelDeployments, that is most of
the operator's time (docs/decisions.md). Here an event is one line, decoded and stored.

A watch that ends goes on where it was. One that is refused, because the API server has
forgotten that version, starts over with a listing.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from headrace_operator.cluster.api import Api
from headrace_operator.cluster.kinds import MODEL_DEPLOYMENT, Kind
from headrace_operator.cluster.store import Key, Store, key_of
from headrace_operator.errors import ApiError, Expired, KindNotServed

_LISTINGS = 3
_FIRST_DELAY_SECONDS = 0.2
_MAX_DELAY_SECONDS = 30.0
# A watch that ends sooner than this makes the next one wait.
_SHORT_SECONDS = 1.0
# How soon a kind is looked for again that the API server does not serve.
_UNSERVED_SECONDS = 120.0
_logger = logging.getLogger(__name__)


@dataclass
class Informer:
    """Keeps the store in step with the API server for one kind, and tells who is concerned.

    Call `list` before `run`: it fills the store and gives the version to watch from. `notify` is
    told of what the watch finds.
    """

    api: Api
    store: Store
    kind: Kind
    namespaces: tuple[str | None, ...]
    selector: str
    notify: Callable[[Key], None]
    beat: Callable[[str], None] = lambda _: None
    _versions: dict[str | None, str] = field(default_factory=dict)

    async def list(self, notify: Callable[[Key], None]) -> None:
        """Take over a complete listing; `notify` is told whose objects changed. Raises ApiError."""
        for attempt in range(1, _LISTINGS + 1):
            try:
                await self._list(notify)
            except KindNotServed:
                if self.kind is MODEL_DEPLOYMENT:
                    raise
                return  # resource.k8s.io needs Kubernetes 1.34; without it there are none
            except Expired:  # the pages took longer than the API server keeps a version
                if attempt == _LISTINGS:
                    raise
            else:
                return

    async def _list(self, notify: Callable[[Key], None]) -> None:
        listed: set[Key] = set()
        newest, versions = 0, dict[str | None, int]()
        for namespace in self.namespaces:
            pages = self.api.pages(self.kind, namespace, label_selector=self.selector)
            async for page in pages:
                # At once: once more is not told, should a later page be refused.
                for key in self.store.take(self.kind, page.objects):
                    notify(key)
                listed.update(map(key_of, page.objects))
                newest, versions[namespace] = max(newest, page.newest), page.resource_version
        # Of several listings the earliest decides what is gone: the others saw more.
        for key in self.store.finish(self.kind, listed, min(versions.values()), newest):
            notify(key)
        self._versions = {namespace: str(version) for namespace, version in versions.items()}

    async def run(self, namespace: str | None) -> None:
        """Watch one of the namespaces until cancelled."""
        delay = _FIRST_DELAY_SECONDS
        while True:
            self.beat(f"watch of {self.kind.plural}")
            begun = time.monotonic()
            try:
                await self._watch(namespace)
            except Expired:
                self._versions.pop(namespace, None)
            except KindNotServed:
                await asyncio.sleep(_UNSERVED_SECONDS)
                continue
            except ApiError as error:
                _logger.warning("watch of %s ended, starting again: %s", self.kind.plural, error)
            if time.monotonic() - begun < _SHORT_SECONDS:
                await asyncio.sleep(delay)
                delay = min(delay * 2, _MAX_DELAY_SECONDS)
            else:
                delay = _FIRST_DELAY_SECONDS

    async def _watch(self, namespace: str | None) -> None:
        if namespace not in self._versions:
            await self.list(self.notify)
        if namespace not in self._versions:
            raise KindNotServed(self.kind.plural)
        version = self._versions[namespace]
        self.store.watch_from(self.kind, int(version))
        stream = self.api.watch(self.kind, namespace, version, label_selector=self.selector)
        async for change in stream:
            self.beat(f"watch of {self.kind.plural}")
            self._versions[namespace] = change.version
            if change.body is None:
                continue
            for key in self.store.observe(self.kind, change.body, gone=change.gone):
                self.notify(key)
