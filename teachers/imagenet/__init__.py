"""The research transformers of ImageNet: SiT, LightningDiT with its VA-VAE, and U-ViT."""
