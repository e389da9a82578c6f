"""Convert SAMed's and Meta's checkpoints; export adapters to SAMed, plain SAM, stock PEFT and ONNX."""

from samed_peft.conversion.exports import convert_sam, export_merged, export_onnx, export_peft_fused, export_samed
from samed_peft.conversion.samed_format import convert_samed, read_samed

__all__ = [
    "convert_sam",
    "convert_samed",
    "export_merged",
    "export_onnx",
    "export_peft_fused",
    "export_samed",
    "read_samed",
]
