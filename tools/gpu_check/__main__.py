"""``python tools/gpu_check``: runs the command from a checkout, without an installation."""

import sys
from pathlib import Path

TOOLS = Path(__file__).parents[1]
# The folder itself, which Python puts first, would hide modules behind those of the same name.
sys.path[0] = str(TOOLS)
sys.path.insert(1, str(TOOLS.parent))

if __name__ == "__main__":
    from gpu_check.command import main

    sys.exit(main())
