"""Packed checkpoints for tests, made with loops of their own: rounding to nearest in four bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pack_folder(
    source: Path, folder: Path, *, group: int = 16, zeros: bool = True, input_scales: bool = False
) -> dict[str, np.ndarray]:
    """Write `source` (one safetensors file) to `folder` with its decoder's projections in four bits.

    Gives the numbers that they stand for, float64 [N,K] by stored module name, the input's scales left out.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    meanings: dict[str, np.ndarray] = {}
    modules = [name.removesuffix(".weight") for name in tensors if is_projection(name)]
    for module in modules:
        weight = tensors.pop(f"{module}.weight")
        parts, meanings[module] = rounded(weight, group, zeros)
        if input_scales:
            parts["input_scale"] = np.linspace(0.5, 2, weight.shape[1]).astype(parts["scales"].dtype)
        tensors |= {f"{module}.{part}": array for part, array in parts.items()}
    save_file(tensors, folder / "model.safetensors")
    write_record(folder, {"method": "rtn", "source": "tests", "groups": {str(group): len(modules)}})
    return meanings


def write_record(folder: Path, record: dict[str, Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "btp", "version": 1, "bits": 4, **record}
    (folder / "config.json").write_text(json.dumps(config))


def is_projection(name: str) -> bool:
    """Whether a stored tensor is a matrix of a decoder layer."""
    return (
        ".layers." in name
        and "vision" not in name
        and name.endswith(tuple(f"{projection}.weight" for projection in PROJECTIONS))
    )


def rounded(weight: np.ndarray, group: int, zeros: bool) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """qweight, scales and perhaps zeros of a matrix [N,K], and what they stand for."""
    n, k = weight.shape
    qweight = np.zeros((n, k // group, group // 2), np.uint8)
    scales = np.zeros((n, k // group), weight.dtype)
    points = np.zeros((n, -(-k // group // 2)), np.uint8)
    meaning = np.zeros((n, k))
    for row in range(n):
        for place in range(k // group):
            part = weight[row, place * group : (place + 1) * group].astype(np.float64)
            low, high = (
                (min(part.min(), 0), max(part.max(), 0)) if zeros else (-8 / 7 * abs(part).max(), abs(part).max())
            )
            scale = scales[row, place] = (high - low) / 15 or 1
            zero = min(15, max(0, round(-low / float(scale)))) if zeros else 8
            codes = np.clip(np.round(part / float(scale)) + zero, 0, 15).astype(int)
            for index, code in enumerate(codes):
                qweight[row, place, index // 2] |= code << 4 * (index % 2)
            points[row, place // 2] |= zero << 4 * (place % 2)
            meaning[row, place * group : (place + 1) * group] = (codes - zero) * float(scale)
    return {"qweight": qweight, "scales": scales} | ({"zeros": points} if zeros else {}), meaning
