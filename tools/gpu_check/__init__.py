"""Proves on a device, by one command, what the documentation says of GPUs.

``python tools/gpu_check --device cuda`` runs all checks and writes their figures as JSON;
``docs/gpu.md`` describes them.
"""
