"""The command line as a user types it, in this process."""

import pytest

from lslm_jax.main import main


@pytest.fixture
def command(capsys):
    """Runs a command; gives its stdout, or the one line on stderr of one that must fail."""

    def run(*arguments, code=0):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(map(str, arguments)))
        output = capsys.readouterr()
        assert stop.value.code == code, output.err
        return output.out if code == 0 else output.err.strip().splitlines()[-1].removeprefix("lslm: ")

    return run
