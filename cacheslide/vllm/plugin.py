"""`vllm.general_plugins` entry point: makes the connector known by name and has requests' marks read at the door."""

from cacheslide.vllm import CONNECTOR


def register() -> None:
    """Called by vLLM in every process, possibly more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    from cacheslide.vllm import door

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "cacheslide.vllm.connector", CONNECTOR)
    door.install()
