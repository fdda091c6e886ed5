"""DICOM, JPEG and PNG bytes to the grey picture a radiologist would see."""

from __future__ import annotations

import base64
import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    HTJ2K,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
)
from small_sets import draw_image, encode

from place.data.dicom import decode_dicom, show_values
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


TESTDATA = Path(pydicom.__file__).parent / "data" / "test_files"
# Of pydicom's own files those that are no single grey picture of 8 to 16 bits that the permissive decoders read.
NO_RADIOGRAPHS = {
    "unreadable_image": "ExplVR_BigEndNoMeta ExplVR_LitEndNoMeta UN_sequence badVR empty_charset_LEI nested_priv_SQ "
    "meta_missing_tsyntax no_meta no_meta_group_length priv_SQ reportsi reportsi_with_empty_number_tags rtplan "
    "rtplan_truncated rtstruct test-SR waveform_ecg",
    "multi_frame": "SC_rgb_rle_16bit_2frame SC_rgb_rle_2frame SC_rgb_rle_32bit_2frame examples_ybr_color rtdose "
    "rtdose_expb rtdose_rle",
    "unsupported_bit_depth": "SC_rgb_rle_16bit SC_rgb_rle_32bit liver_1frame liver_expb_1frame rtdose_1frame "
    "rtdose_expb_1frame rtdose_rle_1frame",
    "unsupported_photometric": "examples_palette",
    "too_large": "JPEG2000-embedded-sequence-delimiter",
    "truncated_image": "MR_truncated",
    "unsupported_compression": "image_dfl",
}
NEEDS_EXTRA = {
    "unsupported_compression": "JPEG-lossy JPEGLSNearLossless_08 JPEGLSNearLossless_16 JPGExtended "
    "MR_small_jpeg_ls_lossless SC_rgb_jls_lossy_line SC_rgb_jls_lossy_sample SC_rgb_jpeg_gdcm"
}
# Broken: the extra cannot read it either.
WITH_EXTRA = {"unreadable_image": "JPEG-lossy"}


def show_as_pydicom_does(data: bytes) -> np.ndarray:
    """pydicom's own path to the values of a display, on the whole picture at once; padding is black."""
    dataset = pydicom.dcmread(io.BytesIO(data))
    shown = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(dataset.pixel_array, dataset), dataset)
    inverted = dataset.PhotometricInterpretation == "MONOCHROME1"
    if "PixelPaddingValue" in dataset:
        rest = shown[dataset.pixel_array != dataset.PixelPaddingValue]
        shown = np.where(
            dataset.pixel_array == dataset.PixelPaddingValue, rest.max() if inverted else rest.min(), shown
        )
    return shown


def scale_like_a_display(dataset: Dataset, shown: np.ndarray) -> np.ndarray:
    grey = shown
    if shown.dtype != np.uint8:
        values = shown.astype(float)
        grey = np.rint((values - values.min()) * (255 / (values.max() - values.min()))).astype(np.uint8)
    return 255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey


def test_every_file_of_pydicom_is_decoded_exactly_as_pydicom_does_or_refused_for_its_reason():
    extra = NEEDS_EXTRA if find_spec("libjpeg") is None else WITH_EXTRA
    reasons = [*NO_RADIOGRAPHS.items(), *extra.items()]
    refused = {name: reason for reason, names in reasons for name in names.split()}
    grey, colour = [], []
    for path in sorted(TESTDATA.glob("*.dcm")):
        data = path.read_bytes()
        if path.stem in refused:
            with pytest.raises(Rejected) as caught:
                decode_dicom(data)
            assert caught.value.reason == refused[path.stem], path.name
            continue
        dataset = pydicom.dcmread(io.BytesIO(data))
        image, _ = decode_dicom(data)
        if dataset.SamplesPerPixel == 1:
            grey.append(path.stem)
            expected = show_as_pydicom_does(data)
            np.testing.assert_array_equal(image, scale_like_a_display(dataset, expected), err_msg=path.name)
            stored = dataset.pixel_array
            plain = pydicom.pixels.apply_voi_lut(pydicom.pixels.apply_modality_lut(stored, dataset), dataset)
            levels, where = np.unique(stored, return_inverse=True)
            np.testing.assert_array_equal(show_values(dataset, levels)[where.reshape(stored.shape)], plain)
        else:
            colour.append(path.stem)
            np.testing.assert_array_equal(image, np.asarray(Image.fromarray(dataset.pixel_array).convert("L")))
    assert len(grey) >= 11, grey
    assert len(colour) >= 20, colour


