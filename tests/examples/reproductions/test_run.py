"""One command runs reproductions, keeps every run, and writes one table."""

import json
import subprocess
import sys

import pytest
from common.examples import FOLDER, load_example


@pytest.fixture(scope="module")
def run():
    return load_example("reproductions/run")


def call(*options):
    """As from the shell: the processes it starts import it by the name it was started with."""
    command = [sys.executable, str(FOLDER / "reproductions" / "run.py"), *map(str, options)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
def test_interrupted_commands_go_on_where_they_stopped(run, tmp_path):
    options = ["--preset", "tiny", "--only", "gaussian_rates", "--processes", "1", "--output", tmp_path]
    arms = list(run.load("gaussian_rates").arms)
    assert f"{2 * len(arms)} runs to do, 0 kept" in call(*options)
    written = json.loads((tmp_path / "results.json").read_text())
    assert [row["arm"] for row in written["rows"]] == arms and len(written["runs"]) == 2 * len(arms)
    assert all(row["runs"] == 2 for row in written["rows"])
    table = (tmp_path / "results.md").read_text()
    assert "gaussian_rates (2401.13875)" in table and "±" in table
    assert (tmp_path / "results.png").stat().st_size > 0
    next((tmp_path / "runs" / "gaussian_rates").glob("linear-1.json")).unlink()
    assert f"1 runs to do, {2 * len(arms) - 1} kept" in call(*options)
    again = json.loads((tmp_path / "results.json").read_text())
    assert [row["figures"] for row in again["rows"]] == [row["figures"] for row in written["rows"]]


def test_every_file_of_the_folder_is_a_reproduction_or_shared(run):
    found = run.find_reproductions()
    assert {"comet", "evomoe", "growth", "pr_moe", "mote"} <= set(found)
    assert all(run.load(name).name == name for name in found)


def test_wrong_names_and_numbers_are_refused(run, capsys):
    for options, message in (
        (["--only", "cometh"], "`--only` names ['cometh']"),
        (["--processes", "0"], "`--processes` must be at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            run.main(options)
        assert message in capsys.readouterr().err
