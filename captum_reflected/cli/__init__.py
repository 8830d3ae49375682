"""The command ``captum-reflected`` and its subcommands."""
