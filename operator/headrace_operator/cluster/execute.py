"""Execution of plans: only what differs is written, and never over what others control."""

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

from headrace_operator.cluster.api import FIELD_MANAGER, Api, Object
from headrace_operator.cluster.kinds import (
    EVENT,
    MODEL_DEPLOYMENT,
    WATCHED,
    Kind,
    kind_named,
)
from headrace_operator.cluster.store import Store, key_of
from headrace_operator.errors import (
    ApiError,
    Conflict,
    Forbidden,
    Invalid,
    KindNotServed,
    NamespaceTerminating,
    NotFound,
)
from headrace_operator.plan import Deletion, Desired, Plan, Rejection, Scale, Transition
from headrace_operator.plan.names import (
    FINALIZER,
    MANAGED_BY_LABEL,
    OWNER_LABEL,
    digest,
)
from headrace_operator.plan.objects import (
    controller_uid,
    format_time,
    is_deleting,
    items,
    mapping,
    name_of,
    text,
    uid_of,
)
from headrace_operator.plan.world import NAME_CONFLICT

_FOR_GOOD = (Invalid, Forbidden, KindNotServed)
_MAX_APPLIED = 10_000
_logger = logging.getLogger(__name__)


class Executor:
    """Carries out the plans of ModelDeployments."""

    def __init__(self, api: Api, store: Store) -> None:
        self._api = api
        self._store = store
        # Digest of what was applied last and the generation it led to, by UID: a value that the
        # API server writes in another way than given differs for ever, but is applied once.
        self._applied: dict[str, tuple[str, str]] = {}

    async def write_children(self, resource: Object, plan: Plan) -> tuple[Rejection, ...]:
        """Delete, apply and scale children; return what was refused for good.

        Raises:
            ApiError: a request failed and should be tried again.
        """
        # What no pod needs goes first: however often this is cut short, no more than one shard
        # Job is at work.
        for deletion in plan.delete:
            await self.delete(deletion)
        rejections = []
        for desired in plan.apply:
            rejection = await self._apply(resource, desired)
            if rejection is not None:
                rejections.append(rejection)
        if plan.scale is not None:
            await self._scale(resource, plan.scale)
        return tuple(rejections)

    async def write_finalizer(self, resource: Object, plan: Plan) -> Object:
        """Set or remove our finalizer, where the plan says so and it differs.

        Returns the resource as it is then.

        Raises:
            ApiError: the request failed and should be tried again.
        """
        present = mapping(resource, "metadata").get("finalizers", ())
        if plan.finalizer is None or plan.finalizer == (FINALIZER in present):
            return resource
        others = [name for name in present if name != FINALIZER]
        wanted = [*others, FINALIZER] if plan.finalizer else others
        try:
            written = await self._api.set_finalizers(MODEL_DEPLOYMENT, resource, wanted)
        except NotFound:
            return resource
        if wanted or not is_deleting(resource):
            self._store.put(MODEL_DEPLOYMENT, written)
        else:
            self._store.remove(MODEL_DEPLOYMENT, written)
        return written

    async def write_status(self, resource: Object, status: Mapping[str, Any]) -> Object:
        """Write the status if it differs. A ModelDeployment that is gone needs none.

        It is of the state that was read: what a newer one already says, be it another
        operator's, is not replaced. Returns the resource as it is then.

        Raises:
            ApiError: it is not written; a Conflict if the resource is a newer one by now.
        """
        if resource.get("status") == status["status"]:
            return resource
        version = {"resourceVersion": text(resource, "metadata", "resourceVersion")}
        metadata = {**status["metadata"], "uid": uid_of(resource), **version}
        body = {**status, "metadata": metadata}
        try:
            written = await self._api.apply(body, subresource="status")
        except NotFound:
            return resource
        self._store.put(MODEL_DEPLOYMENT, written)
        return written

    async def report(self, resource: Object, transition: Transition, now: datetime) -> None:
        """Report a transition as an event; the same transition is reported once."""
        namespace = text(resource, "metadata", "namespace")
        event = {
            "apiVersion": "v1",
            "kind": EVENT.name,
            "metadata": {
                "name": f"{name_of(resource)[:200]}.{transition.key}",
                "namespace": namespace,
            },
            "involvedObject": {
                "apiVersion": MODEL_DEPLOYMENT.api_version,
                "kind": MODEL_DEPLOYMENT.name,
                "namespace": namespace,
                "name": name_of(resource),
                "uid": uid_of(resource),
                "resourceVersion": text(resource, "metadata", "resourceVersion"),
            },
            "type": "Warning" if transition.warning else "Normal",
            "reason": transition.reason,
            "message": f"{transition.condition}: {transition.message}",
            "firstTimestamp": format_time(now),
            "lastTimestamp": format_time(now),
            "count": 1,
            "source": {"component": FIELD_MANAGER},
            "reportingComponent": FIELD_MANAGER,
            "reportingInstance": "",
        }
        try:
            await self._api.create(event)
        except (Conflict, NamespaceTerminating):
            return
        except ApiError as error:
            # Events are a courtesy: the state itself is in the status.
            _logger.warning("event not reported: %s", error, extra={"event": transition.key})

    async def delete(self, deletion: Deletion) -> None:
        """Delete an object unless it is gone; a Conflict is raised if it is another one by now."""
        kind = kind_named(deletion.kind)
        try:
            await self._api.delete(kind, deletion.name, deletion.namespace, deletion.uid)
        except NotFound:
            return
        self._applied.pop(deletion.uid, None)
        _logger.info("deleted %s %s", kind.name, deletion.name)

    async def _apply(self, resource: Object, desired: Desired) -> Rejection | None:
        body = desired.body
        kind, name = kind_named(body["kind"]), name_of(body)
        try:
            live = await self._live(resource, kind, body)
            if live is not None and not _is_ours(resource, body, live):
                message = f"exists and {_whose(live)}; delete or rename one of them"
                return Rejection(kind.name, name, NAME_CONFLICT, message)
            if live is not None and (desired.once or self._is_applied(body, live)):
                await self._label(kind, body, live)
                return None
            written = await self._api.apply(_with_uid(body, live))
        except _FOR_GOOD as error:
            return Rejection(kind.name, name, error.reason, str(error))
        if kind in WATCHED:
            self._store.put(kind, written)
        if len(self._applied) >= _MAX_APPLIED:
            self._applied.clear()  # costs no more than applying everything once more
        self._applied[uid_of(written)] = _mark(body, written)
        _logger.info("applied %s %s", kind.name, name)
        return None

    async def _live(self, resource: Object, kind: Kind, body: Mapping[str, Any]) -> Object | None:
        """Return the live object; one without our label is in no watch but may have the name."""
        namespace = text(body, "metadata", "namespace") or None
        if kind in WATCHED:
            child = self._store.child(kind, key_of(resource), name_of(body))
            if child is not None:
                return child
        try:
            return await self._api.get(kind, name_of(body), namespace)
        except NotFound:
            return None

    async def _label(self, kind: Kind, body: Mapping[str, Any], live: Object) -> None:
        """Restore the labels of an object: without them no watch shows it."""
        labels = body["metadata"]["labels"]
        if not _holds(labels, mapping(live, "metadata", "labels")):
            change = {"metadata": {"labels": labels}}
            await self._api.merge(kind, name_of(body), text(body, "metadata", "namespace"), change)

    def _is_applied(self, body: Mapping[str, Any], live: Object) -> bool:
        if self._applied.get(uid_of(live)) == _mark(body, live):
            return _holds(body["metadata"], live["metadata"])
        return _holds(body, live)

    async def _scale(self, resource: Object, scale: Scale) -> None:
        namespace = text(resource, "metadata", "namespace")
        try:
            await self._api.merge(
                kind_named(scale.kind), scale.name, namespace, {"spec": dict(scale.spec)}
            )
        except NotFound:
            return
        _logger.info("changed %s %s: %s", scale.kind, scale.name, dict(scale.spec))


