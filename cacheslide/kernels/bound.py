"""A Triton launch that is repeated: on the same grid, with the same numbers, over other memory."""

from collections.abc import Sequence

from torch import Tensor


class BoundKernel:
    """A Triton kernel on a fixed grid, with fixed constants and numbers, and tensors that differ in their memory alone.

    Triton looks at every argument of a launch to find the variant compiled for it, which takes longer than a short
    kernel runs. Arguments that are as they were the time before go to that variant directly.

    Parameters
    ----------
    kernel : triton JITFunction
        Its tensors come first, then its numbers, then its constants.
    grid : tuple of three ints
    constants : dict
        Its `constexpr` arguments by name.
    anywhere : sequence of int
        Numbers of the tensors whose alignment the kernel does not specialise on.
    options
        The launch's: `num_warps`, `num_stages`.
    """

    def __init__(
        self,
        kernel,
        grid: tuple[int, int, int],
        constants: dict[str, object],
        anywhere: Sequence[int] = (),
        **options: int,
    ) -> None:
        self.kernel, self.grid, self.constants, self.options = kernel, grid, constants, options
        self.anywhere = frozenset(anywhere)
        self._aligned: tuple[bool, ...] | None = None
        self._ready = None  # launches the compiled variant

    def __call__(self, tensors: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
        """Launch on the current stream; `numbers` are the same every time."""
        # All that a variant depends on of a tensor's memory: whether it starts at a multiple of 16 bytes.
        aligned = tuple(i in self.anywhere or x.data_ptr() % 16 == 0 for i, x in enumerate(tensors))
        if aligned == self._aligned:
            self._ready(*tensors, *numbers, *self._tail)
            return
        compiled = self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)
        if compiled is not None:  # Triton's interpreter compiles nothing
            self._tail = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
            self._ready, self._aligned = compiled[self.grid], aligned
