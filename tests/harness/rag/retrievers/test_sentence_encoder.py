"""The dense retriever over a small random encoder: cosines of its own embeddings."""

import pytest
import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from cacheslide.errors import ConfigError, ModelError
from harness.rag.retrievers.base import ranking
from harness.rag.retrievers.sentence_encoder import open_retriever

pytestmark = pytest.mark.slow

WORDS = "amber falcon silver otter ibex painted bone".split()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    pytest.importorskip("sentence_transformers", reason="the extra `retrieval` is not installed")
    folder = tmp_path_factory.mktemp("encoder")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]))
    BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(3)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    BertModel(BertConfig(vocab_size=12, **shape)).save_pretrained(folder)
    return open_retriever(folder)


def test_scores_are_cosines_and_a_passage_is_nearest_to_itself(encoder):
    passages = ["amber falcon", "silver otter bone", "ibex painted"]
    index = encoder.index(passages)
    for number, passage in enumerate(passages):
        scores = index.scores(passage)
        assert ranking(scores)[0] == number and scores[number] == pytest.approx(1, abs=1e-5)
        assert all(abs(s) <= 1 + 1e-5 for s in scores)
    assert len(encoder.about["model"]) > 10


def test_a_missing_or_damaged_folder_is_one_line(tmp_path):
    for model in (None, tmp_path / "no"):
        with pytest.raises(ConfigError, match=r"^retriever sentence_encoder needs --retriever-model"):
            open_retriever(model)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no sentence encoder") as raised:
        open_retriever(tmp_path)
    assert "\n" not in str(raised.value)
