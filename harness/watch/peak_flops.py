"""How many floating-point operations a second a GPU can make at most, by the name that torch gives it.

Dense products of matrices, without sparsity, accumulated in fp32, as in NVIDIA's data sheets (V100 2020-01, T4 2019-03,
A100 2021-06, A10, A30 and A40 2022, L4, L40 and L40S 2023, H100 and H200 2024-11, HGX B200 2025) and, for GeForce, the
white papers of the architectures GA102 (2020) and AD102 (2022).
"""

from typing import NamedTuple


class Peak(NamedTuple):
    """Operations a second, in units of 1e12; None where the hardware has no such type."""

    fp16: float
    tf32: float | None
    fp32: float
    fp64: float
    has_bf16: bool = True

    @property
    def bf16(self) -> float | None:
        """As quick as fp16, where there is any."""
        return self.fp16 if self.has_bf16 else None


PEAKS: tuple[tuple[tuple[str, ...], Peak], ...] = (
    (("B200",), Peak(2250, 1100, 75, 37)),
    (("H200", "NVL"), Peak(835.5, 417.5, 60, 60)),
    (("H200",), Peak(989.5, 494.7, 67, 67)),
    (("H100", "NVL"), Peak(835.5, 417.5, 60, 60)),
    (("H100", "PCIe"), Peak(756, 378, 51, 51)),
    (("H100",), Peak(989.5, 494.7, 67, 67)),
    (("A100",), Peak(312, 156, 19.5, 19.5)),
    (("A30",), Peak(165, 82, 10.3, 10.3)),
    (("A40",), Peak(149.7, 74.8, 37.4, 0.58)),
    (("A10",), Peak(125, 62.5, 31.2, 0.49)),
    (("L40S",), Peak(362, 183, 91.6, 1.43)),
    (("L40",), Peak(181, 90.5, 90.5, 1.41)),
    (("L4",), Peak(121, 60, 30.3, 0.47)),
    (("V100", "PCIE"), Peak(112, None, 14, 7, has_bf16=False)),
    (("V100",), Peak(125, None, 15.7, 7.8, has_bf16=False)),
    (("T4",), Peak(65, None, 8.1, 0.25, has_bf16=False)),
    (("RTX 4090",), Peak(165.2, 82.6, 82.6, 1.29)),
    (("RTX 3090",), Peak(71, 35.6, 35.6, 0.56)),
)
"""Words of a device's name, all of which it must have, the more special name first."""


def peak_flops(device_name: str, *, precision: str, allows_tf32: bool) -> float | None:
    """Return the most operations a second of a device in a precision of the configuration, or None if it is not known.

    Args:
        device_name: such as "NVIDIA H100 80GB HBM3".
        precision: fp32, bf16, fp16 or fp64.
        allows_tf32: whether torch may multiply fp32 matrices in TF32.
    """
    words = device_name.replace("-", " ").split()
    if {"MIG", "Laptop"} & set(words):
        return None  # a part of a GPU, or a slower one of the same name
    name = f" {' '.join(words)} "
    for wanted, peak in PEAKS:
        if all(f" {word} " in name for word in wanted):
            kind = "tf32" if precision == "fp32" and allows_tf32 and peak.tf32 else precision
            found: float | None = getattr(peak, kind)
            return None if found is None else found * 1e12
    return None
