"""Small tables with images that tests prepare."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

from place.config import PrepareConfig

REPORT = "FINDINGS: The heart is normal. A 2.5 cm nodule is seen.\n\nIMPRESSION: Nodule in study {}."


def draw_image(seed: int, height: int = 80, width: int = 64) -> np.ndarray:
    """A smooth picture with noise, (Y, X) uint8."""
    rng = np.random.default_rng(seed)
    ramp = np.linspace(20, 200, width)[None] + np.linspace(0, 30, height)[:, None]
    return np.clip(ramp + rng.normal(0, 5, (height, width)), 0, 255).astype(np.uint8)


def encode(image: np.ndarray, kind: str = "JPEG") -> bytes:
    """The picture as a file's bytes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind)
    return buffer.getvalue()


def write_csv_source(folder: Path, count: int = 12, **changes) -> PrepareConfig:
    """A table of `count` good rows with JPEG images, and the config that prepares it."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count):
        name = f"secret-file-{number}.jpg"
        (folder / "images" / name).write_bytes(encode(draw_image(number)))
        rows.append(
            {
                "file": name,
                "note": REPORT.format(number),
                "who": f"SECRET-PATIENT-{number // 2}",
                "exam": f"SECRET-STUDY-{number}",
                "pos": "PA" if number % 2 else "AP",
                "edema": number % 2,
            }
        )
    pd.DataFrame(rows).to_csv(folder / "table.csv", index=False)
    columns = {"image": "file", "text": "note", "patient": "who", "study": "exam", "view": "pos"}
    settings = {
        "source": "csv",
        "input": str(folder / "table.csv"),
        "image_root": str(folder / "images"),
        "columns": columns,
        "label_columns": ("edema",),
        "output": str(folder / "out"),
        "size_px": 48,
        "rows_per_task": 4,
        "num_workers": 1,
    }
    return PrepareConfig(**{**settings, **changes})


def edit_table(config: PrepareConfig, row: int, **cells) -> None:
    """Change cells of one row of the table."""
    frame = pd.read_csv(config.input, dtype=str, keep_default_na=False)
    for column, value in cells.items():
        frame.loc[row, column] = value
    frame.to_csv(config.input, index=False)
