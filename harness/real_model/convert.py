"""Converts GGUF to a folder for transformers and our loader: config.json, bf16 safetensors, a tokenizer."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from cacheslide.errors import ConfigError
from cacheslide.models.gguf_file import GgufFile
from cacheslide.models.weights import fingerprint
from harness.real_model import source
from harness.real_model.sentencepiece import SentencePiece
from harness.real_model.strings import make_strings
from harness.real_model.vocabulary import Vocabulary, make_tokenizer, read_vocabulary

STRINGS, SEED = 1000, 270
RECORD = "conversion.json"  # source and check of the conversion; written last


def is_converted(folder: Path) -> bool:
    """Whether `folder` holds the conversion of the pinned file, whole and unchanged."""
    record = folder / RECORD
    if not record.is_file():
        return False
    try:
        made = json.loads(record.read_text())
        return made["gguf_sha256"] == source.SHA256 and made["fingerprint"] == fingerprint(folder)
    except (ValueError, KeyError, OSError):
        return False


def convert(gguf: Path, folder: Path) -> dict:
    """Write `folder`, all or nothing; returns its record.

    ConfigError when the tokenizer's ids differ from those of the GGUF's vocabulary.
    """
    half = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(half, ignore_errors=True)
    half.mkdir(parents=True)
    try:
        file = GgufFile(gguf)
        vocabulary = read_vocabulary(file)
        _write_tokenizer(vocabulary, half, file.config["max_position_embeddings"])
        equal = equal_strings(half, vocabulary)
        if equal < STRINGS:
            raise ConfigError(f"the tokenizer encodes {equal} of {STRINGS} strings as the GGUF's: nothing is converted")
        (half / "config.json").write_text(json.dumps(_config(file, vocabulary), indent=2) + "\n")
        weights = half / "model.safetensors"
        save_file(file.tensors(torch.bfloat16, "cpu"), weights, metadata={"format": "pt"})
        weights.chmod(0o644)
        record = {
            "gguf_sha256": source.SHA256,
            "fingerprint": fingerprint(half),
            "tokenizer_check": {"strings": STRINGS, "seed": SEED, "equal": equal},
            "licence": f"{source.LICENCE}, {source.TERMS}",
        }
        (half / RECORD).write_text(json.dumps(record, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        half.rename(folder)
        return record
    finally:
        shutil.rmtree(half, ignore_errors=True)


def _config(file: GgufFile, vocabulary: Vocabulary) -> dict:
    """config.json in keys that transformers 4 and 5 read."""
    tokens = {f"{name}_token_id": getattr(vocabulary, name) for name in ("bos", "eos", "pad")}
    return {**file.config, **tokens, "torch_dtype": "bfloat16"}


def _write_tokenizer(vocabulary: Vocabulary, folder: Path, longest: int) -> None:
    make_tokenizer(vocabulary).save(str(folder / "tokenizer.json"))
    named = {f"{name}_token": vocabulary.pieces[getattr(vocabulary, name)] for name in ("bos", "eos", "unk", "pad")}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    settings |= {**named, "model_max_length": longest}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def equal_strings(folder: Path, vocabulary: Vocabulary) -> int:
    """Number of strings that the folder's tokenizer, loaded by transformers, encodes as the vocabulary does."""
    from cacheslide.core.prompt_file import load_tokenizer
    from cacheslide.core.tokenizing import encode

    tokenizer, direct = load_tokenizer(folder), SentencePiece(vocabulary)
    return sum(list(encode(tokenizer, text)) == direct.encode(text) for text in make_strings(STRINGS, SEED))
