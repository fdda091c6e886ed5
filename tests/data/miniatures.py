"""Lays out a few images of each downstream data set in the form in which it is downloaded, with drawn pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from archives import write_mimic, write_openi_report, write_png
from pycocotools import mask as coco
from small_sets import draw_image, encode

from place.cli import build_parser, build_prepare_config
from place.config import PrepareConfig
from place.data.phantom_dicom import build_dicom

PROTOCOLS = Path(__file__).parents[2] / "configs" / "eval"
SIDE = 96
"""Pixels of a side of most images, where the real ones have 1024."""


def write_protocol(name: str, folder: Path, **changes: Any) -> Path:
    """A copy of a protocol file beside the data, its counts those of the miniature."""
    tree = yaml.safe_load((PROTOCOLS / f"{name}.yaml").read_text()) | changes
    path = folder.parent / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def parse_prepare(*words: Any) -> PrepareConfig:
    """The config that `place prepare WORDS` works by."""
    return build_prepare_config(build_parser().parse_args(["prepare", *map(str, words)]))


def prepare_words(protocol: Path, folder: Path, *more: Any) -> list[Any]:
    """A command for a miniature, in one process."""
    small = ("--size-px", SIDE // 2, "--num-workers", 1, "--launcher", "local")
    return ["--protocol", protocol, "--input", folder, "--output", f"{folder}-out", *small, *more]


def write_image(path: Path, seed: int, height: int = SIDE, width: int = SIDE) -> None:
    """A picture in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = draw_image(seed, height, width)
    if path.suffix in (".dcm", ".dicom"):
        path.write_bytes(build_dicom(image, "PA", f"P{seed}", f"study {seed}", 0.14))
    else:
        path.write_bytes(encode(image, {".png": "PNG"}.get(path.suffix, "JPEG")))


def write_nih(folder: Path) -> None:
    """Twelve patients with two images each, the last three in the official test list; boxes on two images."""
    lines = [
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
    ]
    lists: dict[str, list[str]] = {"train_val_list.txt": [], "test_list.txt": []}
    found = ["No Finding", "Cardiomegaly|Emphysema", "Hernia", "Pleural_Thickening"]
    for patient in range(1, 13):
        for follow_up in range(2):
            name = f"{patient:08}_{follow_up:03}.png"
            lines.append(f"{name},{found[patient % 4]},{follow_up},{patient},058,M,PA,2682,2749,0.143,0.143")
            lists["test_list.txt" if patient > 9 else "train_val_list.txt"].append(name)
            write_image(folder / f"images_{1 + patient % 3:03}" / "images" / name, patient * 2 + follow_up)
    (folder / "Data_Entry_2017_v2020.csv").write_text("\n".join(lines) + "\n")
    boxes = ["00000010_000.png,Infiltrate,8.5,20.25,30,40,,,", "00000011_001.png,Mass,1,2,3,4,,,"]
    (folder / "BBox_List_2017.csv").write_text(
        "\n".join(["Image Index,Finding Label,Bbox [x,y,w,h],,,", *boxes]) + "\n"
    )
    for name, images in lists.items():
        (folder / name).write_text("\n".join(images) + "\n")


def write_rsna(folder: Path, count: int = 20) -> None:
    """Every second image has pneumonia, every fourth two boxes."""
    lines = ["patientId,x,y,width,height,Target"]
    for number in range(count):
        name = f"{number:08x}-14fd-4e49-80ba-63a80b6bddd6"
        write_image(folder / "stage_2_train_images" / f"{name}.dcm", number)
        if number % 2 == 0:
            lines.append(f"{name},,,,,0")
        else:
            lines.append(f"{name},10.0,20.0,32.0,40.0,1")
        if number % 4 == 1:
            lines.append(f"{name},60.0,24.0,20.0,30.0,1")
    (folder / "stage_2_train_labels.csv").write_text("\n".join(lines) + "\n")


RSNA_MAP = "pneumonia-challenge-dataset-mappings_2018.json"


