"""The commands of `distill`, one function each; `distill/__main__.py` names them."""
