"""Convert SAMed's and Meta's checkpoints; export adapters to SAMed, plain SAM, stock PEFT and ONNX."""

from samed_peft.conversion.exports import EXPORTS as EXPORTS
from samed_peft.conversion.exports import convert_sam as convert_sam
from samed_peft.conversion.exports import export_merged as export_merged
from samed_peft.conversion.exports import export_onnx as export_onnx
from samed_peft.conversion.exports import export_peft_fused as export_peft_fused
from samed_peft.conversion.exports import export_samed as export_samed
from samed_peft.conversion.samed_format import convert_samed as convert_samed
from samed_peft.conversion.samed_format import read_samed as read_samed
