"""The command line: `kerasnorm inspect | rewrite | load | methods | ...`.

A package beside kerasnorm, because arguments are read and checked before Keras is
imported: help and mistakes answer at once. Every module here whose name has no
underscore is a command:

    docstring            its first line is the help
    EXAMPLES             lines for the end of `--help`
    arguments(parser)    adds what it takes
    check(args)          what is wrong with the arguments, or None; before any work
    run(args)            `Outcome`: why nothing could be done, or None; result for
                         --json; lines to print

Their imports at the top are the standard library's and this package's; `run` imports
what it needs. Results go to stdout, everything else to stderr. Exit codes: 0 done;
1 refused, or nothing to do; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.metadata
import importlib.util
import json
import os
import pkgutil
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from kerasnorm_cli._output import close, escaped, show


# Why nothing could be done, or None; result for --json; lines to print.
Outcome = tuple[str | None, dict[str, Any], list[str]]

DESCRIPTION = (
    "Change the normalization of a trained Keras model without losing what it learned."
)
EXAMPLES = """
    kerasnorm inspect model.h5                    what it is, and what could be done
    kerasnorm rewrite model.h5 gn -o gn.keras     batch to group normalization
    kerasnorm load model.h5 -o model.keras        a file of today from an old one
    kerasnorm methods                             every normalization known
"""


class Unusable(Exception):
    """Keras does not start."""


def commands() -> dict[str, Any]:
    """The modules of the commands by name."""
    names = [m.name for m in pkgutil.iter_modules(__path__) if m.name[0] != "_"]
    return {name: importlib.import_module(f"{__name__}.{name}") for name in names}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the arguments; those of the process by default.

    Raises:
        SystemExit: code 2, the arguments are wrong; code 0, help was asked for.
    """
    args = parser().parse_args(argv)
    try:
        usage = args.check(args)
        if usage:
            args.parser.error(escaped(usage))
        _choose_backend(args.parser)
        return _run(args)
    except BrokenPipeError:
        close()
        return 1
    except Exception as error:
        if args.debug:
            raise
        return _fail(args, error)
    except KeyboardInterrupt:
        _say("interrupted.")
        return 130


def _run(args: argparse.Namespace) -> int:
    _import_keras()
    # Whatever a library prints must not end up in what a program reads.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"warning: {message}")
        reason, result, shown = args.run(args)
    if args.json:
        show(json.dumps(result, indent=2, default=str))
    else:
        show("\n".join(shown))
    if reason is None:
        return 0
    _say(f"{reason}.")
    return 1


def _fail(args: argparse.Namespace, error: Exception) -> int:
    # Not imported: what failed may be the import of Keras.
    ours = getattr(sys.modules.get("rewriters.errors"), "RewriteError", Unusable)
    known = isinstance(error, (ours, Unusable, OSError))
    text = str(error) if known else f"{type(error).__name__}: {error}"
    if isinstance(error, FileNotFoundError) and error.filename is None:
        text = "the working folder does not exist any more"
    try:
        _say(text)
        if not known:
            _say("this should not happen; --debug shows where it came from.")
        return _describe(args, error, text)
    except BrokenPipeError:
        close()
        return 1


def _describe(args: argparse.Namespace, error: Exception, text: str) -> int:
    if args.json:
        what = getattr(error, "what", text)
        parts = {k: getattr(error, k, None) for k in ("got", "expected", "fix")}
        described = {"type": type(error).__name__, "what": what, **parts}
        show(json.dumps({"error": described}, indent=2, default=str))
    return 1


def _say(text: str) -> None:
    show(f"kerasnorm: {text}", sys.stderr)


def _choose_backend(parser: argparse.ArgumentParser) -> None:
    """JAX where only JAX is there: Keras would ask for TensorFlow."""
    found = importlib.util.find_spec("tensorflow")
    # A folder that an uninstallation left behind has no origin.
    if "KERAS_BACKEND" in os.environ or (found and found.origin):
        return
    if not importlib.util.find_spec("jax"):
        parser.exit(
            1,
            "kerasnorm: Keras needs TensorFlow or JAX to run on, and neither is here."
            " Install kerasnorm[tensorflow-cpu] or kerasnorm[jax].\n",
        )
    os.environ["KERAS_BACKEND"] = "jax"


def _import_keras() -> None:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():
        try:
            import keras

            keras.ops.zeros(())  # finds the devices, and talks about it
        except Exception as error:  # each backend raises its own
            backend = os.environ.get("KERAS_BACKEND", "tensorflow")
            first = str(error).strip().partition("\n")[0]
            raise Unusable(
                f"Keras cannot start on {backend!r}: {type(error).__name__}: {first}."
                " Set KERAS_BACKEND to tensorflow, jax or torch, whichever is"
                " installed."
            ) from error
        import kerasnorm.rewriting.apply  # noqa: F401


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Holds back what native code writes to stderr; given back when something fails."""
    try:
        kept = os.dup(2)
    except OSError:  # no stderr at all
        yield
        return
    with tempfile.TemporaryFile() as held:
        sys.stderr.flush()
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(kept, 2)
            held.seek(0)
            os.write(2, held.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


class _Version(argparse.Action):
    """Prints the version without importing Keras."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        print(importlib.metadata.version("kerasnorm"))
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """What the command line takes; every command's parser is a choice of it."""
    top = argparse.ArgumentParser(prog="kerasnorm", description=DESCRIPTION)
    _show_examples(top, EXAMPLES)
    top.add_argument("--version", action=_Version, nargs=0, help="print it and stop")
    choices = top.add_subparsers(metavar="COMMAND", required=True)
    for name, command in commands().items():
        described = (command.__doc__ or "").splitlines()[0]
        help = described[0].lower() + described[1:].rstrip(".")
        own = choices.add_parser(name, help=help, description=described)
        _show_examples(own, command.EXAMPLES)
        command.arguments(own)
        add = own.add_argument
        add("--json", action="store_true", help="print JSON, nothing else")
        add("--debug", action="store_true", help="show tracebacks")
        own.set_defaults(check=command.check, run=command.run, parser=own)
    return top


def _show_examples(parser: argparse.ArgumentParser, examples: str) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    lines = textwrap.dedent(examples).strip("\n")
    parser.epilog = "examples:\n" + textwrap.indent(lines, "  ")
