"""Answers the handover server from the loader's state."""

import time

from headrace_handover.messages import Failure, Loading, Request
from headrace_handover.server import Offer, Peer
from headrace_loader.state import Attachment, LoaderState, Phase, RankState


class ResidentWeights:
    """The loader's weights as the handover server's `WeightSource`."""

    def __init__(self, state: LoaderState) -> None:
        self._state = state

    def answer(self, request: Request) -> Loading | Offer | Failure:
        """Return the weights, how far they are, or why they cannot be had."""
        state = self._state
        settings, held = state.settings, state.settings.ranks
        if request.rank not in held:
            return Failure(
                "RankUnknown",
                f"rank {request.rank}: the loader holds ranks {held[0]} to {held[-1]}; start the "
                f"engine with --tensor-parallel-size {settings.tensor_parallel_size}, and on this "
                "node if there are several",
            )
        with state.reading():
            if state.phase is Phase.FAILED:
                return Failure(state.reason, state.message)
            if state.phase is Phase.READY:
                return _offer(state.ranks[held.index(request.rank)], request)
            return Loading(state.read_bytes, state.total_bytes, state.message)

    def wait(self, request: Request, seconds: float) -> None:
        """Return once it is known whether the weights can be had, or after `seconds`."""
        self._state.wait_for(lambda: not isinstance(self.answer(request), Loading), seconds)

    def attached(self, peer: Peer) -> None:
        """Note an engine's hold."""
        with self._state.changing():
            self._state.attached[peer.connection] = Attachment(peer, time.time())
            self._state.attachments += 1

    def detached(self, peer: Peer) -> None:
        """Note the end of a hold."""
        with self._state.changing():
            attachment = self._state.attached.pop(peer.connection)
            attachment.ended = time.time()
            self._state.ended.append(attachment)

    def refused(self, reason: str) -> None:
        """Count a refusal."""
        with self._state.changing():
            self._state.refusals[reason] += 1


def _offer(rank: RankState, request: Request) -> Offer | Failure:
    if rank.offer is None:
        return Failure("InternalError", f"rank {rank.rank} is ready but has nothing to offer")
    if rank.device != request.device:
        return Failure(
            "DeviceMismatch",
            f"rank {rank.rank} is on {rank.device}, the engine asks for {request.device}; both "
            "containers must see the same devices in the same order",
        )
    return rank.offer
