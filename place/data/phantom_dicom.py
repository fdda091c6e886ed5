"""Writes a phantom radiograph as a DICOM file, with the quirks that real archives have."""

import io
import zlib

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DigitalXRayImageStorageForPresentation, ExplicitVRLittleEndian, generate_uid

_OFFSET, _GAIN = 500, 10
"""Stored value of grey level 0, and stored steps a grey level."""


def build_dicom(image_YX: NDArray[np.uint8], view: str, patient: str, study: str, spacing_mm: float) -> bytes:
    """Encode a grey image (Y, X) uint8 as DICOM: 12 bits in 16, with a window that gives the grey levels back.

    A third of the studies, by their name, is MONOCHROME1 (stored inverted). Returns the file's bytes. Source: ours.
    """
    is_inverted = zlib.crc32(study.encode()) % 3 == 0
    stored = image_YX.astype(np.uint16) * _GAIN + _OFFSET
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID = DigitalXRayImageStorageForPresentation
    uid = generate_uid(entropy_srcs=[study])
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID = uid
    dataset.StudyInstanceUID = generate_uid(entropy_srcs=[study, "study"])
    dataset.SeriesInstanceUID = generate_uid(entropy_srcs=[study, "series"])
    dataset.PatientName, dataset.PatientID, dataset.AccessionNumber = "Phantom", patient, study[-16:]
    dataset.Modality, dataset.BodyPartExamined, dataset.ViewPosition = "DX", "CHEST", view
    dataset.PixelSpacing = dataset.ImagerPixelSpacing = [f"{spacing_mm:.6f}"] * 2
    dataset.Rows, dataset.Columns = image_YX.shape
    dataset.SamplesPerPixel, dataset.PixelRepresentation = 1, 0
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 16, 12, 11
    dataset.PhotometricInterpretation = "MONOCHROME1" if is_inverted else "MONOCHROME2"
    dataset.PresentationLUTShape = "INVERSE" if is_inverted else "IDENTITY"
    centre = _OFFSET + 255 * _GAIN / 2 + 0.5
    dataset.WindowCenter = 4095 - centre + 1 if is_inverted else centre
    dataset.WindowWidth = 255 * _GAIN + 1
    dataset.PixelData = (4095 - stored if is_inverted else stored).astype("<u2").tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()
