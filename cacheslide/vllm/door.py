"""Where vLLM takes requests in: marks are checked there, and every way to mark becomes token spans.

A connector meets a request only in the engine, where raising would take every other request down with it and where
neither text nor messages are known any more.
"""

from functools import wraps

from cacheslide.vllm.admission import CHAT, admit, serves
from cacheslide.vllm.servers import adapt_servers


def install() -> None:
    """Wrap the entry of vLLM's engines (once a process)."""
    from vllm.renderers.base import BaseRenderer
    from vllm.v1.engine.input_processor import InputProcessor

    plain = InputProcessor.process_inputs
    if hasattr(plain, "checks_marks"):
        return

    @wraps(plain)
    def process_inputs(self, request_id, prompt, params, *args, **kwargs):
        request = plain(self, request_id, prompt, params, *args, **kwargs)
        if serves(self.vllm_config):
            admit(request, prompt, self.renderer, self.vllm_config.kv_transfer_config.kv_connector_extra_config)
        return request

    process_inputs.checks_marks = True
    InputProcessor.process_inputs = process_inputs
    _keep_messages(BaseRenderer)


def _keep_messages(renderer_class) -> None:
    """Have a rendered chat carry its messages as far as `admit`."""
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
        adapt_servers()  # by now a server has loaded its modules
        rendered = await render_chat_async(self, conversations, chat_params, *args, **kwargs)
        return noted(self, conversations, chat_params, rendered)

    @wraps(render_cmpl_async)
    async def completion_async(self, *args, **kwargs):
        adapt_servers()
        return await render_cmpl_async(self, *args, **kwargs)

    renderer_class.render_chat, renderer_class.render_chat_async = chat, chat_async
    renderer_class.render_cmpl_async = completion_async
