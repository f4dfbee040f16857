"""Ray Serve's request router for tasks: `affinity` over the loads that Serve knows."""

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from polyhead.server.scale.affinity import choose


class TaskRouter(RequestRouter):
    """Sends the calls of one task to one replica as long as that has room.

    The task stands in `multiplexed_model_id`, which a handle's options carry. Its replicas need
    not be decorated with `serve.multiplexed`: every one can answer for every task.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas; Serve takes the least loaded of the first rank that takes calls."""
        known = {str(replica.replica_id): replica for replica in candidate_replicas}
        loads = {name: self._load(replica) for name, replica in known.items()}
        key = pending_request.metadata.multiplexed_model_id if pending_request else ""
        return [[known[name] for name in rank] for rank in choose(key, loads)]

    def _load(self, replica: RunningReplica) -> int:
        return self.replica_queue_len_cache.get(replica.replica_id) or 0
