"""The small model's tokenizer: a byte-level BPE in which every word of the synthetic task is one token.

Words, digits, runs of symbols and line breaks are split first and merges never cross them, so that the ids of
segments tokenised one by one are the ids of the whole text, wherever a segment starts at such a boundary.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from random import Random

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from harness.tasks.synthetic import render, words
from harness.tasks.synthetic.world import MIXES, build_world, draw_root_values

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
VOCAB = 1280
_WORDS = r" ?[A-Za-z]+|[0-9]|\n| ?[^\sA-Za-z0-9]+|\s"


def task_pieces() -> list[str]:
    """Every piece that the task can render, sorted."""
    found = {f" {w}" for w in (*words.FIRST, *words.SECOND, *words.MATERIAL, *words.MARK)}
    found |= {f" {w}" for group in words.FILLER.values() for w in group} | set("0123456789")
    for style in render.STYLES:
        found |= {p for sentence in render.filler_pool(style) for p in sentence}
        found |= set(render.SYSTEM[style]) | set(render.question(style, ("amber", "acorn")))
        for seed in range(20):  # enough prompts to see every verb and heading
            rng = Random(seed)
            world = build_world(rng, MIXES["deep"], "train", [10])
            notes = render.notes_document(rng, style, world, draw_root_values(rng, "train", world.roots))
            for document in (notes, *render.fixed_documents(rng, style, world)):
                found.update(document.pieces())
    return sorted(found)


def build_tokenizer() -> Tokenizer:
    """Train the tokenizer on the task's pieces. It stops below `VOCAB` when every piece is one token."""
    tokenizer = bare(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(task_pieces() * 2, trainer)
    return begins(tokenizer)


def word_tokenizer(pieces: Iterable[str]) -> Tokenizer:
    """One token per piece and per byte: other text falls back to bytes. Nothing is trained.

    Raises
    ------
    ValueError
        When `bare` splits a piece into several words, so that its token could never occur.
    """
    alphabet = [PAD, BOS, EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer, found = bare(models.BPE()), set()
    for piece in pieces:
        words = [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(piece)]
        if len(words) != 1:
            raise ValueError(f"{piece!r} is {len(words)} words")
        found.add(words[0])
    vocab = {w: i for i, w in enumerate([*alphabet, *sorted(found - set(alphabet))])}
    # without merges a word is looked up whole, else byte by byte
    tokenizer.model = models.BPE(vocab, [], ignore_merges=True)
    tokenizer.add_special_tokens([PAD, BOS, EOS])
    return begins(tokenizer)


def words_of(text: str) -> list[str]:
    """The pieces that `text` is split into, as text."""
    return [text[a:b] for _, (a, b) in pre_tokenizers.Split(Regex(_WORDS), behavior="isolated").pre_tokenize_str(text)]


def bare(model: models.Model) -> Tokenizer:
    """A tokenizer that splits words and represents bytes as the small models' tokenizers do."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def begins(tokenizer: Tokenizer) -> Tokenizer:
    """`tokenizer`, with every text beginning with `BOS`."""
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, bos)])
    return tokenizer


def piece_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Piece -> id. Raises where a piece is not one token, since training relies on it."""
    table = {}
    for piece in task_pieces():
        ids = tokenizer.encode(piece, add_special_tokens=False).ids
        if len(ids) != 1:
            raise ValueError(f"{piece!r} is {len(ids)} tokens: the vocabulary is too small")
        table[piece] = ids[0]
    return table


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and the configuration that AutoTokenizer and vLLM read."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "model_max_length": 8192,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
