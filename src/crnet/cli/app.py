"""The command line: words -> RunConfig -> one function.

The process is tuned first (``environment``): that may execute the program once more, and nothing
that was imported before would be kept. Then plugins are loaded: the configuration's classes, and
with them the flags, are made from the methods that are known when they are first imported. Then the
module of the command is imported, and nothing heavy before the command needs it.

Bad input ends with one message per problem on stderr and exit code 2; training that became
non-finite with exit code 1.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import crnet
from crnet.cli import environment, streams
from crnet.cli.arguments import Command, whole_numbers
from crnet.errors import ConfigError, ReportedError, TrainingError
from crnet.parallel.ending import end_process

if TYPE_CHECKING:
    import cyclopts

COMMANDS = {
    "train": "train",
    "finetune": "finetune",
    "cost": "cost",
    "profile": "profile",
    "plan": "plan",
    "timeline": "timeline",
    "prepare": "prepare",
    "evaluate": "evaluate",
    "generate": "generate",
    "observe": "observe",
    "report": "report",
    "watch": "watch",
    "consolidate": "consolidate",
    "export": "export",
    "list": "listing",
    "demo": "demo",
    "sweep": "sweep",
    "compare": "compare",
    "paper": "paper",
    "protocol": "protocol",
    "check-plugin": "check_plugin",
}
"""Name of each command -> its module in this folder."""

HELP = {"--help", "-h"}
EPILOGUE = (
    "With every command: --plugins FILE.py adds methods of your own; repeatable. With "
    f"{', '.join(sorted(environment.COMMANDS))}: {environment.FLAG} leaves the waiting of threads "
    "and malloc as the environment has them."
)
COMPLETION = "Complete commands and flags with Tab: write the script of your shell."


def build_app(only: str | None = None) -> cyclopts.App:
    """The command line with every command, or with one.

    Of every command, the names and what they do are read from the files: a module is imported when
    its command is used. The one command is imported at once.
    """
    import cyclopts

    app = cyclopts.App(
        name="crnet",
        help="Pre-train language models with cross-layer low-rank structure (CR-Net).",
        help_format="plaintext",
        help_epilogue=EPILOGUE,
        help_flags=sorted(HELP),
        version=crnet.__version__,
        config=(whole_numbers,),
    )
    if only is not None:
        app.command(command(only).function, name=only)
        return app
    for name, module in COMMANDS.items():
        function = declared_function(Path(__file__).parent / f"{module}.py")
        path = f"crnet.cli.{module}:{function.name}"
        app.command(path, name=name, help=ast.get_docstring(function, clean=False))
    app.register_install_completion_command(help=COMPLETION)
    return app


def declared_function(file: Path) -> ast.FunctionDef:
    """The function in a command's file that ``COMMAND`` names, read and not executed."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    calls = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    (name,) = [
        each.args[0].id
        for each in calls
        if isinstance(each, ast.Call)
        and isinstance(each.func, ast.Name)
        and each.func.id == "Command"
        and isinstance(each.args[0], ast.Name)
    ]
    return functions[name]


def command(name: str) -> Command:
    """What the module of a command declares."""
    return importlib.import_module(f"crnet.cli.{COMMANDS[name]}").COMMAND


def main(argv: list[str] | None = None) -> None:
    """Run the command line; ends with exit code 0, 1 (training failed, or no memory was left), 2
    (bad input, or standard output cannot be written) or 130."""
    warnings.showwarning = _show_warning
    with streams.steady():
        code = _code_of(argv)
    end_process(code)


def _code_of(argv: list[str] | None) -> int:
    """Run the command line and say how it ended. Raises only what is a mistake of ours."""
    try:
        with _standard_output():
            _check_folder()
            if argv is None:
                environment.tune(sys.argv[1:])
            from crnet.registry import load_plugins

            words = environment.take_flag(sys.argv[1:] if argv is None else argv)
            words, files = take_plugins(words)
            load_plugins(files)
            app_for(words)(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except ReportedError:  # another process of the run prints it
        return 2
    except ConfigError as error:
        for problem in error.problems:
            print(f"crnet: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("crnet: interrupted", file=sys.stderr)
        return 130
    except TrainingError as error:
        print(f"crnet: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(f"crnet: {_out_of_memory(error)}", file=sys.stderr)
        return 1
    return 0


def _check_folder() -> None:
    """Raise ``ConfigError`` where the working folder is gone: libraries end the process then."""
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError("the working folder is gone; change to another one") from error


@contextlib.contextmanager
def _standard_output() -> Iterator[None]:
    """What is printed within reaches standard output, or it is told that it does not."""
    try:
        try:
            yield
        except SystemExit:  # help and version
            sys.stdout.flush()
            if getattr(sys.stdout, "has_no_reader", False):
                sys.exit(0)
            raise
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has seen enough (crnet list | head)
        sys.exit(0)
    except streams.Unwritable as error:
        raise ConfigError(
            f"standard output cannot be written ({error}); what the command wrote into files is "
            "whole: make room, or send its output elsewhere"
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or any(each in str(error) for each in words)
    )


def _out_of_memory(error: BaseException) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"out of memory ({reason}); crnet cost says what a run takes: take a smaller "
        "--train.micro-batch-size, --train.recompute replay, or a smaller model"
    )


def take_plugins(words: list[str]) -> tuple[list[str], list[Path]]:
    """The words without ``--plugins FILE`` and ``--plugins=FILE``, and the files.

    Raises:
        ConfigError: no file follows.
    """
    kept: list[str] = []
    files: list[Path] = []
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if word == "--":
            return [*kept, word, *left], files
        if flag != "--plugins":
            kept.append(word)
            continue
        file = value if equals else next(left, "")
        if not file or file.startswith("-"):
            raise ConfigError("--plugins names no file; say --plugins my_methods.py")
        files.append(Path(file))
    return kept, files


def app_for(words: list[str]) -> cyclopts.App:
    """The command line for these words: their command, with its presets and files behind it.

    Raises:
        ConfigError: a preset, a file, a run or a checkpoint that they name cannot be used.
    """
    name = words[0] if words and words[0] in COMMANDS else None
    app = build_app(name)
    if name is not None and (layers := command(name).layers) and not HELP & set(words):
        import cyclopts

        from crnet.cli import layering

        layering.refuse_sections(words)
        _, bound, _ = app.parse_args(words)
        behind = layering.behind(layers, bound.arguments)
        # Under the command's name: cyclopts drops a section that is named like a command (train).
        values = (cyclopts.config.Dict({name: v}, source=at) for at, v in behind)
        app.config = (*values, whole_numbers)
    return app


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"crnet: warning: {message}", file=sys.stderr)
