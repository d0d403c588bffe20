"""The fixed request set in vLLM on the CPU: four kinds of annotations, batches, preemption, beams, histories, tiers."""

import hashlib
import json
import tempfile
from contextlib import closing
from typing import Any

from cacheslide.vllm.options import receipt_in
from harness.frozen.texts import NOTES, TURNS, parts, prompt

LAYER, CHUNK, ANSWER, SEPARATOR = 2, 48, 6, " ## "
SYSTEMS = ("cacheslide", "cacheslide_first_turn", "cacheblend", "epic", "naive_reuse", "prompt_cache", "context_cache")
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
ENGINE = {
    "dtype": "float32",
    "max_model_len": 768,
    "block_size": 32,
    "enforce_eager": True,
    "max_num_batched_tokens": 256,  # shorter than some prompts: exact prefills run in pieces
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 2**27,
}


def run(path: str) -> dict[str, Any]:
    """Outcomes by "kind/.../turn": receipts and greedy tokens, for the checkpoint folder `path`."""
    from harness.backends.in_process import prepare

    prepare("cpu", eager=True)
    from cacheslide.vllm.offline import close_engine, open_engine

    connector = {"policy": "cacheslide", "chunk_size": CHUNK, "encode": "now", "store_gib": 0.25, "span_tokens": 16}
    connector |= {"max_generation": 2}
    out: dict[str, Any] = {}
    engine = open_engine(path, connector, **ENGINE)
    with closing(_Closing(engine, close_engine)):
        asks = _Asks(engine)
        for way in (_systems, _ways, _batched, _preempted, _beams, _histories):
            asks.forget()
            out |= way(asks)
    with tempfile.TemporaryDirectory() as folder:
        below = {
            "path": folder,
            "file_gib": 0.25,
            "shards": 2,
            "direct": False,
            "host_gib": 0.25,
            "chunk_tokens": CHUNK,
        }
        for start in ("first", "second"):  # the second engine reuses the first one's chunks
            engine = open_engine(path, connector, store=below, **ENGINE)
            with closing(_Closing(engine, close_engine)):
                asks = _Asks(engine)
                out |= {f"tiers/{start}/{turn}": asks.segments(turn, policy="cacheslide") for turn in range(2)}
    return out


class _Closing:
    def __init__(self, engine, close) -> None:
        self.close = lambda: close(engine)


class _Asks:
    """Sends requests to one engine and collects their outcomes."""

    def __init__(self, engine) -> None:
        self.engine, self.tokenizer = engine, engine.get_tokenizer()

    def forget(self) -> None:
        """Empty the store and the prefix cache, as after a start."""
        self.engine.reset_prefix_cache(reset_connector=True)

    def sampling(self, annotations: dict[str, Any] | None, tokens: int = ANSWER):
        from vllm import SamplingParams

        extra = None if annotations is None else {"kv_transfer_params": {"cacheslide": annotations}}
        return SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, logprobs=5, extra_args=extra)

    def annotated(self, turn: int, question: int = 0, **annotations: Any) -> tuple[list[int], dict[str, Any]]:
        """A turn's token ids, and the annotations of its fixed segments."""
        from cacheslide.vllm.options import annotations_of

        asked = prompt(self.tokenizer, turn, question)
        return list(asked.token_ids), annotations_of(asked, **{"layer": LAYER, **annotations})["cacheslide"]

    def generate(self, prompts: list, annotations: list, tokens: int = ANSWER) -> list[dict[str, Any]]:
        """Outcomes of requests that arrive together."""
        params = [self.sampling(m, tokens) for m in annotations]
        return [outcome(o) for o in self.engine.generate(prompts, params, use_tqdm=False)]

    def segments(self, turn: int, **annotations: Any) -> dict[str, Any]:
        """The outcome of a turn annotated by token spans."""
        ids, given = self.annotated(turn, **annotations)
        return self.generate([{"prompt_token_ids": ids}], [given])[0]


def outcome(output: Any) -> dict[str, Any]:
    """Receipt, greedy tokens, and the bits of their log-probabilities in one of vLLM's outputs."""
    receipt, done = receipt_in(output.kv_transfer_params), output.outputs[0]
    said = [sorted((token, p.logprob) for token, p in step.items()) for step in done.logprobs]
    bits = hashlib.sha256(json.dumps(said).encode()).hexdigest()
    return {"receipt": receipt, "tokens": list(done.token_ids), "bits": bits}


