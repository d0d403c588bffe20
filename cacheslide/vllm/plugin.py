"""`vllm.general_plugins` entry point: registers the connector and the CoPE model, and hooks request intake."""

from cacheslide.vllm import CONNECTOR


def register() -> None:
    """Called by vLLM in every process, possibly several times."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
    from vllm.model_executor.models import ModelRegistry

    from cacheslide.vllm.cope.setting import ARCHITECTURE
    from cacheslide.vllm.frontend import hooks as door

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "cacheslide.vllm.connector", CONNECTOR)
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"cacheslide.vllm.cope.model:{ARCHITECTURE}")
    door.install()
