"""The nodes of ComfyUI that graphs of students have, by its source."""

TEXT, WHOLE, REAL, YES = "STRING", "INT", "FLOAT", "BOOLEAN"
KINDS = {TEXT: str, WHOLE: int, REAL: float, YES: bool}
# Of each node: the kinds of its inputs, and of its outputs.
NODES: dict[str, tuple[dict[str, str], tuple[str, ...]]] = {
    "CheckpointLoaderSimple": ({"ckpt_name": TEXT}, ("MODEL", "CLIP", "VAE")),
    "UNETLoader": ({"unet_name": TEXT, "weight_dtype": TEXT}, ("MODEL",)),
    "CLIPLoader": ({"clip_name": TEXT, "type": TEXT}, ("CLIP",)),
    "DualCLIPLoader": ({"clip_name1": TEXT, "clip_name2": TEXT, "type": TEXT}, ("CLIP",)),
    "TripleCLIPLoader": (
        {"clip_name1": TEXT, "clip_name2": TEXT, "clip_name3": TEXT}, ("CLIP",)
    ),
    "QuadrupleCLIPLoader": ({f"clip_name{i}": TEXT for i in (1, 2, 3, 4)}, ("CLIP",)),
    "T5TokenizerOptions": (
        {"clip": "CLIP", "min_padding": WHOLE, "min_length": WHOLE}, ("CLIP",)
    ),
    "VAELoader": ({"vae_name": TEXT}, ("VAE",)),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": TEXT, "strength_model": REAL}, ("MODEL",)
    ),
    "LoraLoader": (
        {"model": "MODEL", "clip": "CLIP", "lora_name": TEXT, "strength_model": REAL,
         "strength_clip": REAL}, ("MODEL", "CLIP"),
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": TEXT, "zsnr": YES}, ("MODEL",)),
    "CLIPTextEncode": ({"text": TEXT, "clip": "CLIP"}, ("CONDITIONING",)),
    "CLIPTextEncodeLumina2": (
        {"system_prompt": TEXT, "user_prompt": TEXT, "clip": "CLIP"}, ("CONDITIONING",)
    ),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": REAL}, ("CONDITIONING",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "KSamplerSelect": ({"sampler_name": TEXT}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": TEXT}, ("SIGMAS",)),
    "RandomNoise": ({"noise_seed": WHOLE}, ("NOISE",)),
    "EmptyLatentImage": ({"width": WHOLE, "height": WHOLE, "batch_size": WHOLE}, ("LATENT",)),
    "EmptySD3LatentImage": ({"width": WHOLE, "height": WHOLE, "batch_size": WHOLE}, ("LATENT",)),
    "EmptyFlux2LatentImage": (
        {"width": WHOLE, "height": WHOLE, "batch_size": WHOLE}, ("LATENT",)
    ),
    "EmptyHunyuanLatentVideo": (
        {"width": WHOLE, "height": WHOLE, "length": WHOLE, "batch_size": WHOLE}, ("LATENT",)
    ),
    "SamplerCustomAdvanced": (
        {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS",
         "latent_image": "LATENT"}, ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": TEXT}, ()),
    "SaveAnimatedWEBP": (
        {"images": "IMAGE", "filename_prefix": TEXT, "fps": REAL, "lossless": YES,
         "quality": WHOLE, "method": TEXT}, (),
    ),
}  # fmt: skip
