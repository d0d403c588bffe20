"""What a policy keeps beside its chunks: a memory of this file's own, and who keeps notes."""

from dataclasses import dataclass, replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from cacheslide.core.engine import ReuseEngine
from cacheslide.core.keys import CacheIdentity, ContentKeying
from cacheslide.core.plan import make_plan
from cacheslide.errors import StoreError
from cacheslide.models.reference import ReferenceDecoder
from cacheslide.policies.base import ReusePolicy
from cacheslide.policies.encodings import ENCODINGS
from cacheslide.policies.memory import NoMemory
from cacheslide.policies.none import NoCorrection
from cacheslide.store import DirectoryChunkStore, MemoryChunkStore
from tests.helpers.chunks import chunk
from tests.helpers.prompts import chain, dense, prompt
from tests.helpers.tiered import PAGES, key, store

BEFORE, NOW = prompt(7, 3), prompt(13, 5)


@dataclass(frozen=True)
class LastKeys(NoMemory):
    """Keeps the prompt's own keys of a chunk's last layer; doubles them on request; counts what it learns."""

    name: str = "last_keys"
    refuses: bool = False

    def notes(self, model, plan, number, chunk, prompt):
        where = plan.chunks[number]
        rows = torch.arange(where.start, where.end)
        return {"keys": prompt().read(model.num_layers - 1, rows)[0], "learned": torch.zeros(1, dtype=torch.int64)}

    def recall(self, model, plan, found):
        if self.refuses:
            return replace(found, pieces=[], spans=[]), "not today"
        doubled = [replace(p, chunk=replace(p.chunk, v=2 * p.chunk.v)) for p in found.pieces]
        return replace(found, pieces=doubled), ""

    def learn(self, model, plan, number, chunk, kv):
        return {**chunk.notes, "learned": chunk.notes["learned"] + 1} if number % 2 else None


def policy(encoding: str, **settings) -> ReusePolicy:
    made = replace(chain(NoCorrection(), encoding), memory=LastKeys(**settings))
    return replace(made, keying=ContentKeying()) if encoding == "isolated" else made


@pytest.mark.parametrize("encoding", ["in_prompt", "fixed_chain", "isolated"])
def test_notes_are_made_of_the_prompt_whatever_a_chunk_is_encoded_in(model: ReferenceDecoder, encoding):
    engine = ReuseEngine(model, policy(encoding), MemoryChunkStore(), chunk_size=16)
    assert engine.policy.encoding == ENCODINGS[encoding]
    engine.build(BEFORE)
    trace, _ = dense(model, torch.tensor(BEFORE.token_ids), torch.arange(len(BEFORE)))
    for name, where in engine.plan(BEFORE).keyed:
        kept = engine.store.get(name)
        torch.testing.assert_close(kept.notes["keys"], trace[-1][1][where.start : where.end], atol=1e-4, rtol=1e-3)
        assert kept.nbytes == replace(kept, notes={}).nbytes + kept.notes["keys"].nbytes + 8
        assert kept.to(torch.bfloat16).notes.keys() == kept.notes.keys()
    fixed, alone = 77, 84 - 7
    extra = {"in_prompt": 0, "fixed_chain": 84, "isolated": 84}[encoding]
    own = {"in_prompt": 84, "fixed_chain": fixed, "isolated": alone}[encoding]
    assert engine.encoder.row_layers == (own + extra) * model.num_layers  # one prefill of the prompt, at most


def test_what_is_recalled_is_served_and_the_stored_chunk_stays(model):
    engine = ReuseEngine(model, policy("in_prompt"), MemoryChunkStore(), chunk_size=16)
    engine.build(BEFORE)
    done = engine.prefill(BEFORE)
    for name, where in engine.plan(BEFORE).keyed:
        torch.testing.assert_close(done.kv.v[:, where.start : where.end], 2 * engine.store.get(name).v)
    assert done.receipt.tokens_reused == 77 and done.receipt.fallback == ""


