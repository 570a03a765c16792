"""Serve the demo: `python -m timm_csra.demo`."""

import argparse
from pathlib import Path

from ..trained import FORM, read_class_names, read_trained
from . import __doc__ as description
from . import launch
from .checkpoints import FILES


def main(arguments: list[str] | None = None) -> None:
    """Parse the arguments, check the files that they name, and serve the page."""
    parser = argparse.ArgumentParser(prog="python -m timm_csra.demo", description=description)
    parser.add_argument(
        "--host", default="127.0.0.1", help="0.0.0.0 to listen on all interfaces (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    parser.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="SPEC",
        help="checkpoint to list first: a timm name, hf-hub:USER/REPO, or file:ARCH@PATH of timm's train script, as "
        f"{FILES}{FORM.rpartition(' ')[2]} (can be given several times)",
    )
    parser.add_argument(
        "--class-names",
        type=Path,
        metavar="FILE",
        help="class names of --model, one per line in the order of the head",
    )
    args = parser.parse_args(arguments)
    try:
        names = read_class_names(args.class_names) if args.class_names else ()
        for spec in args.model:
            if spec.startswith(FILES):
                trained = read_trained(spec.removeprefix(FILES))
                if names and len(names) != trained.num_classes:
                    count = trained.num_classes
                    raise ValueError(f"{args.class_names}: found {len(names)} names, expected one for each of {count}.")
                print(f"{spec}: {trained.weights_from}, {trained.num_classes} classes")
    except ValueError as error:
        parser.error(str(error))
    launch(dict.fromkeys(args.model, names), server_name=args.host, server_port=args.port)


if __name__ == "__main__":
    main()
