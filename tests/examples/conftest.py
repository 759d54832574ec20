import logging

import pytest
from image_script import picture


@pytest.fixture
def without_curves(monkeypatch):
    """Skip the plot, which takes longer than a tiny training run."""
    from lion_hf.training import reports

    monkeypatch.setattr(reports, "plot_curves", lambda *args: None)


@pytest.fixture
def said(monkeypatch):
    """All warnings of lion_hf. Transformers' loggers do not pass them on to pytest."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in ("lion_hf", "transformers")]
    for logger in loggers:
        logger.addHandler(handler)
    yield lines
    for logger in loggers:
        logger.removeHandler(handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A folder with three classes of eight images each, not square."""
    root = tmp_path_factory.mktemp("images")
    for number, name in enumerate(("ash", "elm", "oak")):
        (root / name).mkdir()
        for i in range(8):
            picture(8 * number + i).save(root / name / f"{i}.png")
    return root


@pytest.fixture
def run_glue(tmp_path, monkeypatch):
    """The main function of the script, in an empty folder."""
    import run_glue

    monkeypatch.chdir(tmp_path)
    return run_glue.main
