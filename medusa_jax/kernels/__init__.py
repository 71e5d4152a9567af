"""Operations that XLA computes too slowly on some target, written by hand."""
