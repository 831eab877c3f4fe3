"""The public Wan 2.1 files that the graphs name, and where ComfyUI's page may fetch them from."""

from __future__ import annotations

WAN = "https://huggingface.co/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
T2V_SMALL, T2V_LARGE = "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_t2v_14B_fp16.safetensors"
I2V_LARGE = "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"
ENCODER, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
VISION = "clip_vision_h.safetensors"


def wan_file(name: str, folder: str) -> list[dict[str, str]]:
    """What a loader node says of the file it wants: `properties.models`."""
    return [{"name": name, "url": f"{WAN}/{folder}/{name}", "directory": folder}]
