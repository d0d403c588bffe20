"""`vllm.general_plugins` entry point: makes the connector known by name and has marks checked at the door."""

from functools import wraps

from cacheslide.errors import CacheSlideError, PolicyError
from cacheslide.vllm import CONNECTOR
from cacheslide.vllm.params import Marks


def register() -> None:
    """Called by vLLM in every process, possibly more than once."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    if CONNECTOR not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(CONNECTOR, "cacheslide.vllm.connector", CONNECTOR)
    check_marks_at_the_door()


def check_marks_at_the_door() -> None:
    """Have malformed marks refused where vLLM validates requests, so that a server answers 400 with the reason.

    A connector meets a request only in the engine, where raising would take every other request down with it.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    plain = InputProcessor.process_inputs
    if hasattr(plain, "checks_marks"):
        return

    @wraps(plain)
    def process_inputs(self, *args, **kwargs):
        request = plain(self, *args, **kwargs)
        transfer = self.vllm_config.kv_transfer_config
        if transfer is not None and transfer.kv_connector == CONNECTOR:
            check_request(request, transfer.kv_connector_extra_config)
        return request

    process_inputs.checks_marks = True
    InputProcessor.process_inputs = process_inputs


def check_request(request, extra_config: dict) -> None:
    """VLLMValidationError (HTTP 400) when a request's marks are malformed or do not fit its prompt."""
    from vllm.exceptions import VLLMValidationError

    extra = getattr(request.sampling_params, "extra_args", None) or {}
    params = extra.get("kv_transfer_params")
    try:
        marks = Marks.parse(params)
        if marks is None:
            return
        policy = marks.system(extra_config.get("policy", "cacheslide"))
        prompt = marks.prompt(request.prompt_token_ids or ())
        if policy.transform(prompt) != prompt:
            raise PolicyError(f"{policy.name} rewrites prompts: apply its transform before sending")
    except CacheSlideError as wrong:
        raise VLLMValidationError(str(wrong), parameter="kv_transfer_params") from None
