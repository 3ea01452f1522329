"""What the library costs."""
