"""Numbers on fewer bits, whatever model they are in: grids, quantisers, entropy coding."""
