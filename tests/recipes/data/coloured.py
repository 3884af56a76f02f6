"""The colours of the three pictures that tests of data read."""

COLOURS = [(255, 0, 0), (0, 128, 0), (0, 0, 255)]
