"""The model card of an export: where the weights come from, how to load them, and what was measured."""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import yaml

from place.evaluation.leaks import list_leak_notes

if TYPE_CHECKING:
    from place.pretrained.config import PlaceConfig

MAX_METRICS = 10
CARD = """---
library_name: transformers
tags: [chest-radiograph, image-text, place]
---

# PLACE: chest radiographs and radiology reports in one space

For research; not for diagnosis. The terms of the training data hold for these weights too.

```python
import place
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

model = AutoModel.from_pretrained(FOLDER)
image = AutoImageProcessor.from_pretrained(FOLDER)(PIL_IMAGE, return_tensors="pt")
report = AutoTokenizer.from_pretrained(FOLDER)("No pleural effusion.", return_tensors="pt")
output = model(image.pixel_values, report.input_ids, report.attention_mask)
output.image_embeds @ output.text_embeds.T
```

`last_hidden_state` are patch tokens, `observation_embeds` the pathology observations, `observation_attentions` where
each of them looks.{timm}{onnx}

## Training

| | |
| --- | --- |
| data fingerprint | `{fingerprint}` |
| commit | `{commit}` |
| optimiser step | {step} |
| vision encoder started from | {vision} |
| report encoder started from | {text} |
| grey levels | mean {mean:.4f}, deviation {std:.4f} (0 to 1) |
| written by | {exported_by} |

```yaml
{config}```

## Results

{results}
"""
TIMM = (
    "\n\n`timm.create_model('local-dir:FOLDER/timm', pretrained=True)` is the vision encoder alone: one grey channel."
)


ONNX = (
    "\n\n`onnx/vision.onnx` is the vision encoder for other runtimes: `pixel_values` of the image processor, any batch,"
    " to `image` and `patches`."
)


def build_card(config: PlaceConfig, results: dict[str, dict[str, Any]], has_timm: bool, has_onnx: bool = False) -> str:
    """The card as Markdown; every figure comes from a result file."""
    trained = config.trained
    return CARD.format(
        timm=TIMM if has_timm else "",
        onnx=ONNX if has_onnx else "",
        fingerprint=trained["data_fingerprint"],
        commit=trained["commit"],
        step=trained["step"],
        **trained["started_from"],
        mean=config.image_mean,
        std=config.image_std,
        exported_by=trained["exported_by"],
        config=yaml.safe_dump(config.place, sort_keys=False),
        results="\n\n".join(map(_show_result, results.values())) or "None: this checkpoint had not been evaluated.",
    )


def _show_result(result: dict[str, Any]) -> str:
    protocol, unit = result["protocol"], "phrases" if result["task"] == "grounding" else "images"
    judged = protocol.get("judged") or f"split '{protocol.get('split', '')}'"
    lines = [
        f"### {result['task']}: {result['num_samples']} {unit}, {judged}",
        "",
        f"Data `{result['data_fingerprint']}`, commit `{result['commit']}`; all: evaluation/{result['task']}.json.",
        *_list_leaks(protocol.get("leaks")),
        "",
        "| measure | value | 95 % |",
        "| --- | ---: | ---: |",
    ]
    for name, metric in islice(result["metrics"].items(), MAX_METRICS):
        interval = "" if metric["low"] is None else f"{metric['low']:.3f} to {metric['high']:.3f}"
        lines.append(f"| {name} | {metric['value']:.3f} | {interval} |")
    return "\n".join(lines)


def _list_leaks(leaks: dict[str, Any] | None) -> list[str]:
    """What the check for leaks has to say, a line each; why a check was not possible names folders of the machine."""
    if leaks is None:
        return []
    notes = list_leak_notes(leaks | {"not_checked": {}})
    notes += [f"no check against {name}" for name in leaks["not_checked"]]
    return ["", *(f"- {note}" for note in notes)] if notes else []