def test_the_real_monochrome_pair_is_decoded_exactly_as_pydicom_does(real_data):
    for path in sorted((real_data / "dicom").glob("*.dcm")):
        data = path.read_bytes()
        expected = scale_like_a_display(pydicom.dcmread(path), show_as_pydicom_does(data))
        np.testing.assert_array_equal(decode_dicom(data)[0], expected, err_msg=path.name)


# 32 x 32 pixels of 0, 3, 6, ... in 16 bits, encoded by OpenJPH 0.26.
HTJ2K_RAMP = (
    "/0//UQApQAAAAAAgAAAAIAAAAAAAAAAAAAAAIAAAACAAAAAAAAAAAAABDwEB/1AACAACAAAACv9SAAwAAgABAAUEBEAB/1wAEyCIkJCQkJCQkJ"
    "CQkJCQiIiI/2QAFwABT3BlbkpQSCBWZXIgMC4yNi4zLv+QAAoAAAAAALQAAf+TwAAm6/gFB3QAwAASwAATAOwAh3QAtv0DB3QAwAATQAATgNb+"
    "AAJ0ANrW9gCjVADAABPAABVgqqqgp8J1AGqrVav2wEIB7LYAwAAVcAAFpCRJkufAp6enQngArl1dXV1dXV39jGB79jGB7LoAwAAtCAAF0QAAAA"
    "AA+f8p6enp6enp4nwAvj6fz+fz+Xw+n8/n8/n+/3hghAe/YhAe/YhAe/YhAeyzAf/Z"
)


@pytest.mark.parametrize("syntax", [HTJ2KLossless, HTJ2KLosslessRPCL, HTJ2K])
def test_high_throughput_jpeg_2000_is_decoded(syntax):
    stored = (np.arange(1024).reshape(32, 32) * 3).astype(np.uint16)
    dataset = pydicom.dcmread(io.BytesIO(build_dicom(stored)))
    dataset.file_meta.TransferSyntaxUID = syntax
    dataset.PixelData = encapsulate([base64.b64decode(HTJ2K_RAMP)])
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(decode_dicom(buffer.getvalue())[0], decode_dicom(build_dicom(stored))[0])