def write_rsna_with_patients(folder: Path, count: int = 20) -> None:
    """The same, with the published map: image n is NIH's image n % 2 of patient 1 + n // 2."""
    write_rsna(folder, count)
    lines = (folder / "stage_2_train_labels.csv").read_text().split()[1:]
    names = list(dict.fromkeys(line.split(",")[0] for line in lines))
    records = [
        {
            "img_id": f"{1 + number // 2:08}_{number % 2:03}.png",
            "subset_img_id": name,
            "SOPInstanceUID": f"1.2.276.0.{number}",
            "orig_labels": ["No Finding"],
        }
        for number, name in enumerate([*names, "00000000-of-the-test-images"])
    ]
    (folder / RSNA_MAP).write_text(json.dumps(records))


MS_CXR = "MS_CXR_Local_Alignment_v1.1.0.csv"
DRAWN_ON = (2544, 3180)
"""Width and height that the boxes of MS-CXR are drawn on, of the shape of the pictures of `write_mimic`."""


def write_ms_cxr(folder: Path) -> None:
    """MIMIC-CXR-JPG with phrases on three images, one in each official split; the first phrase has two boxes.

    The first image has a report of two words, the second one that contradicts itself, the third none.
    """
    table = write_mimic(folder)
    names = table[table["ViewPosition"] == "PA"].drop_duplicates("split")
    paths = [next(folder.glob(f"files/*/*/*/{name}.jpg")).relative_to(folder).as_posix() for name in names["dicom_id"]]
    reports = [(folder / path).parent.with_suffix(".txt") for path in paths]
    reports[0].write_text("IMPRESSION: Small pneumothorax.")
    reports[1].write_text("FINDINGS: There is a left pneumothorax. IMPRESSION: No pneumothorax.")
    reports[2].unlink()
    boxes = [
        (0, "Pneumonia", "left lower lobe opacity", 212, 1060, 530, 636),
        (0, "Pneumonia", "left lower lobe opacity", 0, 530, 318, 212),
        (0, "Edema", "mild edema", 106, 848, 318, 212),
        (1, "Pneumothorax", "small apical pneumothorax", 1272, 530, 636, 318),
        (2, "Cardiomegaly", "the heart is enlarged", 636, 1590, 1060, 848),
    ]
    columns = ["dicom_id", "category_name", "label_text", "path", "x", "y", "w", "h", "image_width", "image_height"]
    rows = [
        [names["dicom_id"].iloc[at], finding, text, paths[at], *numbers, *DRAWN_ON, "test"]
        for at, finding, text, *numbers in boxes
    ]
    pd.DataFrame(rows, columns=[*columns, "split"]).to_csv(folder / MS_CXR, index=False)


def write_openi(folder: Path) -> None:
    """Ten reports of two images, as NLMCXR_reports.tgz and NLMCXR_png.tgz unpack, one without any, and the views."""
    lines = ["uid,filename,projection"]
    for report in range(1, 11):
        middle = "1_" if report == 1 else ""  # two forms of the name are in use
        images = [f"CXR{report}_{middle}IM-{report:04}-{number}001" for number in (1, 2)]
        for number, (image, view) in enumerate(zip(images, ("Frontal", "Lateral"))):
            write_png(folder / f"{image}.png", 2 * report + number)
            lines.append(f"{report},{report}_IM-{report:04}-{number + 1}001.dcm.png,{view}")
        texts = (f"The heart is normal. A {report}.5 cm nodule is seen.", "Normal chest.")
        write_openi_report(folder / "ecgen-radiology" / f"{report}.xml", f"CXR{report}", images, *texts)
    write_openi_report(folder / "ecgen-radiology" / "11.xml", "CXR11", [], "The heart is normal.", "Normal chest.")
    (folder / "indiana_projections.csv").write_text("\n".join(lines) + "\n")


def list_runs(mask_YX: np.ndarray) -> str:
    """Runs as SIIM writes them: offset since the last run and length, down the columns."""
    flat = np.concatenate([[0], mask_YX.T.ravel().astype(int), [0]])
    begins, ends = (np.flatnonzero(np.diff(flat) == step) for step in (1, -1))
    words, at = [], 0
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        words += [begin - at, end - begin]
        at = end
    return " ".join(map(str, words))


def draw_region(number: int, part: int) -> np.ndarray:
    """A rectangle that hangs on the image and the region's number."""
    mask_YX = np.zeros((SIDE, SIDE), bool)
    mask_YX[8 + 2 * number : 30 + 2 * number, 10 + 40 * part : 34 + 40 * part] = True
    return mask_YX


