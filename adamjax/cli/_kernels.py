"""`adamjax kernels`."""

from adamjax import kernels
from adamjax.cli._flags import CommandError, Options, Subparsers
from adamjax.kernels import _library


def add_parser(commands: Subparsers) -> None:
    parser = commands.add_parser(
        "kernels",
        help="manage the compiled kernels of fused steps",
        description="Steps with fused=True use a prebuilt kernel, or one that was compiled for this machine earlier, "
        "or compile one and keep it.",
    )
    parser.add_argument(
        "action",
        choices=("build", "status", "clear"),
        help="build: compile a kernel now if there is none for this machine; status: list prebuilt and kept kernels, "
        "and say which is used; clear: remove those that are kept",
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
            print(f"{kernel.path}  {kernel.size} bytes  {_state(kernel)}")
        print(_library.choice())
    else:
        try:
            removed = kernels.clear()
        except OSError as error:
            raise CommandError(f"{error.filename} cannot be removed ({error.strerror})") from error
        for path in removed:
            print(f"removed {path}")
    return 0


def _state(kernel: kernels.Kernel) -> str:
    if kernel.current:
        return "used here"
    return "not used here" if kernel.fault is None else f"never loaded: {kernel.fault}"
