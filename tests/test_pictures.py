"""Pictures are drawn without touching the drawing of the program that asked for them."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib
import pytest
from matplotlib import pyplot

from crnet.cli.app import main
from crnet.config.presets import PRESETS
from crnet.config.serialize import override
from crnet.report import cost_plot
from crnet.report.plots import loss_picture, plot_losses
from test_cli import train_words


@pytest.mark.slow
def test_the_backend_of_a_notebook_stays(tmp_path: Path) -> None:
    """A run that draws its loss inside a notebook must leave the notebook its own pictures."""
    before = matplotlib.get_backend()
    pyplot.switch_backend("svg")
    try:
        rows = [{"step": 1, "tokens": 8, "loss": 5.0}, {"step": 1, "val_loss": 4.0}]
        plot_losses({"run": rows}, tmp_path / "loss.png")
        config = override(PRESETS["tiny"][1], train={"micro_batch_size": 2})
        files = cost_plot.plot(config, tmp_path / "cost")
        assert matplotlib.get_backend() == "svg"
        assert pyplot.get_fignums() == []
    finally:
        pyplot.switch_backend(before)
    for file in (tmp_path / "loss.png", *files):
        assert file.stat().st_size > 1000


def test_a_run_without_matplotlib_ends_and_says_what_it_lacks(
    corpus: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in {"matplotlib", *(each for each in sys.modules if each.startswith("matplotlib."))}:
        monkeypatch.setitem(sys.modules, name, None)  # its import fails
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as end:
        main(train_words(corpus, out, train__steps="1"))
    assert end.value.code == 0
    assert "pip install 'crnet[plot]'" in capsys.readouterr().out
    assert not (out / "loss.png").exists()
    assert loss_picture({}, tmp_path / "loss.png") is None
