"""Files of converted models: directories, Hugging Face checkpoints, programs of torch.export."""
