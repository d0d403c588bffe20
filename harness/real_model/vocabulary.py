"""A GGUF file's SentencePiece vocabulary, and a tokenizer.json with the same encoding."""

from dataclasses import dataclass, field

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE

from cacheslide.errors import ModelError
from cacheslide.models.gguf_file import GgufFile

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types of a piece
SPACE = "▁"  # represents a space within pieces


@dataclass(frozen=True)
class Vocabulary:
    """Pieces, their scores and types, by token id; `bos`, `eos`, `unk` and `pad` are ids."""

    pieces: tuple[str, ...]
    scores: tuple[float, ...]
    types: tuple[int, ...]
    bos: int
    eos: int
    unk: int
    pad: int
    ids: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not len(self.pieces) == len(self.scores) == len(self.types):
            raise ModelError("the vocabulary's pieces, scores and types are not equally many")
        object.__setattr__(self, "ids", {piece: i for i, piece in enumerate(self.pieces)})
        if len(self.ids) < len(self.pieces):
            raise ModelError("the vocabulary holds a piece twice")

    def of_type(self, *kinds: int) -> list[int]:
        """Ids of the pieces of these types."""
        return [i for i, kind in enumerate(self.types) if kind in kinds]


def read_vocabulary(file: GgufFile) -> Vocabulary:
    """The vocabulary of a GGUF file; ModelError unless it is SentencePiece's, without a space prepended to text."""

    def value(key: str):
        found = file.value(f"tokenizer.ggml.{key}")
        if found is None:
            raise ModelError(f"{file.path} lacks tokenizer.ggml.{key}")
        return found

    if value("model") != "llama":
        raise ModelError(f"{file.path}: a vocabulary of kind {value('model')} is not supported (only llama)")
    if file.value("tokenizer.ggml.add_space_prefix", True):
        raise ModelError(f"{file.path}: a vocabulary that puts a space in front of text is not supported")
    lists = (tuple(value(key)) for key in ("tokens", "scores", "token_type"))
    return Vocabulary(*lists, *(value(f"{name}_token_id") for name in ("bos", "eos", "unknown", "padding")))


def make_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """A Hugging Face tokenizer that gives the vocabulary's ids.

    SentencePiece joins the pair whose piece scores highest; as merges these are all ways to split a piece into two, by
    the piece's score. User-defined pieces are found in the text first, control pieces as special tokens.
    """
    v = vocabulary
    model = BPE(v.ids, _merges(v), byte_fallback=True, unk_token=v.pieces[v.unk], fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Replace(" ", SPACE)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([_whole(v.pieces[i], True) for i in v.of_type(CONTROL, UNKNOWN)])
    tokenizer.add_tokens([_whole(v.pieces[i], False) for i in v.of_type(USER_DEFINED)])
    bos = v.pieces[v.bos]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, v.bos)]
    )
    return tokenizer


def _whole(piece: str, special: bool) -> AddedToken:
    return AddedToken(piece, normalized=False, special=special)


def _merges(v: Vocabulary) -> list[tuple[str, str]]:
    joined = {v.pieces[i]: v.scores[i] for i in v.of_type(NORMAL)}
    merges = []
    for piece, score in joined.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in joined and right in joined:
                merges.append((-score, cut, left, right))
    merges.sort()
    return [(left, right) for *_, left, right in merges]
