"""The report of a benchmark's folder, from folders written here with known numbers."""

import base64
import csv
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import stats

from captum_reflected import cli
from captum_reflected.benchmark.figures import curves_figure, gallery_figure, line_style
from captum_reflected.benchmark.page import html_page
from captum_reflected.benchmark.report import write_report
from captum_reflected.benchmark.results import BenchmarkError, read_results
from captum_reflected.benchmark.tables import differences, interval, means
from captum_reflected.benchmark.text import escape_markdown, markdown_report

METHODS = ("reflected", "transformer_attribution", "grad_cam")
METRICS = (
    "deletion",
    "insertion",
    "insertion_zero",
    "average_drop",
    "average_drop_normalized",
    "average_increase",
)
CURVES = ("deletion", "insertion", "insertion_zero")
POINTS = 9


def make_rows(count, *, methods=METHODS, metrics=METRICS, seed=0):
    """Rows as a run writes them: curves between 0 and 1, and scores that go with them."""
    random = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        probability = random.uniform(0.3, 0.95)
        entries = {}
        for place, method in enumerate(methods):
            steepness = random.uniform(2, 5) * (1 - 0.15 * place)
            falling = probability * np.exp(-steepness * np.linspace(0, 1, POINTS))
            rising = probability * (1 - np.exp(-steepness * np.linspace(0, 1, POINTS)))
            curves = {"deletion": falling, "insertion": rising, "insertion_zero": 0.8 * rising}
            drop = max(0.0, random.normal(0.1 + 0.05 * place, 0.1))
            values = {name: float(np.trapezoid(curve) / (POINTS - 1)) for name, curve in curves.items()}
            values |= {
                "average_drop": drop,
                "average_drop_normalized": drop / probability,
                "average_increase": int(random.random() < 0.2),
                "relevance_mass_accuracy": random.uniform(0.2, 0.9),
                "relevance_rank_accuracy": random.uniform(0.2, 0.9),
                "pointing_game": int(random.random() < 0.8),
                "made_up": random.uniform(0, 40),
            }
            entries[method] = {name: values[name] for name in metrics}
            entries[method] |= {
                f"{name}_curve": curves[name].tolist() for name in CURVES if name in metrics
            }
        rows.append(
            {
                "kind": "row",
                "index": index,
                "file": f"class/{index:05}.JPEG",
                "label": index % 3,
                "prediction": index % 3 if index % 4 else (index + 1) % 3,
                "target": index % 3,
                "probability": probability,
                "methods": entries,
            }
        )
    return rows


HEADER = {
    "kind": "header",
    "version": 1,
    "environment": {"captum_reflected": "0.1.0", "torch": "2.15", "device": "cpu"},
}


def write_folder(
    folder, rows, *, images=None, methods=METHODS, metrics=METRICS, version=1, **settings
):
    """A folder with one process's rows; what is not told is as in a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {
        "model": "deit_tiny_patch16_224",
        "weights": "sha256:0123abcd",
        "data": {"name": "photos", "images": 200, "fingerprint": "f00"},
        "methods": list(methods),
        "metrics": list(metrics),
        "target": "predicted",
        "precision": "float32",
        "images": len(rows) if images is None else images,
        "batch_size": 1,
        **settings,
    }
    (folder / "settings.json").write_text(json.dumps({"version": version, "settings": entries}))
    lines = [json.dumps(entry) for entry in [HEADER, *rows]]
    (folder / "rows-00000.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_example(folder, index, *, methods=METHODS, size=(24, 32), mask=True, label="cat", **names):
    random = np.random.default_rng(index)
    (folder / "gallery").mkdir(exist_ok=True)
    names = {"prediction": "tabby", "label": label, "target": "tabby"} | names
    maps = random.normal(size=(len(methods), *size)).astype(np.float32)
    maps[0] = 0
    np.savez(
        folder / "gallery" / f"{index:08}.npz",
        picture=random.integers(0, 255, (*size, 3), dtype=np.uint8),
        maps=maps,
        methods=np.array(methods),
        titles=np.array([name.title() for name in methods]),
        **({"mask": maps[-1] > 0} if mask else {}),
        **{key: np.array(value) for key, value in names.items()},
    )


def run(capsys, *arguments):
    code = cli.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def cells(markdown, title):
    """The row of a Markdown table that starts with this title, as texts; first table first."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")][1:]
        for line in markdown.splitlines()
        if line.startswith(f"| {title} ")
    ]
