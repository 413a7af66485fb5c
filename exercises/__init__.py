"""Nine exercises on LoRA and QLoRA. See exercises/README.md."""
