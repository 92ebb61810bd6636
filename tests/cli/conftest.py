"""What several tests of the command line use."""

import pytest

from spallm_convert.cli import main


@pytest.fixture
def run(capsys):
    """Return a function that runs a command line and returns what it prints."""

    def call(*arguments, code=0):
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        assert stopped.value.code == code, captured.err
        return captured.err if code else captured.out

    return call
