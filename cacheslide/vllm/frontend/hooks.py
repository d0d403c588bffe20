"""Hooks where vLLM receives requests: annotations are checked there and turned into token spans.

A connector sees a request only inside the engine, where an exception would end every other request too, and where
neither text nor messages are available. A server's requests are checked before any part is scheduled or streamed: all
prompts of a body, so that one invalid prompt refuses the whole body.
"""

from functools import wraps

from cacheslide.vllm.frontend.admission import CHAT, Limits, admit, options_of, serves
from cacheslide.vllm.frontend.intake import taken
from cacheslide.vllm.frontend.openai_server import adapt_servers
from cacheslide.vllm.support import keep_connector


def install() -> None:
    """Wrap the request methods of vLLM's engines (once a process)."""
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.async_llm import AsyncLLM
    from vllm.v1.engine.input_processor import InputProcessor

    if is_installed():
        return
    plain = InputProcessor.process_inputs

    @wraps(plain)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        if not serves(self.vllm_config):
            return plain(self, request_id, prompt, params, *args, **kwargs)
        if not kwargs.get("resumable"):
            prompt, params = taken(self.vllm_config, self.renderer, prompt, params)
        request = plain(self, request_id, prompt, params, *args, **kwargs)
        if getattr(params, "extra_args", None):  # prompts rendered only now, or streamed in pieces
            extra = self.vllm_config.kv_transfer_config.kv_connector_extra_config
            admit(request, prompt, self.renderer, extra, Limits.of(self.vllm_config))
        return request

    process_inputs.checks_annotations = True
    InputProcessor.process_inputs = process_inputs
    _check_early(AsyncLLM)
    _keep_messages(BaseRenderer)
    keep_connector()


def is_installed() -> bool:
    """Whether requests received by this process are checked."""
    from vllm.v1.engine.input_processor import InputProcessor

    return hasattr(InputProcessor.process_inputs, "checks_annotations")


def _check_early(engine_class) -> None:
    """Make a server's engine check annotations on the call itself, before its result is awaited."""
    plain, opened = engine_class.generate, engine_class.__init__

    @wraps(opened)
    def __init__(self, vllm_config, *args, **kwargs):
        opened(self, vllm_config, *args, **kwargs)
        if serves(vllm_config):
            adapt_servers(bodies=True)  # the server has loaded its modules by now
            options_of(vllm_config.kv_transfer_config.kv_connector_extra_config).system  # noqa: B018 (cached)

    @wraps(plain)
    def generate(self, prompt, sampling_params, *args, **kwargs):
        if serves(self.vllm_config):
            prompt, sampling_params = taken(self.vllm_config, self.renderer, prompt, sampling_params, in_place=True)
        return plain(self, prompt, sampling_params, *args, **kwargs)

    engine_class.__init__, engine_class.generate = __init__, generate


def _keep_messages(renderer_class) -> None:
    """Make a rendered chat carry its messages to `admit`."""
    render_chat, render_chat_async = renderer_class.render_chat, renderer_class.render_chat_async
    render_cmpl_async = renderer_class.render_cmpl_async

    def noted(renderer, conversations, chat_params, rendered):
        if serves(renderer.config):
            for messages, prompt in zip(conversations, rendered[1], strict=True):
                prompt[CHAT] = (messages, chat_params)
        return rendered

    @wraps(render_chat)
    def chat(self, conversations, chat_params, *args, **kwargs):
        return noted(self, conversations, chat_params, render_chat(self, conversations, chat_params, *args, **kwargs))

    @wraps(render_chat_async)
    async def chat_async(self, conversations, chat_params, *args, **kwargs):
        adapt_servers()  # the server has loaded its modules by now
        rendered = await render_chat_async(self, conversations, chat_params, *args, **kwargs)
        return noted(self, conversations, chat_params, rendered)

    @wraps(render_cmpl_async)
    async def completion_async(self, *args, **kwargs):
        adapt_servers()
        return await render_cmpl_async(self, *args, **kwargs)

    renderer_class.render_chat, renderer_class.render_chat_async = chat, chat_async
    renderer_class.render_cmpl_async = completion_async
