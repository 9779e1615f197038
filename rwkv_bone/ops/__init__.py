"""Operations with kernels of their own, and how these are built."""
