"""Repeated launches of one compiled Triton variant: same grid, same numbers, other tensors."""

from collections.abc import Sequence

from torch import Tensor


class BoundKernel:
    """A Triton kernel on a fixed grid, with fixed constants and numbers; only the memory of its tensors may differ.

    Triton inspects every argument of a launch to choose the compiled variant, which takes longer than a short kernel
    runs. When nothing the choice depends on has changed, the variant is launched directly.

    Parameters
    ----------
    kernel : triton JITFunction
        Takes tensors first, then numbers, then constants.
    grid : tuple of three ints
    constants : dict
        Its `constexpr` arguments by name.
    anywhere : sequence of int
        Indices of the tensors whose alignment the kernel does not specialise on.
    options
        Launch options: `num_warps`, `num_stages`.
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
        """Launch on the current stream; `numbers` must be the same in every call."""
        # The variant depends only on whether each tensor starts at a multiple of 16 bytes.
        aligned = tuple(i in self.anywhere or x.data_ptr() % 16 == 0 for i, x in enumerate(tensors))
        if aligned == self._aligned:
            self._ready(*tensors, *numbers, *self._tail)
            return
        compiled = self.kernel[self.grid](*tensors, *numbers, **self.constants, **self.options)
        if compiled is not None:  # Triton's interpreter does not compile
            self._tail = [self.constants[name] for name in self.kernel.arg_names if name in self.constants]
            self._ready, self._aligned = compiled[self.grid], aligned
