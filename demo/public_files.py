"""The public files that the graphs name, and where ComfyUI's page may fetch them from."""

from __future__ import annotations

HUB = "https://huggingface.co"
WAN = f"{HUB}/Comfy-Org/Wan_2.1_ComfyUI_repackaged/resolve/main/split_files"
WAN22 = f"{HUB}/Comfy-Org/Wan_2.2_ComfyUI_Repackaged/resolve/main/split_files"
T2V_SMALL, T2V_LARGE = "wan2.1_t2v_1.3B_fp16.safetensors", "wan2.1_t2v_14B_fp16.safetensors"
I2V_LARGE = "wan2.1_i2v_480p_14B_fp8_scaled.safetensors"
ENCODER, VAE = "umt5_xxl_fp8_e4m3fn_scaled.safetensors", "wan_2.1_vae.safetensors"
VISION = "clip_vision_h.safetensors"
I2V_HIGH = "wan2.2_i2v_high_noise_14B_fp8_scaled.safetensors"
I2V_LOW = "wan2.2_i2v_low_noise_14B_fp8_scaled.safetensors"
LORA_HIGH = "wan2.2_i2v_lightx2v_4steps_lora_v1_high_noise.safetensors"
LORA_LOW = "wan2.2_i2v_lightx2v_4steps_lora_v1_low_noise.safetensors"
LORA_21 = "lightx2v_I2V_14B_480p_cfg_step_distill_rank64_bf16.safetensors"
CAUSAL = "causal_forcing-framewise.safetensors"
INTERPOLATION, UPSCALER = "rife_v4.26.safetensors", "RealESRGAN_x4plus.safetensors"
# Files that stand elsewhere than the rest of Wan 2.1: name -> address of the folder.
ELSEWHERE = {
    **dict.fromkeys((I2V_HIGH, I2V_LOW), f"{WAN22}/diffusion_models"),
    **dict.fromkeys((LORA_HIGH, LORA_LOW), f"{WAN22}/loras"),
    LORA_21: f"{HUB}/Kijai/WanVideo_comfy/resolve/main/Lightx2v",
    CAUSAL: f"{HUB}/TalmajM/causal_forcing_framewise_ComfyUI_repackaged/resolve/main/split_files/"
    "diffusion_models",
    INTERPOLATION: f"{HUB}/Comfy-Org/frame_interpolation/resolve/main/frame_interpolation",
    UPSCALER: f"{HUB}/Comfy-Org/Real-ESRGAN_repackaged/resolve/main",
}


def public_file(name: str, folder: str) -> list[dict[str, str]]:
    """What a loader node says of the file it wants: `properties.models`."""
    address = ELSEWHERE.get(name, f"{WAN}/{folder}")
    return [{"name": name, "url": f"{address}/{name}", "directory": folder}]


def listed(files: list[tuple[str, str]]) -> str:
    """The (folder, name) of files as lines of a note."""
    return "\n".join(f"- `models/{folder}/{name}`" for folder, name in files)
