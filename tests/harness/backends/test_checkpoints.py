"""A model named by a folder, or by its name on the Hugging Face hub: the hub's cache serves offline."""

import shutil

import pytest

from cacheslide.errors import ModelError
from harness.backends.checkpoints import find_checkpoint
from harness.backends.reference import ReferenceBackend
from tests.helpers.commands import MODEL


def test_a_folder_is_itself_and_a_missing_one_is_named(checkpoint, tmp_path):
    assert find_checkpoint(checkpoint) == checkpoint
    with pytest.raises(ModelError, match=r"config\.json is missing"):
        ReferenceBackend(tmp_path / "nothing" / "here")


def test_a_name_that_the_hub_does_not_give_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no model at someone/a-model") as refused:
        ReferenceBackend("someone/a-model")
    assert "\n" not in str(refused.value)


def test_a_name_in_the_hubs_cache_is_served_offline(tmp_path, monkeypatch):
    """Laid out as the hub's client lays it: a snapshot a revision, and which one a branch means."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    held = tmp_path / "models--someone--a-model"
    shutil.copytree(MODEL, held / "snapshots" / "0a1b")
    (held / "refs").mkdir()
    (held / "refs" / "main").write_text("0a1b")
    import harness.backends.checkpoints as checkpoints

    plain = checkpoints.snapshot_download
    monkeypatch.setattr(checkpoints, "snapshot_download", lambda *a, **k: plain(*a, cache_dir=tmp_path, **k))
    backend = ReferenceBackend("someone/a-model")
    assert backend.model.model_id == ReferenceBackend(MODEL).model.model_id
    assert backend.encode("a") == ReferenceBackend(MODEL).encode("a")