def write_siim(folder: Path, count: int = 20) -> None:
    """Every second image has a pneumothorax, every fourth one of two regions; DICOM in two levels of folders."""
    lines = ["ImageId, EncodedPixels"]
    for number in range(count):
        name = f"1.2.276.0.7230010.3.1.4.8323329.{number}.1517875.{number}"
        write_image(folder / "dicom-images-train" / f"1.2.{number}" / f"1.3.{number}" / f"{name}.dcm", number)
        regions = [0, 1] if number % 4 == 1 else [0]
        lines += (
            [f"{name}, {list_runs(draw_region(number, part))}" for part in regions] if number % 2 else [f"{name}, -1"]
        )
    (folder / "train-rle.csv").write_text("\n".join(lines) + "\n")


CHEXPERT = ["No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema"]
CHEXPERT += ["Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other"]
CHEXPERT += ["Fracture", "Support Devices"]
FIVE = ["Atelectasis", "Cardiomegaly", "Consolidation", "Edema", "Pleural Effusion"]


def write_chexpert(folder: Path, patients: int = 30) -> None:
    """Each patient has a frontal image with one of the five findings, certain or not, and a lateral one."""
    head = ",".join(["Path,Sex,Age,Frontal/Lateral,AP/PA", *CHEXPERT])
    lines: dict[str, list[str]] = {"train": [head], "valid": [head]}
    for patient in range(patients + 6):
        part = "train" if patient < patients else "valid"
        signs = dict.fromkeys(CHEXPERT, "0.0" if part == "valid" else "")
        signs[FIVE[patient % 5]] = "-1.0" if part == "train" and patient % 3 == 2 else "1.0"
        for number, view in enumerate(("frontal", "lateral"), start=1):
            path = f"{part}/patient{patient:05}/study1/view{number}_{view}.jpg"
            write_image(folder / path, 2 * patient + number)
            cells = [f"{folder.name}/{path}", "Female", "68", view.title(), "AP" if view == "frontal" else ""]
            lines[part].append(",".join([*cells, *signs.values()]))
    for part, text in lines.items():
        (folder / f"{part}.csv").write_text("\n".join(text) + "\n")


write_chexpert_5x200 = write_chexpert


