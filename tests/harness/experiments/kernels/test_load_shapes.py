"""Which rows a load's attention is measured over."""

import pytest
import torch

from harness.experiments.kernels.load_shapes import load_rows, main


@pytest.mark.parametrize("kind", ["first", "scattered"])
def test_rows_are_the_updated_text_in_front_and_a_share_of_what_follows(kind):
    rows = load_rows(8192, 0.05, kind).long()
    assert len(rows) == 410 + 369 and torch.equal(rows[:410], torch.arange(410))
    assert (rows.diff() > 0).all() and rows[-1] < 410 + 7373
    assert (int(rows[-1]) == 778) == (kind == "first")


def test_a_machine_without_a_gpu_is_told_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "out.json")])
    assert "needs a CUDA device" in capsys.readouterr().err