def _systems(asks: _Asks) -> dict[str, Any]:
    """Every system turn by turn, then the same prompts without annotations."""
    out = {f"{name}/{t}": asks.segments(t, policy=name, namespace=name) for name in SYSTEMS for t in range(TURNS)}
    plain = [{"prompt_token_ids": asks.annotated(t)[0]} for t in range(TURNS)]
    return out | {f"plain/{t}": o for t, o in enumerate(asks.generate(plain, [None] * TURNS))}


def _ways(asks: _Asks) -> dict[str, Any]:
    """Annotation by separators, chat messages, and previously seen spans."""
    out = {}
    for turn in range(TURNS):
        texts = [text for _, text in parts(turn)]
        roles = [str(role.value) for role, _ in parts(turn)]
        annotations = {"separator": SEPARATOR, "roles": roles, "layer": LAYER, "namespace": "separator"}
        out[f"separator/{turn}"] = asks.generate([SEPARATOR.join(texts)], [annotations])[0]
        found = {"find": True, "layer": LAYER, "namespace": "find"}
        out[f"find/{turn}"] = asks.generate([{"prompt_token_ids": asks.annotated(turn)[0]}], [found])[0]
        senders = ("system", "user", "tool", "tool", "user")
        messages = [{"role": sender, "content": text} for sender, text in zip(senders, texts, strict=True)]
        chat = asks.sampling({"messages": {"updated": [1]}, "layer": LAYER, "namespace": "messages"})
        answer = asks.engine.chat(messages, chat, chat_template=TEMPLATE, use_tqdm=False)[0]
        out[f"messages/{turn}"] = outcome(answer)
    return out


def _batched(asks: _Asks) -> dict[str, Any]:
    """Annotated and unannotated requests that arrive together, after a turn that filled the store."""
    asks.segments(0)
    turns = [asks.annotated(t, question) for t in range(TURNS) for question in (0, 1)]
    annotations = [m if i % 3 else None for i, (_, m) in enumerate(turns)]
    found = asks.generate([{"prompt_token_ids": ids} for ids, _ in turns], annotations)
    return {f"batched/{i}": o for i, o in enumerate(found)}


def _preempted(asks: _Asks) -> dict[str, Any]:
    """A request that is preempted while it decodes."""
    asks.segments(0)
    engine, done = asks.engine.llm_engine, {}
    ids, annotations = asks.annotated(1)
    for name, given in (("marked", annotations), ("plain", None)):
        engine.add_request(name, {"prompt_token_ids": ids}, asks.sampling(given, 12))
    for step in range(200):
        if step == 5:
            engine.engine_core.engine_core.scheduler.reset_prefix_cache(reset_running_requests=True)
        done |= {o.request_id: o for o in engine.step() if o.finished}
        if len(done) == 2:
            break
    return {f"preempted/{name}": outcome(o) for name, o in done.items()}


def _beams(asks: _Asks) -> dict[str, Any]:
    from vllm.sampling_params import BeamSearchParams

    from cacheslide.vllm.offline import beam_search

    asks.segments(0)
    ids, annotations = asks.annotated(1)
    params = BeamSearchParams(beam_width=3, max_tokens=4)
    found = beam_search(asks.engine, [{"prompt_token_ids": ids}], params, [{"cacheslide": annotations}])[0]
    return {"beams": {"receipt": found.receipt, "tokens": [list(s.tokens)[len(ids) :] for s in found.sequences]}}


def _histories(asks: _Asks) -> dict[str, Any]:
    """Generated text becomes fixed text of the next turn, with corrected or exact KV."""
    from cacheslide.vllm.turns import Turns

    def encode(text: str) -> list[int]:
        return asks.tokenizer.encode(text, add_special_tokens=False)

    out = {}
    for system in ("naive_reuse", "cacheslide"):
        talk = Turns(asks.tokenizer.encode(parts(0)[0][1]))
        talk.add(encode(parts(0)[2][1]))
        for turn in range(4):
            notes = encode(NOTES[turn % TURNS] * (1 + turn // 2))
            ids, annotations = talk.prompt(notes, encode(parts(0)[-1][1]), policy=system, layer=LAYER, namespace="h")
            out[f"history/{system}/{turn}"] = asks.generate([{"prompt_token_ids": ids}], [annotations])[0]
            talk.answered(out[f"history/{system}/{turn}"]["tokens"])
    return out
