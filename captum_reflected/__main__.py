"""``python -m captum_reflected`` is the command ``captum-reflected``."""

from captum_reflected.cli.main import main

raise SystemExit(main())
