"""The paper's claims about SLIDE (figure 12) and SSD writes, with the rules of `claims_slide.py`."""

from harness.report import claims_slide as rules
from harness.report.verdicts import Basis, Claim

_SLIDE = (
    "reproduced: {what}; partly: only an interval that leaves out no effect, or only a part of the cells, or fewer "
    "than 5 runs; not reproduced: neither"
)
_BYTES = (
    "LRU's bytes over clean-first's, both sharing dirty bits and write skipping, tokens selected at the layer that "
    "validation chose because it keeps the answers; " + _SLIDE.format(what="at least 3.11 with an interval above 1")
)

SLIDE = (
    Claim(
        "fig12a",
        "12a",
        "Loading and writing at once shortens a layer",
        "26.7–51.5 % less",
        "7B layers on a GPU, chunks in host memory, a layer's load starting with the layer, order disjoint; "
        + _SLIDE.format(what="at least 26.7 % with an interval above 0 at every batch"),
        "fig12a",
        rules.layer_latency,
        Basis.SHAPES,
        "12a",
    ),
    Claim(
        "fig12b",
        "12b",
        "Fewer write stalls",
        "66.9–73.5 % less",
        "clean-first against LRU, which shares its dirty bits and write skipping, with writes held to 100 MiB/s so "
        "that they are the bottleneck, and tokens selected at the layer that validation chose because it keeps the "
        "answers; not judged where runs under LRU wait for less than 5 % of their time; "
        + _SLIDE.format(what="at least 66.9 % with an interval above 0"),
        "fig12b",
        rules.write_stalls,
        Basis.STRESS,
        "12b",
    ),
    Claim(
        "fig12c",
        "12c",
        "Fewer bytes written to SSD",
        "3.11–3.62× less",
        _BYTES,
        "fig12c",
        rules.bytes_written,
        Basis.STRESS,
        "12c",
    ),
    Claim(
        "fig12d",
        "12d",
        "Less GPU memory than PromptCache",
        "1.63–1.9× less",
        "counted pages, so there are no intervals; reproduced: a factor of at least 1.63 in every cell, and one above "
        "1 even if PromptCache shared its pages; partly: of more than 1 in some; not reproduced: in none",
        "fig12d",
        rules.gpu_bytes,
        Basis.STRESS,
        "12d",
    ),
)
WRITES = (
    Claim(
        "headline-ssd",
        "abstract",
        "SSD writes go down",
        "3.11–3.62×",
        "the number of figure 12c, counted once, there; " + _BYTES,
        "fig12c",
        rules.bytes_written,
        Basis.STRESS,
        "12c",
    ),
)
