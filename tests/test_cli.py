"""The `hf-moe` command: exit codes, one-sentence errors, only the chosen sub-command is imported."""

import subprocess
import sys
import types

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from safetensors import SafetensorError

from hf_moe import __version__, cli


@pytest.fixture
def command(monkeypatch):
    """Register a sub-command `toy` whose `run` is the function given; returns a function that calls `main`."""

    def register(run, add_arguments=lambda parser: parser.add_argument("--value", type=int, default=1)):
        module = types.ModuleType("toy_command")
        module.run, module.add_arguments = run, add_arguments
        monkeypatch.setitem(sys.modules, "toy_command", module)
        monkeypatch.setitem(cli.COMMANDS, "toy", cli.Command("toy_command", "a toy"))
        return lambda *arguments: cli.main(["toy", *arguments])

    return register


def raises(error):
    def run(args):
        raise error

    return run


def test_the_exit_code_is_what_the_command_returns(command):
    assert command(lambda args: args.value)("--value", "7") == 7
    assert command(lambda args: None)() == 0


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("`steps` must be\n  positive, got -1."), "`steps` must be positive, got -1."),
        (FileNotFoundError(2, "No such file or directory", "absent.txt"), "No such file or directory: absent.txt"),
        (PermissionError(13, "Permission denied", "out"), "Permission denied: out"),
        (ImportError("needs gguf. Run `pip install gguf`."), "needs gguf. Run `pip install gguf`."),
        (SafetensorError("header too large"), "header too large"),
        (ValueError(), "ValueError"),
    ],
)
def test_bad_input_is_one_sentence_on_stderr_and_exit_code_2(command, capsys, error, message):
    assert command(raises(error))() == 2
    captured = capsys.readouterr()
    assert captured.err == f"hf-moe: error: {message}\n"
    assert captured.out == ""


def test_a_config_field_of_the_wrong_type_is_bad_input(command, capsys):
    from hf_moe import MoeLlamaConfig

    with pytest.raises(StrictDataclassFieldValidationError):
        MoeLlamaConfig(num_experts="four")
    assert command(lambda args: MoeLlamaConfig(num_experts="four"))() == 2
    assert "num_experts" in capsys.readouterr().err


@pytest.mark.parametrize("position", ["before", "after"])
def test_debug_shows_the_traceback(command, position):
    main = command(raises(ValueError("bad")))
    with pytest.raises(ValueError, match="bad"):
        main("--debug") if position == "after" else cli.main(["--debug", "toy"])


def test_a_mistake_of_ours_keeps_its_traceback(command):
    with pytest.raises(KeyError):
        command(raises(KeyError("x")))()


def test_control_c_exits_with_130_and_no_traceback(command, capsys):
    assert command(raises(KeyboardInterrupt()))() == 130
    assert capsys.readouterr().err == "hf-moe: interrupted.\n"


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["toy", "--nonsense"], ["toy", "--value", "x"]])
def test_wrong_usage_exits_with_2(command, capsys, arguments):
    command(lambda args: 0)
    with pytest.raises(SystemExit) as exit_:
        cli.main(arguments)
    assert exit_.value.code == 2
    assert "usage: hf-moe" in capsys.readouterr().err


def test_version_and_help_work(capsys):
    for option in ("--version", "--help"):
        with pytest.raises(SystemExit) as exit_:
            cli.main([option])
        assert exit_.value.code == 0
    output = capsys.readouterr().out
    assert f"hf-moe {__version__}" in output
    assert all(name in output and command.summary.split()[0] in output for name, command in cli.COMMANDS.items())


def test_only_the_chosen_command_is_imported(run_python):
    code = """
import sys
from hf_moe import cli
try:
    cli.main(["list", "--help"])
except SystemExit:
    pass
modules = {command.module for command in cli.COMMANDS.values()}
print(sorted(modules & set(sys.modules)), file=sys.stderr)
"""
    assert run_python(code).stderr.strip().endswith("['hf_moe.listing']")


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main([name, "--help"])
    assert exit_.value.code == 0
    assert f"usage: hf-moe {name}" in capsys.readouterr().out


def test_a_reader_that_leaves_is_no_error():
    code = "import sys; from hf_moe.cli import main; sys.exit(main(['list', 'types']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == b""
    assert process.wait() == 0
