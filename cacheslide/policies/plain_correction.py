"""What most corrections have in common, whatever they choose by."""


class PlainCorrection:
    """Base class of corrections that need no layer input, no remembered score and no question; it has no fields."""

    @property
    def probe_layers(self) -> frozenset[int]:
        """No layer inputs are needed."""
        return frozenset()

    @property
    def needs_scores(self) -> bool:
        """No remembered deviation is read."""
        return False

    @property
    def asks(self) -> bool:
        """The selection does not depend on the question."""
        return False
