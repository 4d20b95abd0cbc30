"""Everything that uses FFCV: the import shim, ``.beton`` files, and the loader that reads them."""
