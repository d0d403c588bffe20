"""Direct implementation of SentencePiece's BPE encoding, the reference for a converted tokenizer.

Kudo and Richardson, arXiv 1808.06226, in the variant of llama.cpp: user-defined and control pieces are cut out of the
text first, the longest ones before shorter ones; of what is left, the neighbours whose joined piece scores highest are
joined until no joined piece is in the vocabulary; a character without a piece is encoded as its UTF-8 bytes.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from harness.real_model.vocabulary import CONTROL, SPACE, UNKNOWN, USER_DEFINED, Vocabulary


class SentencePiece:
    """Encodes text with a vocabulary's scores."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.v = vocabulary
        whole = {vocabulary.pieces[i] for i in vocabulary.of_type(USER_DEFINED, CONTROL, UNKNOWN)}
        self.whole = sorted(whole, key=lambda piece: (-len(piece), piece))

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without a beginning of sequence."""
        return [i for part, known in self._parts(text) for i in ([self.v.ids[part]] if known else self._join(part))]

    def _parts(self, text: str) -> Iterator[tuple[str, bool]]:
        """Parts of the text in order, cut at whole pieces, each with whether it is a whole piece."""
        parts = [(text, False)]
        for piece in self.whole:
            if piece in text:
                parts = [cut for part in parts for cut in ([part] if part[1] else _cut(part[0], piece))]
        yield from parts

    def _join(self, text: str) -> list[int]:
        symbols = list(text.replace(" ", SPACE))
        before, after = list(range(-1, len(symbols) - 1)), [*range(1, len(symbols)), -1]
        queue = [entry for i in range(len(symbols) - 1) if (entry := self._pair(symbols, i, i + 1))]
        heapify(queue)
        while queue:
            _, left, right, joined = heappop(queue)
            if not symbols[left] or symbols[left] + symbols[right] != joined or after[left] != right:
                continue  # one of the two has been joined already
            symbols[left], symbols[right] = joined, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
            for pair in ((before[left], left), (left, after[left])):
                if min(pair) >= 0 and (entry := self._pair(symbols, *pair)):
                    heappush(queue, entry)
        return [i for symbol in symbols if symbol for i in self._ids(symbol)]

    def _pair(self, symbols: list[str], left: int, right: int) -> tuple[float, int, int, str] | None:
        joined = symbols[left] + symbols[right]
        found = self.v.ids.get(joined)
        return None if found is None else (-self.v.scores[found], left, right, joined)

    def _ids(self, symbol: str) -> list[int]:
        if symbol in self.v.ids:
            return [self.v.ids[symbol]]
        return [self.v.ids[f"<0x{byte:02X}>"] for byte in symbol.encode()]


def _cut(text: str, piece: str) -> Iterator[tuple[str, bool]]:
    first, *rest = text.split(piece)
    if first:
        yield first, False
    for part in rest:
        yield piece, True
        if part:
            yield part, False
