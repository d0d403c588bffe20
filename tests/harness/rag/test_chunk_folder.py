"""Folders of chunks: read back bit for bit, and refused in one line when damaged or of something else."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from cacheslide.errors import StoreError
from cacheslide.store.base import ChunkKV
from harness.rag.chunk_folder import chunk_folder, load_chunk, save_chunk
from tests.helpers.made_passages import passage_row

FILES = ("keys.safetensors", "metadata.json", "valid_mask.safetensors", "values.safetensors")


def chunk(n=5):
    g = torch.Generator().manual_seed(3)
    k, v = torch.randn(2, 3, n, 2, 4, generator=g)
    return ChunkKV(k, v, torch.arange(n))


def test_a_chunk_comes_back_bit_for_bit(tmp_path):
    made = chunk()
    written = save_chunk(tmp_path / "a", "k" * 40, 5, made, {"sample": "s"})
    assert tuple(sorted(p.name for p in (tmp_path / "a").iterdir())) == FILES
    assert written == made.nbytes + 5
    back = load_chunk(tmp_path / "a", "k" * 40)
    assert torch.equal(back.chunk.k, made.k) and torch.equal(back.chunk.v, made.v)
    assert torch.equal(back.chunk.positions, made.positions) and back.metadata["sample"] == "s"
    assert load_file(tmp_path / "a/valid_mask.safetensors")["valid_mask"].tolist() == [True] * 5


def test_a_placeholder_has_no_valid_token_and_takes_the_place_of_a_chunk(tmp_path):
    save_chunk(tmp_path / "a", "k", 5, chunk(), {})
    save_chunk(tmp_path / "a", "k", 5, None, {})
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["metadata.json", "valid_mask.safetensors"]
    assert load_chunk(tmp_path / "a", "k").chunk is None
    assert load_file(tmp_path / "a/valid_mask.safetensors")["valid_mask"].tolist() == [False] * 5


def damage(folder, name):
    if name == "tokens":
        held = json.loads((folder / "metadata.json").read_text())
        (folder / "metadata.json").write_text(json.dumps(held | {"tokens": 9}))
    elif name == "list":
        (folder / "metadata.json").write_text("[]")
    else:
        raw = (folder / name).read_bytes()
        (folder / name).write_bytes(raw[: len(raw) // 3])


@pytest.mark.parametrize("name", [*FILES, "tokens", "list"])
def test_a_damaged_folder_is_one_line(tmp_path, name):
    save_chunk(tmp_path / "a", "k", 5, chunk(), {})
    damage(tmp_path / "a", name)
    with pytest.raises(StoreError) as raised:
        load_chunk(tmp_path / "a", "k")
    assert str(raised.value).startswith(f"{tmp_path / 'a'}: cannot be used (") and "\n" not in str(raised.value)


def test_a_missing_folder_and_one_of_another_text(tmp_path):
    save_chunk(tmp_path / "a", "k", 5, chunk(), {})
    with pytest.raises(StoreError, match="no chunk there"):
        load_chunk(tmp_path / "b", "k")
    with pytest.raises(StoreError, match="of another text, model, dtype or system"):
        load_chunk(tmp_path / "a", "l")


def test_ids_that_are_no_file_names_give_way_to_hashes(tmp_path):
    row = passage_row(1)
    assert chunk_folder(tmp_path, row, 3) == tmp_path / "id-1_3"
    for odd in ("../up", "a/b", "", ".hidden", "x" * 200):
        assert chunk_folder(tmp_path, replace(row, id=odd), 3) == tmp_path / f"{row.sha256[:32]}_3"
