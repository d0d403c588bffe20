"""Prompt files of the command line, {"segments": [{"role", "text" or "token_ids", "name"?}, ...]}, and tokenizers."""

from pathlib import Path

from cacheslide.core.prompt import Segment
from cacheslide.core.tokenizing import encode, opening
from cacheslide.errors import ModelError, PromptError
from cacheslide.plain_values import check_plain, read_json, shown


def load_tokenizer(folder: str | Path):
    """The tokenizer in a checkpoint's folder; nothing is downloaded. ModelError where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as broken:  # transformers checks little of these files: a damaged one raises any exception
        why = (str(broken).strip() or type(broken).__name__).splitlines()[0]
        raise ModelError(
            f"no tokenizer in {folder} ({why}): tokenizer.json and tokenizer_config.json belong there"
        ) from None


def read_segments(path: Path, tokenizer, need_text: bool = True) -> list[Segment]:
    """The segments of a prompt file, BOS before the first text; PromptError names the segment that is invalid.

    Without `need_text` a segment may have neither text nor token ids; it is then empty.
    """
    raw = read_json(path, PromptError)
    check_plain(raw, PromptError, str(path), text=True)
    if not isinstance(raw, dict) or not isinstance(raw.get("segments"), list):
        raise PromptError(f'{path} is not a prompt file: an object {{"segments": [...]}} is expected')
    return [_segment(s, f"{path}: segment {i}", i, tokenizer, need_text) for i, s in enumerate(raw["segments"])]


def _segment(raw, where: str, i: int, tokenizer, need_text: bool) -> Segment:
    if not isinstance(raw, dict):
        raise PromptError(f"{where} must be an object with a role and text or token_ids, not {shown(raw)}")
    if "role" not in raw:
        raise PromptError(f"{where} has no role: 'reuse' (fixed text) or 'recompute' (updated text)")
    ids, text = raw.get("token_ids"), raw.get("text", None if need_text else "")
    if ids is None:
        if not isinstance(text, str):
            raise PromptError(f"{where} needs text or token_ids")
        ids = [*(opening(tokenizer) if i == 0 else ()), *encode(tokenizer, text)]
    elif not isinstance(ids, list):
        raise PromptError(f"{where}: token_ids must be a list of integers, not {shown(ids)}")
    try:
        return Segment(tuple(ids), raw["role"], str(raw.get("name", "")))
    except PromptError as wrong:
        raise PromptError(f"{where}: {str(wrong).split(': ', 1)[1]}") from None
