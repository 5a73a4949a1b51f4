"""The command line: `kerasnorm inspect | rewrite | load | methods`.

Arguments are read and checked before Keras is imported, so that help and mistakes
answer at once. Results go to stdout, everything else to stderr. Exit codes: 0 done;
1 refused, or nothing to do; 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn


EXAMPLES = {
    "kerasnorm": """
        kerasnorm inspect model.h5                    what it is, and what could be done
        kerasnorm rewrite model.h5 gn -o gn.keras     batch to group normalization
        kerasnorm load model.h5 -o model.keras        a file of today from an old one
        kerasnorm methods                             every normalization known
    """,
    "inspect": """
        kerasnorm inspect model.h5
        kerasnorm inspect model.h5 --json | jq '.sites[].path'
    """,
    "rewrite": """
        kerasnorm rewrite model.h5 gn --dry-run
        kerasnorm rewrite model.h5 none -o folded.keras
        kerasnorm rewrite model.h5 gn -o gn.keras --where 'block*/bn*' --groups 8
        kerasnorm rewrite model.h5 gn -o gn.keras --data images.npz --fit refit \\
            --report gn.md --plot gn.png
    """,
    "load": """
        kerasnorm load old_model.hdf5 -o model.keras
        kerasnorm load model.h5 -o model.keras --custom my_layers:Attention
        kerasnorm load siamese.h5 -o model.keras --lambda lambda_1=my_layers:distance
    """,
    "methods": """
        kerasnorm methods
        kerasnorm methods gn
    """,
}
OUTPUT_SUFFIXES = (".keras", ".h5", ".hdf5")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Args:
        argv: the arguments; those of the process by default.

    Raises:
        SystemExit: code 2, the arguments are wrong; code 0, help was asked for.
    """
    args = parser().parse_args(argv)
    usage = args.check(args)
    if usage:
        args.parser.error(usage)
    _choose_backend(args.parser)
    try:
        return _run(args)
    except Exception as error:
        if args.debug:
            raise
        return _fail(args, error)
    except KeyboardInterrupt:
        _say("kerasnorm: interrupted.")
        return 130


def _run(args: argparse.Namespace) -> int:
    commands = _import_commands()
    # Whatever a library prints must not end up in what a program reads.
    with contextlib.redirect_stdout(sys.stderr):
        code, result, shown = getattr(commands, args.command)(args)
    if args.json:
        print(json.dumps(result, indent=2, default=str))
    else:
        print(*shown, sep="\n")
    if code:
        _say("kerasnorm: nothing could be done, nothing was written.")
    return code


def _fail(args: argparse.Namespace, error: Exception) -> int:
    from rewriters import RewriteError

    known = isinstance(error, RewriteError | OSError)
    text = str(error) if known else f"{type(error).__name__}: {error}"
    _say(f"kerasnorm: {text}")
    if not known:
        _say("This should not happen; --debug shows where it came from.")
    if args.json:
        what = getattr(error, "what", text)
        parts = {k: getattr(error, k, None) for k in ("got", "expected", "fix")}
        described = {"type": type(error).__name__, "what": what, **parts}
        print(json.dumps({"error": described}, indent=2, default=str))
    return 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _choose_backend(parser: argparse.ArgumentParser) -> None:
    """JAX where only JAX is there: Keras would ask for TensorFlow."""
    if "KERAS_BACKEND" in os.environ or importlib.util.find_spec("tensorflow"):
        return
    if not importlib.util.find_spec("jax"):
        parser.exit(
            1,
            "kerasnorm: Keras needs TensorFlow or JAX to run on, and neither is here."
            " Install kerasnorm[tensorflow-cpu] or kerasnorm[jax].\n",
        )
    os.environ["KERAS_BACKEND"] = "jax"


def _import_commands() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _quiet_stderr():
        import keras

        from kerasnorm import commands

        keras.ops.zeros(())  # the first tensor finds the devices, and talks about it
    return commands


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


def _check_nothing(args: argparse.Namespace) -> str | None:
    return None


def _check_output(args: argparse.Namespace) -> str | None:
    """What is wrong with where the result should go, before any work is done."""
    out: Path = args.out
    if out.suffix not in OUTPUT_SUFFIXES:
        return f"-o {out}: the name must end in {' or '.join(OUTPUT_SUFFIXES)}"
    if not out.absolute().parent.is_dir():
        return f"-o {out}: the folder {out.absolute().parent} does not exist"
    if out.is_dir():
        return f"-o {out} is a folder"
    if out.exists() and args.model.exists() and out.samefile(args.model):
        return f"-o {out} is the input: give another name, an input is never written"
    return None


def _check_rewrite(args: argparse.Namespace) -> str | None:
    if args.fit and not args.data:
        return f"--fit {args.fit} needs --data: unlabelled inputs to solve on"
    if args.dry_run:
        return None
    if args.out is None:
        return "give -o OUT.keras, or --dry-run to see what would be done"
    if args.report and args.report.suffix not in (".json", ".md"):
        return f"--report {args.report}: the name must end in .json or .md"
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        return "--plot needs matplotlib: pip install kerasnorm[plots]"
    return _check_output(args)


