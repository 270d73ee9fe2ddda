"""The program ``causalpatch``: commands, their options, and how errors leave it.

Commands only read options, call the public face and show what came back. Everything heavy is imported when a command
runs, so that help and mistakes in typing answer at once.

Exit codes: 0 done; 1 a claim does not hold in another model, or no component could be confirmed; 2 the request cannot
be understood; 3 this model or machine cannot do it; 4 the answer would be wrong, so none is given; 130 stopped by the
user.
"""

import sys
import warnings
from typing import Annotated

import typer

import causalpatch as cp
from causalpatch.base.errors import CausalPatchError
from causalpatch.cli import show as view
from causalpatch.cli.circuits import attribute, discover, evaluate
from causalpatch.cli.claims import confirm, power, recheck
from causalpatch.cli.debugging import debug
from causalpatch.cli.look import demo, doctor, show, tasks
from causalpatch.cli.making import pairs
from causalpatch.cli.measure import features, lens, paths, sweep, trace
from causalpatch.cli.search import localize
from causalpatch.cli.studies import check, export, init, ls, run, schema, status, verify
from causalpatch.cli.tuning import tune

app = typer.Typer(
    name="causalpatch",
    help="Activation patching: find which layers, positions, heads and neurons of a model cause a behaviour.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

_PATCH = (demo, sweep, localize, trace, paths, features, lens, attribute, discover, evaluate)
_STUDY = (init, schema, check, run, status, ls, export, verify)
for _command in (*_PATCH, debug, *_STUDY, confirm, recheck, power, tune, doctor, tasks, pairs, show):
    app.command()(_command)


def main(arguments: list[str] | None = None) -> None:
    """Run the program.

    Args:
        arguments: Words after the program's name; those of the process by default.
    """
    words = sys.argv[1:] if arguments is None else arguments
    warnings.showwarning = view.warning
    try:
        # Without standalone mode a command's exit code is what the call returns.
        sys.exit(app(words, standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        view.problem("stopped")
        sys.exit(130)
    except CausalPatchError as error:
        view.error(error, as_json="--json" in words)
        sys.exit(error.exit_code)
    except Exception as error:
        if not hasattr(error, "exit_code") or not hasattr(error, "format_message"):
            raise
        view.problem(f"{error.format_message()}\n  fix: causalpatch --help")
        sys.exit(2)


@app.callback(invoke_without_command=True)
def _root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        view.text(f"causalpatch {cp.__version__}")
        raise typer.Exit
    del ctx
