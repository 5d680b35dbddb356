"""`adamjax kernels`."""

from adamjax import kernels
from adamjax.cli._flags import CommandError, Options, Subparsers


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "kernels",
        help="manage the compiled kernels of fused steps",
        description="The kernels of optimizers with fused=True are compiled when they are first needed, and cached.",
    )
    parser.add_argument(
        "action",
        choices=("build", "status", "clear"),
        help="build: compile the kernel now; status: list the cached kernels; clear: remove all of them",
    )


def run(options: Options) -> int:
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
