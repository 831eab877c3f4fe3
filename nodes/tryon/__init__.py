"""CatVTON try-on."""
