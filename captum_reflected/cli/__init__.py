"""The command ``captum-reflected``."""