def _is_ours(resource: Object, body: Mapping[str, Any], live: Object) -> bool:
    if "ownerReferences" in body["metadata"]:
        return controller_uid(live) == uid_of(resource)
    # Without an owner are volumes, which a namespaced object cannot own, and claims that
    # outlive the ModelDeployment: they are told by all of their labels.
    labels = body["metadata"]["labels"]
    return not controller_uid(live) and _holds(labels, mapping(live, "metadata", "labels"))


def _whose(live: Object) -> str:
    """Say whose an object is that has the name of a child."""
    owners = items(live, "metadata", "ownerReferences")
    owner = next((o for o in owners if o.get("controller") is True), None)
    if owner is not None:
        return f"is controlled by {text(owner, 'kind')} {text(owner, 'name')}"
    labels = mapping(live, "metadata", "labels")
    if text(labels, OWNER_LABEL):
        return f"is left over from a ModelDeployment {text(labels, OWNER_LABEL)}, without an owner"
    manager = text(labels, MANAGED_BY_LABEL)
    return f"is managed by {manager}" if manager else "was made by someone else"


def _with_uid(body: Mapping[str, Any], live: Object | None) -> Mapping[str, Any]:
    """Let the API server refuse the write if the object is another one by now."""
    if live is None:
        return body
    return {**body, "metadata": {**body["metadata"], "uid": uid_of(live)}}


def _mark(body: Mapping[str, Any], live: Object) -> tuple[str, str]:
    metadata = mapping(live, "metadata")
    # A status that changes is no reason to apply the rest again.
    return digest(body, 16), str(metadata.get("generation") or metadata.get("resourceVersion"))


def _holds(desired: object, live: object) -> bool:
    """Whether a live value has everything of a desired one; lists are compared as a whole."""
    if desired == live:
        return True
    if isinstance(desired, (dict, Mapping)) and isinstance(live, (dict, Mapping)):
        return all(key in live and _holds(value, live[key]) for key, value in desired.items())
    if isinstance(desired, list) and isinstance(live, list):
        same_length = len(desired) == len(live)
        return same_length and all(map(_holds, desired, live))
    return False