def build_lut(first: int, values: np.ndarray, **elements) -> Sequence:
    item = Dataset()
    item.LUTDescriptor = [len(values), first, 16]
    item.LUTData = values.astype("<u2").tobytes()
    item["LUTData"].VR = "OW"
    for name, value in elements.items():
        setattr(item, name, value)
    return Sequence([item])


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_look_up_tables_of_modality_and_display_are_applied_in_turn_and_before_any_window(photometric):
    modality = build_lut(0, np.arange(400) ** 2 // 4, ModalityLUTType="US")
    display = build_lut(100, np.sqrt(np.arange(40000)) * 300)
    data = build_dicom(
        RAMP,
        ModalityLUTSequence=modality,
        VOILUTSequence=display,
        WindowCenter=5,
        WindowWidth=2,
        PhotometricInterpretation=photometric,
    )
    by_hand = np.floor(np.sqrt(np.clip(RAMP.astype(int) ** 2 // 4 - 100, 0, 39999)) * 300)
    expected = np.rint(by_hand * (255 / by_hand.max())).astype(int)
    image, _ = decode_dicom(data)
    np.testing.assert_array_equal(image, 255 - expected if photometric == "MONOCHROME1" else expected)


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("signed", [False, True])
def test_every_depth_from_8_to_16_bits_fills_the_range(bits, signed):
    kind = np.dtype(f"{'i' if signed else 'u'}{1 if bits == 8 else 2}")
    values = np.linspace(0, 2**bits - 1, 400).astype(int) - (2 ** (bits - 1) if signed else 0)
    stored = values.astype(kind).reshape(20, 20)
    image, _ = decode_dicom(build_dicom(stored, BitsStored=bits, HighBit=bits - 1, RescaleSlope=1, RescaleIntercept=0))
    assert (image.min(), image.max()) == (0, 255)
    assert (np.diff(image.ravel().astype(int)) >= 0).all()


@pytest.mark.parametrize("signed", [False, True])
def test_values_in_the_high_bits_of_a_word_are_read_and_what_lies_below_them_is_no_pixel(signed):
    values = (np.arange(4096) - (2048 if signed else 0)).reshape(64, 64)
    stored = values.astype("i2" if signed else "u2")
    below = np.arange(4096).reshape(64, 64).astype(stored.dtype) % 16  # overlays were kept there once
    window = {"WindowCenter": 1000, "WindowWidth": 1500, "BitsStored": 12}
    aligned, _ = decode_dicom(build_dicom(stored * 16 | below, HighBit=15, **window))
    plain, _ = decode_dicom(build_dicom(stored, HighBit=11, **window))
    np.testing.assert_array_equal(aligned, plain)
    assert len(np.unique(plain)) == 256


@pytest.mark.parametrize(("bits", "high"), [(12, 16), (12, 10), (16, 11)])
def test_a_high_bit_that_cannot_be_is_refused(bits, high):
    with pytest.raises(Rejected, match=rf"high bit {high}, {bits} bits stored") as caught:
        decode_dicom(build_dicom(RAMP, BitsStored=bits, HighBit=high))
    assert caught.value.reason == "unsupported_bit_depth"


def test_high_bits_of_a_compressed_picture_are_refused():
    dataset = pydicom.dcmread(io.BytesIO(read_testdata("MR_small_jp2klossless.dcm")))
    dataset.BitsStored, dataset.HighBit = 12, 15
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    assert reason_of(buffer.getvalue()) == "unsupported_bit_depth"


@pytest.mark.parametrize(
    "elements",
    [
        {"WindowCenter": 200, "WindowWidth": 0},
        {"WindowCenter": 200, "WindowWidth": 0.5},
        {"WindowCenter": [200, 100], "WindowWidth": [-1, 50]},
        {"WindowCenter": 200, "WindowWidth": 0, "VOILUTFunction": "SIGMOID"},
        {"WindowCenter": "", "WindowWidth": ""},
        {"RescaleSlope": "", "RescaleIntercept": ""},
        {"RescaleSlope": "", "RescaleIntercept": 5},
        {"RescaleSlope": 2, "RescaleIntercept": ""},
    ],
)
def test_a_window_without_width_and_an_empty_rescale_are_none(elements):
    np.testing.assert_array_equal(decode_dicom(build_dicom(RAMP, **elements))[0], decode_dicom(build_dicom(RAMP))[0])


def test_a_window_narrower_than_one_is_applied_where_its_function_allows_it():
    narrow = {"WindowCenter": 200, "WindowWidth": 0.5, "VOILUTFunction": "LINEAR_EXACT"}
    image, _ = decode_dicom(build_dicom(RAMP, **narrow))
    assert (image[RAMP < 200].max(), image[RAMP > 200].min()) == (0, 255)


def test_a_window_stays_where_only_its_function_is_empty():
    window = {"WindowCenter": 200, "WindowWidth": 101}
    image, _ = decode_dicom(build_dicom(RAMP, VOILUTFunction="", **window))
    np.testing.assert_array_equal(image, decode_dicom(build_dicom(RAMP, **window))[0])


def test_overlays_are_not_drawn():
    plain = build_dicom(RAMP)
    dataset = pydicom.dcmread(io.BytesIO(plain))
    dataset.add_new(0x60000010, "US", 20)
    dataset.add_new(0x60000011, "US", 20)
    dataset.add_new(0x60000100, "US", 1)
    dataset.add_new(0x60003000, "OW", b"\xff" * 50)
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    np.testing.assert_array_equal(decode_dicom(buffer.getvalue())[0], decode_dicom(plain)[0])


def test_a_padding_range_is_black():
    stored = RAMP.copy() + 1000
    stored[0] = np.arange(20)
    image, _ = decode_dicom(build_dicom(stored, PixelPaddingValue=0, PixelPaddingRangeLimit=19))
    assert image[0].max() == 0
    assert (image[1, 0], image[-1, -1]) == (0, 255)


def test_a_header_that_tells_of_burned_in_text_is_passed_on():
    assert decode_dicom(build_dicom(RAMP, BurnedInAnnotation="YES"))[1].is_annotated
    assert not decode_dicom(build_dicom(RAMP, BurnedInAnnotation="NO"))[1].is_annotated
    assert not decode_dicom(build_dicom(RAMP))[1].is_annotated


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
    assert "pip install -e .[dicom-gpl]" in caught.value.detail


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
