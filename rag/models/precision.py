"""In which precision weights are held and multiplied, by what the machine has.

    dtype = dtype_of("auto", torch.device("cpu"))     # bfloat16 on a CPU that multiplies it, else float32
    model = model.to(dtype)

bfloat16 is up to several times as fast as float32 where the hardware multiplies it: on GPUs, and on CPUs with AMX or
AVX512-BF16. On other CPUs it is slower.
"""

import torch

# The words of --precision; None stands for "auto".
DTYPES = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, and torch uses them."""
    capabilities: dict = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    has_them = capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
    return bool(has_them) and torch.backends.cpu.get_cpu_capability() != "DEFAULT"


def dtype_of(precision: str, device: torch.device | str) -> torch.dtype:
    """The dtype that a word of --precision stands for on a device; "auto" is the fastest that keeps float32's range.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16".
    """
    named = DTYPES[precision]
    if named is not None:
        return named
    if torch.device(device).type == "cpu":
        return torch.bfloat16 if multiplies_bfloat16() else torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """bfloat16, float16 or float32, as files and lines say it."""
    return str(dtype).removeprefix("torch.")
