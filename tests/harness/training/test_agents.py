"""The agents' model: its vocabulary, its training rows against the real loops, the shipped checkpoint."""

from contextlib import closing
from random import Random

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from cacheslide.policies.registry import load_policy
from cacheslide.store.memory import MemoryChunkStore
from harness.agents.completer import Request, Scripted
from harness.agents.dry import DrySWEAgent
from harness.agents.loop import run_episode
from harness.agents.oracle import ORACLES, NoContext, oracle
from harness.agents.registry import AGENTS
from harness.agents.sandbox import missing
from harness.agents.swe_agent import SWEAgent
from harness.agents.tasks import fix_tasks
from harness.backends.reference import EngineSettings, ReferenceBackend
from harness.tasks.example import TextSegment
from harness.training import checkpoint
from harness.training.agent_data import AgentStream
from harness.training.agent_evaluate import Batched, episodes, exact
from harness.training.agent_rows import STATES, STEPS, Encoder, RowsOf, rows, state_row, step_row
from harness.training.agent_tasks import Difficulty, episode
from harness.training.agent_words import agent_tokenizer
from harness.training.data import LINK, OUTPUT, QUESTION, SETTLED
from harness.training.model import Trainee, llama
from tests.helpers.places import ROOT

pytestmark = pytest.mark.slow

SHIPPED = ROOT / "models" / "tiny-agents-3m"
sandboxed = pytest.mark.skipif(bool(missing()), reason=missing())


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return agent_tokenizer()


@pytest.fixture(scope="module")
def encoder(tokenizer) -> Encoder:
    return Encoder(tokenizer)


