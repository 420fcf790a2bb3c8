"""What makers promise of their cards: dense products (no sparsity), by the name torch has of a card.

10**12 operations/s with float32 sums, and 10**9 bytes/s of memory. ``tfloat32`` stands for float32 products where torch
may round them so. Where a document states products with sparsity only, the dense ones are half of them, as its footnote
says.
"""

from __future__ import annotations

import dataclasses

import torch

from geneformer_fast.profiling.figures import Datasheet

_V100 = "NVIDIA V100 Tensor Core GPU, data sheet, January 2020"
_T4 = "NVIDIA Turing GPU architecture, whitepaper WP-09183-001, appendix A (Tesla T4)"
_A100 = "NVIDIA A100 Tensor Core GPU, data sheet, June 2021"
_A10 = "NVIDIA A10 Tensor Core GPU, data sheet, March 2021"
_A10G = "NVIDIA A10G Tensor Core GPU, data sheet for Amazon EC2 G5, February 2022"
_L4 = "NVIDIA L4 Tensor Core GPU, data sheet, 2023"
_L40S = "NVIDIA L40S, data sheet, 2023"
_GA102 = "NVIDIA Ampere GA102 GPU architecture, whitepaper, appendix A (GeForce RTX 3090)"
_ADA = "NVIDIA Ada GPU architecture, whitepaper, appendix A (GeForce RTX 4090)"
_H100 = "NVIDIA H100 Tensor Core GPU, data sheet, 2023"
_H200 = "NVIDIA H200 Tensor Core GPU, data sheet, 2024"


def _sheet(name: str, document: str, memory_gbps: float, **products: float) -> Datasheet:
    half = products.pop("half", None)
    if half is not None:
        products |= {"float16": half, "bfloat16": half}
    return Datasheet(name, products, memory_gbps, document)


def _hopper(name: str, document: str, memory_gbps: float) -> Datasheet:
    return _sheet(
        name, document, memory_gbps, float64=67.0, float32=67.0, tfloat32=494.5, half=989.5, int8=1979.0, fp8=1979.0
    )


def _hopper_nvl(name: str, document: str, memory_gbps: float) -> Datasheet:
    return _sheet(
        name, document, memory_gbps, float64=60.0, float32=60.0, tfloat32=417.5, half=835.5, int8=1670.5, fp8=1670.5
    )


def _ampere(name: str, memory_gbps: float) -> Datasheet:
    return _sheet(name, _A100, memory_gbps, float64=19.5, float32=19.5, tfloat32=156.0, half=312.0, int8=624.0)


_V100_SXM2 = _sheet("V100 SXM2", _V100, 900.0, float64=7.8, float32=15.7, float16=125.0)
_V100_PCIE = _sheet("V100 PCIe", _V100, 900.0, float64=7.0, float32=14.0, float16=112.0)
_A100_40_SXM, _A100_40_PCIE = _ampere("A100 40 GB SXM", 1555.0), _ampere("A100 40 GB PCIe", 1555.0)
_A100_80_SXM, _A100_80_PCIE = _ampere("A100 80 GB SXM", 2039.0), _ampere("A100 80 GB PCIe", 1935.0)

#: By ``torch.cuda.get_device_name``, word for word: a slice of a card (MIG) has another name, and is another device.
DATASHEETS: dict[str, Datasheet] = {
    "Tesla V100-SXM2-16GB": _V100_SXM2,
    "Tesla V100-SXM2-32GB": _V100_SXM2,
    "Tesla V100-PCIE-16GB": _V100_PCIE,
    "Tesla V100-PCIE-32GB": _V100_PCIE,
    "Tesla V100S-PCIE-32GB": _sheet("V100S PCIe", _V100, 1134.0, float64=8.2, float32=16.4, float16=130.0),
    "Tesla T4": _sheet("T4", _T4, 320.0, float32=8.1, float16=65.0, int8=130.0),
    "A100-SXM4-40GB": _A100_40_SXM,
    "NVIDIA A100-SXM4-40GB": _A100_40_SXM,
    "A100-PCIE-40GB": _A100_40_PCIE,
    "NVIDIA A100-PCIE-40GB": _A100_40_PCIE,
    "A100-SXM4-80GB": _A100_80_SXM,
    "NVIDIA A100-SXM4-80GB": _A100_80_SXM,
    "NVIDIA A100 80GB PCIe": _A100_80_PCIE,
    "NVIDIA A10": _sheet("A10", _A10, 600.0, float32=31.2, tfloat32=62.5, half=125.0, int8=250.0),
    "NVIDIA A10G": _sheet("A10G", _A10G, 600.0, float32=31.5, tfloat32=35.0, half=70.0, int8=140.0),
    "NVIDIA L4": _sheet("L4", _L4, 300.0, float32=30.3, tfloat32=60.0, half=121.0, int8=242.5, fp8=242.5),
    "NVIDIA L40S": _sheet("L40S", _L40S, 864.0, float32=91.6, tfloat32=183.0, half=362.0, int8=733.0, fp8=733.0),
    "NVIDIA GeForce RTX 3090": _sheet(
        "GeForce RTX 3090", _GA102, 936.0, float32=35.6, tfloat32=35.6, half=71.0, int8=284.0
    ),
    "NVIDIA GeForce RTX 4090": _sheet(
        "GeForce RTX 4090", _ADA, 1008.0, float32=82.6, tfloat32=82.6, half=165.2, int8=660.6, fp8=330.3
    ),
    "NVIDIA H100 80GB HBM3": _hopper("H100 SXM", _H100, 3350.0),
    "NVIDIA H100 PCIe": _sheet(
        "H100 PCIe", _H100, 2000.0, float64=51.0, float32=51.0, tfloat32=378.0, half=756.5, int8=1513.0, fp8=1513.0
    ),
    "NVIDIA H100 NVL": _hopper_nvl("H100 NVL", _H100, 3900.0),
    "NVIDIA H200": _hopper("H200 SXM", _H200, 4800.0),
    "NVIDIA H200 NVL": _hopper_nvl("H200 NVL", _H200, 4800.0),
}


def datasheet_of(device: torch.device) -> Datasheet | None:
    """What the maker promises of a device; None where the card is not known, and on CPUs."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return with_precision(DATASHEETS.get(torch.cuda.get_device_name(device)))


def with_precision(sheet: Datasheet | None) -> Datasheet | None:
    """The same, with products of float32 as torch computes them now: in TensorFloat-32 where that is allowed."""
    if sheet is None or torch.get_float32_matmul_precision() == "highest" or "tfloat32" not in sheet.products:
        return sheet
    return dataclasses.replace(sheet, products=sheet.products | {"float32": sheet.products["tfloat32"]})
