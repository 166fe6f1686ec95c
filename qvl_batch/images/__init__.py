"""Image files to pixels: any bytes become a square of uint8 RGB, or an `ImageError`, in bounded memory and time."""
