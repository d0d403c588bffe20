"""The second step: what it places and saves, and that a cut run goes on."""

import json

import pytest

from cacheslide.errors import DataError
from harness.rag import build_kv_cache
from harness.rag.build_kv_cache import build, kv_path, main
from harness.rag.chunk_folder import chunk_folder, load_chunk
from harness.rag.placing import place_sample
from tests.helpers.made_passages import passage_row
from tests.helpers.rag import SETTINGS, manager, prompts, retrieved

pytestmark = pytest.mark.slow


@pytest.fixture
def ranked(tmp_path):
    return retrieved(tmp_path)


def test_the_first_k_are_on_the_device_and_the_rest_are_placeholders(ranked, tmp_path):
    out, folders = kv_path(tmp_path / "results", "made", 2), tmp_path / "results/kv_caches"
    made = build(manager(), ranked, 2, out, SETTINGS, folders=folders)
    assert out == tmp_path / "results/kv_caches/made_kv_top2.json" and json.loads(out.read_text())["k"] == 2
    for record in made["samples"]:
        places = {c["passage"]: c["place"] for c in record["chunks"]}
        assert places == {i: "device" if i in ranked.ranked[record["id"]][:2] else "placeholder" for i in range(6)}
        assert record["device_bytes"] > sum(c["bytes"] for c in record["chunks"]) > 0 == record["cpu_bytes"]
        for c in record["chunks"]:
            saved = load_chunk(folders / c["folder"], c["key"])
            assert (saved.chunk is None) == (c["place"] == "placeholder") and saved.metadata["tokens"] == c["tokens"]
    assert made["summary"]["by_place"]["device"]["chunks"] == 6
    assert made["summary"]["by_place"]["placeholder"]["chunks"] == 12


def test_the_rest_can_be_staged_with_their_kv(ranked, tmp_path):
    made = build(manager(), ranked, 2, kv_path(tmp_path / "r", "made", 2), SETTINGS, "cpu")
    assert made["summary"]["by_place"]["cpu"]["chunks"] == 12 and made["summary"]["cpu_bytes"] > 0


def test_a_cut_run_goes_on_where_it_stopped(ranked, tmp_path, monkeypatch):
    out, placed = kv_path(tmp_path / "r", "made", 2), []

    def counted(*args):
        placed.append(args[2].id)
        if len(placed) == 2:
            raise KeyboardInterrupt
        return place_sample(*args)

    monkeypatch.setattr(build_kv_cache, "place_sample", counted)
    with pytest.raises(KeyboardInterrupt):
        build(manager(), ranked, 2, out, SETTINGS)
    made = build(manager(), ranked, 2, out, SETTINGS)
    assert placed == ["id-0", "id-1", "id-1", "id-2"] and [r["id"] for r in made["samples"]] == ["id-0", "id-1", "id-2"]


def test_a_run_in_which_every_sample_fails_is_one_line(ranked, tmp_path):
    with pytest.raises(DataError, match=r"^KV caches: no sample succeeded .StoreError: a chunk of ") as raised:
        build(manager(device_bytes=10), ranked, 2, kv_path(tmp_path / "r", "made", 2), SETTINGS)
    assert "\n" not in str(raised.value)


def test_saved_folders_are_read_instead_of_computed(ranked, tmp_path):
    folders, row = tmp_path / "c", passage_row(0)
    made, sample = manager(), prompts()
    build(made, ranked, 2, kv_path(tmp_path / "r", "made", 2), SETTINGS, "cpu", folders)
    made.clear()
    placed = place_sample(made, sample, row, [0, 1], folders=folders)
    assert placed.loaded == 6 and not placed.unusable and placed.encode_s == 0.0
    assert [made.where(key) for key in placed.keys] == ["device"] * 2 + ["cpu"] * 4
    (chunk_folder(folders, row, 0) / "keys.safetensors").write_bytes(b"")
    (chunk_folder(folders, row, 5) / "metadata.json").unlink()
    made.clear()
    placed = place_sample(made, sample, row, [0, 1], folders=folders)
    assert placed.loaded == 4 and len(placed.unusable) == 2 and placed.encode_s > 0
    assert [made.where(key) for key in placed.keys] == ["device"] * 2 + ["cpu"] * 3 + ["placeholder"]


def test_a_saved_placeholder_is_encoded_where_it_is_wanted_on_the_device(ranked, tmp_path):
    made, sample, row, folders = manager(), prompts(), passage_row(0), tmp_path / "c"
    build(made, ranked, 1, kv_path(tmp_path / "r", "made", 1), SETTINGS, folders=folders)
    made.clear()
    other = ranked.ranked[row.id][-1]
    placed = place_sample(made, sample, row, [other], folders=folders)
    assert made.where(placed.keys[other]) == "device" and placed.encode_s > 0 and not placed.unusable


def test_the_command(ranked, tmp_path, capsys):
    results = tmp_path / "results"
    main(["--retrieval-json", str(ranked.path), "--samples", "1", "--results", str(results), "--layer", "4"])
    assert capsys.readouterr().out.startswith("1 samples; chunks: 2 device, 4 placeholder; ")
    assert (results / "kv_caches/made_kv_top2.json").is_file()
