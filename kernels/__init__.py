"""Single-device kernels: attention and patch correlation. Import as `place.kernels`."""
