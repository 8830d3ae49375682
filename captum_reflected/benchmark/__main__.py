"""``torchrun -m captum_reflected.benchmark``: the command, for many processes."""

import sys

from captum_reflected.cli.main import main

if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
