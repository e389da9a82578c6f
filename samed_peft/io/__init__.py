"""The only place that opens or writes user files: scans, masks, folders, JSON and weights.

Nothing here executes a pickle, and nothing is left half-written: every artefact is written to a temporary
sibling, synced to disk and renamed into place.
"""

from samed_peft.io.atomic import (
    FolderKind,
    atomic_dir,
    atomic_file,
    recover_dir,
    require_replaceable,
    require_writable_file,
    write_bytes,
    write_json,
    write_text,
)
from samed_peft.io.dicom import dicom_files, dicom_series, holds_dicom
from samed_peft.io.dicom_seg import DICOM_SEG_SUFFIX, require_highdicom, write_dicom_seg
from samed_peft.io.files import (
    content_fingerprint,
    list_folder,
    naming_unreadable,
    read_json,
    read_text,
)
from samed_peft.io.label_names import PICTURE_ADVICE, label_colour, numbered_names, read_label_names
from samed_peft.io.readers import SUFFIXES, is_picture, read_affine, suffix_of
from samed_peft.io.tensors import (
    load_tensors,
    load_torch_weights,
    save_tensors,
    save_torch_weights,
    tensor_shapes,
)
from samed_peft.io.volumes import Volume, grids_apart_mm, read_labels, read_volume
from samed_peft.io.writers import MASK_SUFFIXES, write_mask, write_volume

__all__ = [
    "DICOM_SEG_SUFFIX",
    "MASK_SUFFIXES",
    "PICTURE_ADVICE",
    "SUFFIXES",
    "FolderKind",
    "Volume",
    "atomic_dir",
    "atomic_file",
    "content_fingerprint",
    "dicom_files",
    "dicom_series",
    "grids_apart_mm",
    "holds_dicom",
    "is_picture",
    "label_colour",
    "list_folder",
    "load_tensors",
    "load_torch_weights",
    "naming_unreadable",
    "numbered_names",
    "read_affine",
    "read_json",
    "read_label_names",
    "read_labels",
    "read_text",
    "read_volume",
    "recover_dir",
    "require_highdicom",
    "require_replaceable",
    "require_writable_file",
    "save_tensors",
    "save_torch_weights",
    "suffix_of",
    "tensor_shapes",
    "write_bytes",
    "write_dicom_seg",
    "write_json",
    "write_mask",
    "write_text",
    "write_volume",
]