def _groups(text: str) -> int | str:
    if text == "auto":
        return text
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither a positive number nor auto")


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def _reference(text: str) -> str:
    module, colon, attribute = text.partition("=")[0].partition(":")
    if not (module and colon and attribute):
        raise argparse.ArgumentTypeError(f"{text!r} is not MODULE:CLASS")
    return text


def _replacement(text: str) -> str:
    layer, equals, target = text.partition("=")
    if not (layer and equals and ":" in target.strip(":")):
        raise argparse.ArgumentTypeError(f"{text!r} is not LAYER=MODULE:FUNCTION")
    return text


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


class _Version(argparse.Action):
    """Prints the version without importing Keras."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        import kerasnorm

        print(kerasnorm.__version__)
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """What the command line takes; every command's parser is a choice of it."""
    top = _with_examples(
        argparse.ArgumentParser(
            prog="kerasnorm",
            description="Change the normalization of a trained Keras model without"
            " losing what it learned.",
        ),
        "kerasnorm",
    )
    top.add_argument("--version", action=_Version, nargs=0, help="print it and stop")
    commands = top.add_subparsers(metavar="COMMAND", required=True)

    inspect = _command(
        commands,
        "inspect",
        "what a model is, which norms it has, and what could be done with them",
    )
    _model_arguments(inspect)
    inspect.add_argument("--all", action="store_true", help="list every site")

    _rewrite_arguments(_command(commands, "rewrite", "exchange the normalization"))

    load = _command(commands, "load", "read a file of any age, write one of today")
    load.set_defaults(check=_check_output)
    _model_arguments(load)
    _output_argument(load, required=True)

    methods = _command(commands, "methods", "every normalization known, or one of them")
    methods.add_argument("name", nargs="?", metavar="NAME", help="all when left out")
    return top


def _command(commands: Any, name: str, help: str) -> argparse.ArgumentParser:
    described = help[0].upper() + help[1:] + "."
    parser = commands.add_parser(name, help=help, description=described)
    parser.set_defaults(command=name, check=_check_nothing, parser=parser)
    parser.add_argument("--json", action="store_true", help="print JSON, nothing else")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    return _with_examples(parser, name)


def _with_examples(parser: argparse.ArgumentParser, name: str) -> Any:
    lines = EXAMPLES[name].strip("\n").rstrip().splitlines()
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "examples:\n" + "\n".join("  " + line[8:] for line in lines)
    return parser


def _rewrite_arguments(rewrite: argparse.ArgumentParser) -> None:
    rewrite.set_defaults(check=_check_rewrite)
    _model_arguments(rewrite)
    rewrite.add_argument("method", help="gn, ln, none, ...: see `kerasnorm methods`")
    _output_argument(rewrite, required=False)
    add = rewrite.add_argument
    add("--where", metavar="GLOB", help="only sites whose path matches, 'block*/bn*'")
    add(
        "--groups",
        metavar="N|auto",
        type=_groups,
        help="groups, where the method has them; auto chooses per site from the data",
    )
    add(
        "--set",
        metavar="NAME=VALUE",
        type=_setting,
        action="append",
        default=[],
        help="another argument of the new layers, epsilon=1e-5",
    )
    add(
        "--layers",
        choices=("auto", "keras", "kerasnorm"),
        default="auto",
        help="whose layers to use where both have one (default: %(default)s)",
    )
    add("--force", action="store_true", help="also where the statistics degenerate")
    add(
        "--data",
        metavar="X.npz",
        type=Path,
        help="inputs, unlabelled: .npz with x (or"
        " x0, x1, ... for several inputs), or .npy",
    )
    add(
        "--fit",
        choices=("affine", "refit", "distill"),
        help="solve on the data for what the swap would lose",
    )
    add("--samples", metavar="N", type=_positive, help="solve on so many at most")
    add("--epochs", metavar="N", type=_positive, help="of distill (default: 3)")
    add(
        "--dry-run",
        "--plan-only",
        action="store_true",
        help="print the plan, do nothing",
    )
    add("--report", metavar="R.json|R.md", type=Path, help="write the report there")
    add("--plot", metavar="P.png", type=Path, help="draw the report there")


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=Path,
        help=".h5, .hdf5, .keras, or a SavedModel folder; Keras 1, 2, 3",
    )
    parser.add_argument(
        "--custom",
        metavar="MODULE:CLASS[=NAME]",
        type=_reference,
        action="append",
        default=[],
        help="a class or function of your own that the file refers to, under"
        " NAME if it has another there; repeat for more",
    )
    parser.add_argument(
        "--lambda",
        dest="replace",
        metavar="LAYER=MODULE:FUNCTION",
        type=_replacement,
        action="append",
        default=[],
        help="a function to run in place of the code of a Lambda layer",
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="run code held in the file: only for files you trust",
    )


def _output_argument(parser: argparse.ArgumentParser, required: bool) -> None:
    parser.add_argument(
        "-o",
        "--out",
        metavar="OUT.keras",
        type=Path,
        required=required,
        help="where to write; never the input",
    )
