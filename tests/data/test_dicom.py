"""DICOM, JPEG and PNG bytes to the grey picture a radiologist would see."""

from __future__ import annotations

import io

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian
from small_sets import draw_image, encode

from place.data.dicom import decode_dicom
from place.data.images import ImageInfo, Rejected, decode_image, encode_grey_jpeg, read_file, shrink_image


def build_dicom(stored: np.ndarray, **elements) -> bytes:
    """A small radiograph; bits follow from the array."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.1.1", "1.2.3.4"
    dataset.Rows, dataset.Columns = stored.shape[-2:]
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.BitsAllocated = dataset.BitsStored = 8 * stored.dtype.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(stored.dtype.kind == "i")
    for name, value in elements.items():
        setattr(dataset, name, value)
    dataset.PixelData = stored.tobytes()
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def read_testdata(name: str) -> bytes:
    path = get_testdata_file(name, download=False)
    assert path is not None
    with open(str(path), "rb") as file:
        return file.read()


def reason_of(data: bytes) -> str:
    with pytest.raises(Rejected) as caught:
        decode_image(data)
    return caught.value.reason


RAMP = np.arange(400, dtype=np.uint16).reshape(20, 20)


def test_eight_bits_come_through_unchanged():
    image = draw_image(1)
    np.testing.assert_array_equal(decode_dicom(build_dicom(image))[0], image)


def test_sixteen_bits_are_scaled_to_their_range():
    image, _ = decode_dicom(build_dicom(RAMP * 100))
    np.testing.assert_array_equal(image, np.rint(RAMP / 399 * 255))


def test_signed_pixels_keep_their_order():
    image, _ = decode_dicom(build_dicom(RAMP.astype(np.int16) - 200))
    np.testing.assert_array_equal(image, np.rint(RAMP / 399 * 255))


def test_the_window_clips_what_lies_outside_of_it():
    image, _ = decode_dicom(build_dicom(RAMP, WindowCenter=200, WindowWidth=101))
    # PS3.3 C.11.2.1.2: below 200 - 0.5 - 50 all is black, above 200 - 0.5 + 50 all is white, straight between.
    expected = np.clip(((RAMP - 199.5) / 100 + 0.5) * 255, 0, 255)
    assert image[RAMP <= 149].max() == 0
    assert image[RAMP >= 250].min() == 255
    assert np.abs(image - expected).max() <= 1


def test_the_first_of_several_windows_is_taken():
    several = build_dicom(RAMP, WindowCenter=[200, 10], WindowWidth=[101, 5])
    single = build_dicom(RAMP, WindowCenter=200, WindowWidth=101)
    np.testing.assert_array_equal(decode_dicom(several)[0], decode_dicom(single)[0])


def test_the_window_is_meant_after_the_rescale():
    rescaled = build_dicom(RAMP, RescaleSlope=2, RescaleIntercept=-100, WindowCenter=300, WindowWidth=201)
    image, _ = decode_dicom(rescaled)
    assert image[RAMP * 2.0 - 100 <= 198].max() == 0
    assert image[RAMP * 2.0 - 100 >= 401].min() == 255


def test_monochrome1_is_inverted():
    plain, _ = decode_dicom(build_dicom(RAMP))
    image, info = decode_dicom(build_dicom(RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(image, 255 - plain)
    assert info.photometric == "MONOCHROME1"


def test_the_real_monochrome_pair_is_one_picture_and_its_negative(real_data):
    first, info = decode_dicom((real_data / "dicom" / "rsna_chest_jpeg.dcm").read_bytes())
    second, _ = decode_dicom((real_data / "dicom" / "monochrome1.dcm").read_bytes())
    assert first.shape == (1024, 1024)
    np.testing.assert_array_equal(first, 255 - second)
    assert info == ImageInfo("PA", "", "CR", "MONOCHROME2", (0.168, 0.168))


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_and_does_not_widen_the_range(photometric):
    padded = (RAMP + 1000).copy()
    padded[:, :2] = 60000
    image, _ = decode_dicom(build_dicom(padded, PixelPaddingValue=60000, PhotometricInterpretation=photometric))
    assert image[:, :2].max() == 0
    assert image[:, 2:].max() == 255


@pytest.mark.parametrize(
    "name", ["MR_small_RLE.dcm", "MR_small_jp2klossless.dcm", "MR_small_bigendian.dcm", "MR_small_implicit.dcm"]
)
def test_every_lossless_encoding_gives_the_same_picture(name):
    np.testing.assert_array_equal(decode_dicom(read_testdata(name))[0], decode_dicom(read_testdata("MR_small.dcm"))[0])


@pytest.mark.parametrize("name", ["CT_small.dcm", "693_J2KI.dcm", "JPEG2000.dcm", "examples_overlay.dcm"])
def test_pixels_follow_from_pydicoms_own_look_up_tables(name):
    dataset = pydicom.dcmread(io.BytesIO(read_testdata(name)))
    shown = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset), dataset)
    shown = shown.astype(float)
    if "PixelPaddingValue" in dataset:
        shown[dataset.pixel_array == dataset.PixelPaddingValue] = shown[
            dataset.pixel_array != dataset.PixelPaddingValue
        ].min()
    expected = np.rint((shown - shown.min()) * (255 / (shown.max() - shown.min())))
    np.testing.assert_array_equal(decode_dicom(read_testdata(name))[0], expected)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("rtdose.dcm", "multi_frame"),
        ("MR_truncated.dcm", "truncated_image"),
        ("MR_small_jpeg_ls_lossless.dcm", "unsupported_compression"),
        ("JPGExtended.dcm", "unsupported_compression"),
        ("image_dfl.dcm", "unsupported_compression"),
        ("examples_palette.dcm", "unsupported_photometric"),
        ("reportsi.dcm", "unreadable_image"),
        ("badVR.dcm", "unreadable_image"),
        ("SC_rgb_small_odd.dcm", "too_small"),
    ],
)
def test_what_cannot_be_used_is_refused_with_a_reason(name, reason):
    assert reason_of(read_testdata(name)) == reason


def test_the_hint_names_what_to_install_where_a_decoder_is_missing():
    with pytest.raises(Rejected) as caught:
        decode_image(read_testdata("MR_small_jpeg_ls_lossless.dcm"))
    assert "place-cxr[dicom-gpl]" in caught.value.detail


def test_nothing_of_the_header_but_codes_comes_out():
    data = build_dicom(
        RAMP,
        PatientName="Doe^Jane",
        PatientID="4711",
        ViewPosition="PA",
        Modality="DX",
        ImageLaterality="U",
        PixelSpacing=[0.2, 0.3],
        StudyDescription="Doe",
    )
    assert decode_dicom(data)[1] == ImageInfo("PA", "U", "DX", "MONOCHROME2", (0.2, 0.3))
    odd = build_dicom(RAMP, ViewPosition="DOE 4711", Modality="DX", ImagerPixelSpacing=[0.2, 0])
    assert decode_dicom(odd)[1] == ImageInfo("", "", "DX", "MONOCHROME2", None)


def test_a_huge_picture_is_refused_before_memory_is_taken():
    small = pydicom.dcmread(io.BytesIO(build_dicom(RAMP)))
    small.Rows = small.Columns = 65535
    buffer = io.BytesIO()
    small.save_as(buffer)
    assert reason_of(buffer.getvalue()) == "too_large"
    assert reason_of(encode(np.zeros((9000, 9000), np.uint8), "PNG")) == "too_large"
    assert reason_of(encode(np.zeros((15000, 15000), np.uint8), "PNG")) == "too_large"


def test_a_huge_codestream_in_a_small_frame_is_refused():
    data = bytearray(read_testdata("MR_small_jp2klossless.dcm"))
    at = data.index(b"\xff\x4f\xff\x51") + 8
    data[at : at + 4] = b"\x00\x08\x00\x00"
    assert reason_of(bytes(data)) == "too_large"


def test_a_decoder_that_panics_only_costs_the_row():
    dataset = pydicom.dcmread(io.BytesIO(read_testdata("MR_small_RLE.dcm")))
    dataset.Rows = 32  # the Rust decoder writes past the frame's end, and panics with no Exception
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert reason_of(buffer.getvalue()) == "unreadable_image"


def test_deflated_data_sets_are_not_unpacked():
    dataset = pydicom.dcmread(io.BytesIO(build_dicom(RAMP)))
    dataset.file_meta.TransferSyntaxUID = DeflatedExplicitVRLittleEndian
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert reason_of(buffer.getvalue()) == "unsupported_compression"


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_picture_is_refused(kind):
    data = encode(draw_image(0, 200, 200), kind)
    assert {reason_of(data[:length]) for length in range(100, len(data) - 20, 997)} == {"truncated_image"}


def test_garbage_and_blank_pictures_are_refused():
    assert reason_of(b"no picture at all" * 100) == "unreadable_image"
    assert reason_of(b"") == "unreadable_image"
    assert reason_of(encode(np.full((40, 40), 7, np.uint8), "PNG")) == "blank_image"
    assert reason_of(encode(draw_image(0, 8, 40), "PNG")) == "too_small"


def test_a_sixteen_bit_png_is_scaled_not_clipped():
    values = (np.arange(1600, dtype=np.uint16) * 2).reshape(40, 40)
    image, _ = decode_image(encode(values, "PNG"))
    np.testing.assert_array_equal(image, np.rint(values / 3198 * 255))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "1"])
def test_every_colour_mode_becomes_grey(mode):
    buffer = io.BytesIO()
    Image.fromarray(draw_image(0)).convert(mode).save(buffer, "PNG")
    image, _ = decode_image(buffer.getvalue())
    assert (image.dtype, image.shape) == (np.uint8, (80, 64))


def test_only_regular_files_are_read(tmp_path):
    for path in (tmp_path / "none.jpg", tmp_path, "/dev/zero", "a\0b", ""):
        with pytest.raises(Rejected, match="missing_image"):
            read_file(str(path))


def test_the_short_side_shrinks_to_size_and_never_grows():
    assert shrink_image(draw_image(0, 900, 600), 256).shape == (384, 256)
    assert shrink_image(draw_image(0, 80, 64), 256).shape == (80, 64)
    checker = (np.indices((512, 512)).sum(0) % 2 * 255).astype(np.uint8)
    assert np.abs(shrink_image(checker, 64)[4:-4, 4:-4].astype(int) - 127).max() <= 3  # averaged, not picked


def test_stored_pictures_are_grey_jpegs_close_to_the_source():
    image = draw_image(3, 200, 200)
    back = Image.open(io.BytesIO(encode_grey_jpeg(image, 95)))
    assert (back.format, back.mode, back.info.get("exif")) == ("JPEG", "L", None)
    assert np.abs(np.asarray(back).astype(int) - image).mean() < 2
