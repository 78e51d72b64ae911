"""Output to a terminal and to a pipe."""

import pytest

from pretrain.core.console import Display


def test_forced_colours_do_not_make_a_pipe_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Notebooks set FORCE_COLOR; a progress bar there would be thousands of lines."""
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert Display(True).bar.disable