def test_a_memory_may_refuse_and_learns_of_exact_requests_alone(model):
    engine = ReuseEngine(model, policy("in_prompt", refuses=True), MemoryChunkStore(), chunk_size=16)
    engine.build(BEFORE)
    done = engine.prefill(BEFORE)
    assert (done.receipt.fallback, done.receipt.chunks_hit, done.receipt.compute_fraction) == ("not today", 0, 1.0)
    exact = ReuseEngine(model, chain(NoCorrection()), MemoryChunkStore()).prefill(BEFORE)
    assert torch.equal(done.logits, exact.logits)
    engine.retain(done, BEFORE, 0)
    assert learned(engine) == [0, 1] * 3 + [0]
    glad = ReuseEngine(model, policy("in_prompt"), engine.store, chunk_size=16)
    glad.retain(glad.prefill(BEFORE), BEFORE, 0)
    assert learned(engine) == [0, 1] * 3 + [0]


def learned(engine) -> list[int]:
    return [int(engine.store.get(name).notes["learned"]) for name in engine.plan(BEFORE).keys]


def test_chunks_with_notes_have_keys_of_their_own_and_are_not_copied():
    plain, noted = chain(NoCorrection(), "in_prompt"), policy("in_prompt")
    assert plain.recipe == "fixedchain_in_prompt" and noted.recipe == "fixedchain_in_prompt+last_keys"
    assert plain.copyable and not noted.copyable
    identity = CacheIdentity("m", "d")
    keys = [make_plan(one, identity, BEFORE, 16, 512).keys for one in (plain, noted)]
    assert len(keys[0]) == len(keys[1]) and not set(keys[0]) & set(keys[1])


def test_a_folder_keeps_notes_and_tiers_keep_a_chunk_without(tmp_path):
    notes = {"one": torch.randn(3, 2), "two": torch.arange(5)}
    noted = replace(chunk(1), notes=notes)
    folder = DirectoryChunkStore(tmp_path / "folder")
    folder.put(key(1), noted)
    found = DirectoryChunkStore(tmp_path / "folder").get(key(1))
    assert found.notes.keys() == notes.keys() and all(torch.equal(found.notes[n], x) for n, x in notes.items())
    assert torch.equal(found.k, noted.k) and found.scores is None and found.generation == 1
    assert not folder.replace(key(1), chunk(1))
    tiers = store(tmp_path / "tiers", host=8 * PAGES)
    tiers.put(key(1), noted)
    assert tiers.get(key(1)).notes == {} and torch.equal(tiers.get(key(1)).k, noted.k)


@pytest.mark.parametrize("name", ["note.X", "note.", "other", "note.a.b"])
def test_a_file_of_other_tensors_is_no_chunk(tmp_path, name):
    folder = DirectoryChunkStore(tmp_path)
    folder.put(key(1), replace(chunk(1), notes={"one": torch.zeros(2)}))
    path = tmp_path / f"{key(1)}.safetensors"
    save_file(load_file(path) | {name: torch.zeros(3)}, path, metadata={"format": "3", "generation": "1"})
    found = folder.fetch(key(1))
    assert found.chunk is None and "tensors that no chunk has" in found.why


def test_notes_under_an_older_format_are_no_chunk(tmp_path):
    folder = DirectoryChunkStore(tmp_path)
    folder.put(key(1), replace(chunk(1), notes={"one": torch.zeros(2)}))
    path = tmp_path / f"{key(1)}.safetensors"
    save_file(load_file(path), path, metadata={"format": "1", "generation": "1"})
    assert folder.fetch(key(1)).chunk is None


@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("k2", torch.ones(1)),
        ("of", torch.ones(1, dtype=torch.float64)),
        ("of", torch.ones(1, dtype=torch.int32)),
        ("of", torch.ones(1, 1, 1, 1, 1)),
    ],
)
def test_notes_that_no_store_gives_back_are_refused_before_they_are_written(name, note):
    """A folder would write the file, call it damaged at the next read, and remove it, every time."""
    with pytest.raises(StoreError, match="note"):
        replace(chunk(3), notes={name: note})


def test_a_note_may_be_a_view_of_the_chunk(tmp_path):
    made = chunk(3)
    folder = DirectoryChunkStore(tmp_path)
    folder.put("ab", replace(made, notes={"of": made.k, "part": made.v[0]}))
    assert torch.equal(folder.get("ab").notes["part"], made.v[0])
