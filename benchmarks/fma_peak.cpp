// The most multiply-adds a core does: 16 independent chains of vector multiply-adds, without memory.
// Compiled with the same flags as a variant of the WKV6 kernel; WIDTH is its vector in bytes.
typedef float Vector __attribute__((vector_size(WIDTH)));

// Runs `rounds` times 16 multiply-adds of WIDTH / 4 floats; the result keeps them from being left out.
extern "C" float multiply_adds(long rounds) {
    Vector x, y, a[16];
    for (unsigned i = 0; i < WIDTH / 4; i++) x[i] = 0.999f, y[i] = 1e-3f;
    for (int j = 0; j < 16; j++) a[j] = y;
    for (long n = 0; n < rounds; n++)
#pragma GCC unroll 16
        for (int j = 0; j < 16; j++) a[j] = a[j] * x + y;
    for (int j = 1; j < 16; j++) a[0] += a[j];
    return a[0][0];
}