def write_covidx(folder: Path) -> None:
    """Lists without a header; patient 1 of one source is another person than patient 1 of the other."""
    seed = 0
    for split, count in (("train", 8), ("val", 4), ("test", 6)):
        lines = []
        for number in range(count):
            source, patient = ("cohen", str(seed // 4)) if number % 2 else ("rsna", str(seed))
            name = f"{source}-{split}-{number}.{'png' if number % 2 else 'jpg'}"
            write_image(folder / split / name, seed)
            lines.append(f"{patient} {name} {'positive' if number % 4 < 2 else 'negative'} {source}")
            seed += 1
        (folder / f"{split}.txt").write_text("\n".join(lines) + "\n")


VINDR: list[str] = yaml.safe_load((PROTOCOLS / "vindr.yaml").read_text())["layout"]["labels"][0]["names"]


def write_vindr(folder: Path, num_train: int = 12, num_test: int = 4) -> None:
    """Three readers a training image: two see cardiomegaly in every third, one alone a nodule in the first."""
    (folder / "annotations").mkdir()
    labels = [",".join(["image_id,rad_id", *VINDR])]
    boxes = ["image_id,rad_id,class_name,x_min,y_min,x_max,y_max"]
    for number in range(num_train):
        name = f"{number:032x}"
        write_image(folder / "train" / f"{name}.dicom", number)
        for reader in range(3):
            seen = {"Cardiomegaly"} if number % 3 == 0 and reader < 2 else set()
            seen |= {"Nodule/Mass"} if number == 0 and reader == 2 else set()
            labels.append(
                f"{name},R{reader}," + ",".join(str(int(label in (seen or {"No finding"}))) for label in VINDR)
            )
            shift = 4.0 * reader
            boxes += [f"{name},R{reader},{label},{20 + shift},{40 + shift},{60 + shift},{80 + shift}" for label in seen]
            boxes += [] if seen else [f"{name},R{reader},No finding,,,,"]
    (folder / "annotations" / "image_labels_train.csv").write_text("\n".join(labels) + "\n")
    (folder / "annotations" / "annotations_train.csv").write_text("\n".join(boxes) + "\n")
    labels = [",".join(["image_id", *VINDR]).replace("Other diseases", "Other disease")]
    boxes = ["image_id,class_name,x_min,y_min,x_max,y_max"]
    for number in range(num_test):
        name = f"{1000 + number:032x}"
        write_image(folder / "test" / f"{name}.dicom", 100 + number)
        seen = {"Other diseases", "Cardiomegaly"} if number == 0 else {"No finding"}
        labels.append(f"{name}," + ",".join(str(int(label in seen)) for label in VINDR))
        boxes.append(f"{name},Cardiomegaly,10,20,30,40" if number == 0 else f"{name},No finding,,,,")
    (folder / "annotations" / "image_labels_test.csv").write_text("\n".join(labels) + "\n")
    (folder / "annotations" / "annotations_test.csv").write_text("\n".join(boxes) + "\n")


def write_object_cxr(folder: Path) -> None:
    """Each kind of shape, one image with two, every fourth without; images that are no squares."""
    cells = ["0 10 20 40 60", "1 20 20 60 40;0 70 10 80 30", "2 10 10 50 10 50 50", ""]
    for part, count in (("train", 16), ("dev", 8)):
        lines = ["image_name,annotation"]
        for number in range(count):
            lines.append(f"{number:05}.jpg,{cells[number % 4]}")
            write_image(folder / part / f"{number:05}.jpg", number + 100 * (part == "dev"), 120, 96)
        (folder / f"{part}.csv").write_text("\n".join(lines) + "\n")


def write_chestx_det10(folder: Path) -> None:
    """Every second image has two findings, one of them twice."""
    for part, first, count in (("train", 36199, 12), ("test", 40000, 4)):
        records = []
        for number in range(count):
            name = f"{first + number}.png"
            write_image(folder / f"{part}_data" / name, first + number)
            syms = ["Effusion", "Mass", "Effusion"] if number % 2 else []
            boxes = [[4, 8, 20, 40], [30, 30, 50, 60], [60, 8, 80, 40]] if number % 2 else []
            records.append({"file_name": name, "syms": syms, "boxes": boxes})
        (folder / f"{part}.json").write_text(json.dumps(records))


def write_coco(folder: Path, sides: tuple[int, int] = (SIDE, SIDE)) -> None:
    """Tubes as polygons, wires as RLE, compressed and not; image 0 of every four has none, the last has both."""
    categories = [{"id": 1, "name": "tube"}, {"id": 7, "name": "wire"}]
    for part, count in (("train", 24), ("test", 8)):
        images, annotations = [], []
        for number in range(count):
            write_image(folder / part / f"{number}.png", number + 100 * (part == "test"), *sides)
            images.append({"id": number, "file_name": f"{number}.png", "height": SIDE, "width": SIDE})
            for category in ([], [1], [7], [1, 7])[number % 4]:
                mask_YX = draw_region(number, category // 7).astype(np.uint8)
                packed = coco.encode(np.asfortranarray(mask_YX))
                x, y, w, h = bbox = coco.toBbox(packed).tolist()
                right, low = x + w - 1, y + h - 1
                drawn: Any = [[x, y, right, y, right, low, x, low]]
                if category == 7:
                    drawn = {"size": [SIDE, SIDE]}
                    drawn["counts"] = packed["counts"].decode() if number % 4 == 2 else list_counts(mask_YX)
                annotations.append({"id": len(annotations), "image_id": number, "category_id": category, "bbox": bbox})
                annotations[-1]["segmentation"] = drawn
        tree = {"images": images, "annotations": annotations, "categories": categories}
        (folder / f"{part}.json").write_text(json.dumps(tree))


def list_counts(mask_YX: np.ndarray) -> list[int]:
    """Counts of an RLE that is not compressed: lengths of the runs of zeros and ones in turn, down the columns."""
    flat = mask_YX.T.ravel().astype(int)
    return np.diff([0, *np.flatnonzero(np.diff(flat, prepend=0)), flat.size]).tolist()