def test_every_word_is_one_token_and_any_text_round_trips(tokenizer):
    text = '\n4 amber_acorn = "glass ten"\n edit 4 amber_acorn = lambda x, y: x + y'
    assert len(tokenizer.encode(text).ids) == 27
    for text in ("", "Héllo — 你好 🎉\tx  y\r\n  def f(x): return x+1\n\n", "\x00\x7f", " remembered"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


@sandboxed
def test_swe_agent_in_memory_shows_the_prompts_of_the_worktree():
    for task in fix_tasks("test", 7, 3):
        shown = []
        for kind in (SWEAgent, DrySWEAgent):
            with closing(kind(task)) as agent:
                done = run_episode(agent, oracle("swe_agent"))
                shown.append([(s.segments, s.call, s.result, s.error) for s in done.steps] + [done.score, done.stop])
        assert shown[0] == shown[1] and shown[0][-2] == 1.0


def test_swe_agent_in_memory_judges_wrong_patches_and_wrong_calls():
    task = next(iter(fix_tasks("test", 1, 1)))
    says = [f"open {task.path}", "open nowhere", f"edit {task.line} x = 1", "edit 99 x", "test", "submit"]
    done = run_episode(DrySWEAgent(task), Scripted("wrong", lambda r: says[r.step]))
    assert done.score == 0.0 and [s.result for s in done.steps][-2:] == ["failed", "submitted"]
    assert [bool(s.error) for s in done.steps] == [False, True, False, True, False, False]


@pytest.mark.parametrize("name", [*STATES, *STEPS])
def test_rows_are_prompts_of_the_loops_with_the_oracles_outputs(tokenizer, encoder, name):
    """Each output of a row is the oracle's answer to the very prompt that a loop would show there."""
    checked = 0
    for seed in range(6):
        rng = Random(seed)
        for shown in episode(rng, name, "validation", slips=0.2):
            prompt = shown.agent.prompt()
            real = tokenizer.encode("".join(s.text for s in prompt)).ids
            row = step_row(encoder, prompt, shown.output)
            if name in STATES:
                row = state_row(rng, encoder, shown.agent, RowsOf({name: 1}, 1600, 1, questions=(3, 6)))
                slot = "question" if name == "reflexion" else "message"
                at = next(i for i, s in enumerate(prompt) if s.name == slot)
                checked += _check_questions(tokenizer, prompt[:at], row, name)
                real = tokenizer.encode("".join(s.text for s in prompt[:at])).ids
            assert row.ids[: len(real)] == real
            if name in STEPS:
                said = tokenizer.decode(row.ids[len(real) :])
                assert said == shown.output and row.ids[-1] == encoder.eos
                checked += 1
            for position, token, *_, kind, _, _, _, _ in row.labels:
                assert kind != OUTPUT or row.ids[position + 1] == token
    assert checked > 20


def _check_questions(tokenizer, state, row, name) -> int:
    text = tokenizer.decode(row.ids[:1] + row.ids[1:], skip_special_tokens=False).removeprefix("<s>")
    tails = text[len("".join(s.text for s in state)) :].split("</s>")[:-1]
    slot = "question" if name == "reflexion" else "message"
    for tail in tails:
        asking, output = tail.split("\nCall:")
        asking = asking.partition("\nError:")[0]
        question, _, feedback = asking.partition("\nFeedback:")
        extra = [TextSegment(slot, question, "recompute")]
        if feedback:
            extra.append(TextSegment("feedback", "\nFeedback:" + feedback, "recompute"))
        assert ORACLES[name](Request("s", 0, (*state, *extra), 48)) == output
    return len(tails)


def test_labels_say_what_statements_and_questions_resolve_to(tokenizer, encoder):
    found = {SETTLED: 0, LINK: 0, QUESTION: 0}
    source = rows(Random(0), RowsOf({"reflexion": 1, "memgpt": 1}, 1600, 1), encoder)
    for _ in range(30):
        row = next(source)
        for position, first, second, hops, kind, *_ in row.labels:
            if kind == SETTLED:
                assert row.ids[position - 2 : position] == [first, second] and hops == 0
            if kind == QUESTION:
                said = [row.ids.index(t, position) for t in (first, second)]
                assert said[1] == said[0] + 1 and tokenizer.decode(row.ids[position : position + 1]) == " ?"
            if kind in found:
                found[kind] += 1
                assert position in row.scratch
    assert min(found.values()) > 50


def test_harder_rows_still_fit_and_the_split_is_kept(encoder, tokenizer):
    spec = RowsOf({"memgpt": 1}, 1600, 1, Difficulty(chunks=(3, 4), turns=(12, 14)))
    lengths = [len(next(source).ids) for source in [rows(Random(1), spec, encoder)] for _ in range(10)]
    assert max(lengths) <= 1600 and max(lengths) > 1200


@pytest.fixture(scope="module")
def small(tokenizer) -> Trainee:
    torch.manual_seed(0)
    return Trainee(llama(1104, bos=1, eos=2, pad=0, layers=2, hidden=32, heads=2, ff=32)).eval()


def test_batched_answers_are_those_of_single_requests(small, tokenizer):
    """Padding and company change nothing."""
    completer = Batched(small, tokenizer)
    try:
        prompts = ["\nCall:", "\nQuestion: what is amber acorn ?" * 12, "\nUser: hello"]
        jobs = [(tokenizer.encode(p).ids, 5, None) for p in prompts]
        together = completer._answers(jobs)
        assert together == [completer._answers([j])[0] for j in jobs]
    finally:
        completer.close()
    done = episodes(oracle("function_calling"), "function_calling", "test", 0, 3)
    assert [e.success for e in done] == [True] * 3
    bare = episodes(NoContext(oracle("swe_agent")), "swe_agent", "test", 0, 3)
    assert [e.success for e in bare] == [False] * 3


def test_a_batch_has_a_part_for_each_source(tokenizer):
    parts = [
        [RowsOf({"memgpt": 1}, 640, 2, Difficulty(chunks=(1, 1), turns=(2, 4)))],
        [RowsOf({"swe_agent": 1}, 300, 3)],
    ]
    state, step = next(iter(AgentStream(parts, tokenizer, 0, "seed")))
    assert state["ids"].shape == (2, 640) and step["ids"].shape == (3, 300) and len(step["scratch"]) == 0
    assert set(AGENTS) == {*STATES, *STEPS}


def test_a_tied_checkpoint_reads_back_and_stores_no_second_copy(tokenizer, tmp_path):
    torch.manual_seed(1)
    tied = Trainee(llama(1104, bos=1, eos=2, pad=0, layers=2, hidden=32, heads=2, ff=32, tied=True))
    checkpoint.save(tied, tokenizer, tmp_path, 48)
    assert "lm_head.weight" not in load_file(tmp_path / "model-00001-of-00001.safetensors")
    other = Trainee(llama(1104, bos=1, eos=2, pad=0, layers=2, hidden=32, heads=2, ff=32, tied=True))
    checkpoint.load(other, tmp_path)
    for a, b in zip(tied.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a.bfloat16().float(), b)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ids = torch.randint(3, 1000, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, other.lm(ids).logits)


def test_the_shipped_checkpoint_is_read_alike_by_transformers_and_the_engine(tokenizer):
    assert sum(p.stat().st_size for p in SHIPPED.iterdir()) <= 6.2 * 2**20
    prompt = next(episode(Random(0), "swe_agent", "validation")).agent.prompt()
    text = "".join(s.text for s in prompt)
    ids = AutoTokenizer.from_pretrained(SHIPPED)(text).input_ids
    assert ids == tokenizer.encode(text).ids
    backend = ReferenceBackend(SHIPPED)
    ours = backend.prompt(prompt)
    assert [t for s in ours.segments for t in s.token_ids] == ids
    engine = backend.engine(load_policy("recompute"), MemoryChunkStore(), EngineSettings())
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(SHIPPED, dtype=torch.float32)(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(engine.prefill(ours).logits, theirs, atol=1e-3, rtol=1e-3)


def test_the_shipped_model_says_what_the_oracles_say(tokenizer):
    """Teacher-forced on a few test rows, in float32."""
    model = Trainee(llama(1104, bos=1, eos=2, pad=0, layers=8, hidden=192, heads=6, ff=336))
    checkpoint.load(model, SHIPPED)
    scores = exact(model, tokenizer, "test", 0, 3, Difficulty(chunks=(1, 1), turns=(2, 4)))
    assert min(s["exact"] for s in scores.values()) >= 0.7
    assert scores["swe_agent teacher-forced"]["exact"] == scores["function_calling teacher-forced"]["exact"] == 1.0
