"""Single-device kernels: patch correlation, attention, contrast, assignment. Import as `place.kernels`."""
