"""Image files to pixels: any bytes become what the model sees, or an `ImageError`, in bounded memory and time."""
