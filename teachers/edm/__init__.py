"""EDM, EDM2 and ADM: their networks, their published files, and stock forms of them."""
