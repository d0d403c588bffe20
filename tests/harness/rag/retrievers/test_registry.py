"""Retrievers are found by their files, and one that cannot run is refused in one line."""

from types import SimpleNamespace

import pytest

from cacheslide.errors import ConfigError
from harness.rag.retrievers import registry

ABSENT = SimpleNamespace(NAME="zz", NEEDS=("no_such_module",), INSTALL="make install-zz")


def test_bm25_is_there_and_needs_nothing_more():
    assert registry.missing(registry.DEFAULT) == []
    assert registry.open_retriever(registry.DEFAULT).about["name"] == registry.DEFAULT


def test_one_line_names_what_is_not_installed(monkeypatch):
    both = {"bm25": registry.retrievers()["bm25"], "zz": ABSENT}
    monkeypatch.setattr(registry, "retrievers", lambda: both)
    assert registry.availability() == "retrievers installed: bm25; not installed: zz (make install-zz)"
    with pytest.raises(ConfigError, match=r"^retriever zz needs no_such_module: make install-zz$"):
        registry.open_retriever("zz")


def test_unknown_names_and_needless_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"^unknown retriever 'colbert' .known: bm25"):
        registry.open_retriever("colbert")
    with pytest.raises(ConfigError, match=r"^retriever bm25 has no model"):
        registry.open_retriever("bm25", tmp_path)
