"""All that knows FFCV: its bindings, its ``.beton`` files, and the loader that reads them."""
