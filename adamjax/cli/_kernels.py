"""`adamjax kernels`."""

from typing import Any

from adamjax import kernels
from adamjax.cli._flags import CommandError


def add_parser(commands: Any) -> None:
    """Tell the command line of this command."""
    parser = commands.add_parser(
        "kernels",
        help="the compiled kernels of fused steps",
        description="Steps of optimizers with fused=True are compiled when they are first needed, and kept.",
    )
    parser.add_argument(
        "action",
        choices=("build", "status", "clear"),
        help="build: compile it now; status: what is kept, and where; clear: remove all of it",
    )


def run(options: dict[str, Any]) -> int:
    """Build, list or remove."""
    action = options["action"]
    if action == "build":
        try:
            print(kernels.build())
        except RuntimeError as error:
            raise CommandError(str(error)) from error
    elif action == "status":
        for kernel in kernels.status():
            print(f"{kernel.path}  {kernel.size} bytes{'  in use here' if kernel.current else ''}")
    else:
        for path in kernels.clear():
            print(f"removed {path}")
    return 0
