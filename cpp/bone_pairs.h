// Bone's tiles of tokens on processors that multiply pairs of bf16 (AVX512_BF16), and squares of 16 by 16 of them (AMX): part of
// bone_cpu.cpp, for an even r. A "pair" is 32 bits, two neighbours along a sum, the first in the low half. du is rounded to bf16
// here alone, so that processors differ by that rounding.

#if defined(KNOWS_TILES)
#define PAIRS __attribute__((target("avx512bf16,amx-tile,amx-bf16")))
#else
#define PAIRS __attribute__((target("avx512bf16")))
#endif

struct Pair { uint32_t bits; };
constexpr int64_t kPairTokens = 2 * kDepth;  // of a tile

PAIRS INLINE __mmask16 lanes(int64_t count) { return __mmask16(count >= 16 ? 0xffff : (1 << count) - 1); }

PAIRS INLINE __m512i loaded(const bf16* from, __mmask16 some) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(some, from));
}
PAIRS INLINE __m512 widened(const bf16* from, __mmask16 some) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(loaded(from, some), 16));
}
PAIRS INLINE __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// ---- products: c (rows, width) = or += a b, a's element (i, k) at a[i * row + k * step], b (depth, width)

template <int ROWS, int COLS>
PAIRS __attribute__((noinline)) void register_tile(int64_t depth, const Pair* a, int64_t row, int64_t step, const Pair* b, float* c,
                                                   int64_t width, bool add) {
    __m512 sum[ROWS][COLS];
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS; j++)
        sum[i][j] = add ? _mm512_loadu_ps(c + i * width + j * W) : _mm512_setzero_ps();
    for (int64_t k = 0; k < depth; k++, a += step, b += width) {
        __m512i right[COLS];
        UNROLL for (int j = 0; j < COLS; j++) right[j] = _mm512_loadu_si512(b + j * W);
        UNROLL for (int i = 0; i < ROWS; i++) {
            int pair;
            memcpy(&pair, a + i * row, 4);
            __m512i left = _mm512_set1_epi32(pair);
            UNROLL for (int j = 0; j < COLS; j++) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], (__m512bh)left, (__m512bh)right[j]);
        }
    }
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS; j++) _mm512_storeu_ps(c + i * width + j * W, sum[i][j]);
}

// How many pairs along a sum AMX takes at a time; 0: not used, here or for this r.
INLINE int64_t square_depth(const Problem& p) {
    return p.pairs == 2 && (p.r == 16 || p.r % 32 == 0) ? least(16, p.r / 2) : 0;
}

#if defined(KNOWS_TILES)
#define BARRIER asm volatile("" ::: "memory")  // the compiler does not know what AMX's loads read

// While it lives, this thread has AMX's registers: 0 to 3 for c, 4 and 5 for a, 6 and 7 for b.
struct Squares {
    const bool used;
    PAIRS explicit Squares(int64_t depth) : used(depth > 0) {
        if (!used) return;
        struct { uint8_t palette = 1, start = 0, reserved[14] = {}; uint16_t row_bytes[16] = {}; uint8_t rows[16] = {}; } config;
        for (int i = 0; i < 8; i++) {
            config.row_bytes[i] = i == 4 || i == 5 ? uint16_t(4 * depth) : 64;
            config.rows[i] = i < 6 ? 16 : uint8_t(depth);
        }
        BARRIER;
        _tile_loadconfig(&config);
    }
    PAIRS ~Squares() { if (used) _tile_release(); }
    Squares(const Squares&) = delete;
};

// rows and width are multiples of 16, depth is one of `at_once`, and a's pairs lie side by side.
PAIRS __attribute__((noinline)) void squares_product(int64_t rows, int64_t depth, int64_t at_once, const Pair* a, int64_t row,
                                                     const Pair* b, float* c, int64_t width, bool add) {
    BARRIER;
    for (int64_t i = 0; i < rows; i += 32)
        for (int64_t j = 0; j < width; j += 32) {
            const bool below = i + 16 < rows, beside = j + 16 < width;
            float* to = c + i * width + j;
            if (add) {
                _tile_loadd(0, to, 4 * width);
                if (beside) _tile_loadd(1, to + 16, 4 * width);
                if (below) _tile_loadd(2, to + 16 * width, 4 * width);
                if (beside && below) _tile_loadd(3, to + 16 * width + 16, 4 * width);
            } else {
                _tile_zero(0); _tile_zero(1); _tile_zero(2); _tile_zero(3);
            }
            for (int64_t k = 0; k < depth; k += at_once) {
                _tile_loadd(4, a + i * row + k, 4 * row);
                _tile_loadd(6, b + k * width + j, 4 * width);
                _tile_dpbf16ps(0, 4, 6);
                if (beside) {
                    _tile_loadd(7, b + k * width + j + 16, 4 * width);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if (below) {
                    _tile_loadd(5, a + (i + 16) * row + k, 4 * row);
                    _tile_dpbf16ps(2, 5, 6);
                }
                if (beside && below) _tile_dpbf16ps(3, 5, 7);
            }
            _tile_stored(0, to, 4 * width);
            if (beside) _tile_stored(1, to + 16, 4 * width);
            if (below) _tile_stored(2, to + 16 * width, 4 * width);
            if (beside && below) _tile_stored(3, to + 16 * width + 16, 4 * width);
        }
    BARRIER;
}
#else
struct Squares { explicit Squares(int64_t) {} };
INLINE void squares_product(int64_t, int64_t, int64_t, const Pair*, int64_t, const Pair*, float*, int64_t, bool) { abort(); }
#endif

// c (tokens, width) = a b
INLINE void pair_product(const Problem& p, int64_t tokens, const Pair* a, int64_t row, const Pair* b, float* c, int64_t width) {
    const int64_t at_once = square_depth(p), by_squares = at_once ? tokens / 16 * 16 : 0;
    if (by_squares) squares_product(by_squares, p.r / 2, at_once, a, row, b, c, width, false);
    product(tokens - by_squares, p.r / 2, a + by_squares * row, row, 1, b, c + by_squares * width, width, false);
}

template <int D> PAIRS INLINE void swap_lanes(__m512i* v) {
    constexpr __mmask16 upper = D == 1 ? 0xaaaa : D == 2 ? 0xcccc : D == 4 ? 0xf0f0 : 0xff00;
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i low = _mm512_mask_add_epi32(lane, upper, lane, _mm512_set1_epi32(16 - D));
    const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(D)), upper, lane, _mm512_set1_epi32(16));
    UNROLL for (int i = 0; i < 16; i++)
        if (!(i & D)) {
            const __m512i first = v[i], second = v[i + D];
            v[i] = _mm512_permutex2var_epi32(first, low, second);
            v[i + D] = _mm512_permutex2var_epi32(first, high, second);
        }
}

// to (width, depth) = from (depth, width) transposed, both multiples of 16.
PAIRS void transpose(const Pair* from, int64_t depth, int64_t width, Pair* to) {
    for (int64_t k = 0; k < depth; k += 16)
        for (int64_t c = 0; c < width; c += 16) {
            __m512i v[16];
            UNROLL for (int i = 0; i < 16; i++) v[i] = _mm512_loadu_si512(from + (k + i) * width + c);
            swap_lanes<1>(v), swap_lanes<2>(v), swap_lanes<4>(v), swap_lanes<8>(v);
            UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(to + (c + i) * depth + k, v[i]);
        }
}

// ---- one tile of tokens

// Up to the next bf16 with the probability of the distance, else down: the pattern of rounding.py. A NaN stays one.
PAIRS INLINE void store_evenly(bf16* to, __mmask16 some, __m512 x, __m512i row, __m512i column) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i noise = _mm512_and_si512(_mm512_xor_si512(row, column), _mm512_set1_epi32(0xffff));
    const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
    const __m512i moved = _mm512_mask_mov_epi32(_mm512_add_epi32(bits, noise), _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), quiet);
    _mm256_mask_storeu_epi16(to, some, _mm512_cvtepi32_epi16(_mm512_srli_epi32(moved, 16)));
}

PAIRS void forward_pairs(const Problem& p, const Workspace& work, int64_t first, int64_t tokens) {
    const bf16* x = static_cast<const bf16*>(p.x) + first * p.in;
    bf16 *xu = static_cast<bf16*>(p.xu) + first * p.in, *y = static_cast<bf16*>(p.y) + first * p.out;
    const Pair* b = static_cast<const Pair*>(p.b);
    const int64_t r = p.r, width = padded(r);
    float *s = work.array(0), *u = work.array(1);
    const Squares squares(square_depth(p));
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int64_t j = 0; j < p.in; j += r, b += r / 2 * width) {
        pair_product(p, tokens, reinterpret_cast<const Pair*>(x + j), p.in / 2, b, u, width);
        const int64_t next = j + r < p.in ? r : 0;
        for (int64_t i = 0; i < tokens; i++) {
            const bf16* xs = x + i * p.in + j;
            float *us = u + i * width, *sums = s + i * width;
            prefetch(xs + r, next);
            const __m512i row = _mm512_set1_epi32(int32_t(uint32_t(first + i) * 49473u));
            for (int64_t c = 0; c < r; c += 16) {
                const __mmask16 some = lanes(r - c);
                const __m512i place = _mm512_add_epi32(lane, _mm512_set1_epi32(int32_t(j + c)));
                const __m512 add = _mm512_loadu_ps(us + c);
                _mm512_storeu_ps(sums + c, j ? _mm512_add_ps(_mm512_loadu_ps(sums + c), add) : add);
                store_evenly(xu + i * p.in + j + c, some, _mm512_add_ps(widened(xs + c, some), add), row,
                             _mm512_mullo_epi32(place, _mm512_set1_epi32(40503)));
            }
        }
    }
    bf16* tile = reinterpret_cast<bf16*>(u);
    for (int64_t i = 0; i < tokens; i++, y += p.out) {
        for (int64_t c = 0; c < r; c += 16) _mm256_storeu_si256((__m256i*)(tile + c), rounded(_mm512_loadu_ps(s + i * width + c)));
        int64_t j = 0;
        if (r % 32 == 0)
            for (; j + r <= p.out; j += r)
                for (int64_t c = 0; c < r; c += 32) _mm512_storeu_si512(y + j + c, _mm512_loadu_si512(tile + c));
        for (; j < p.out; j += r) memcpy(y + j, tile, sizeof(bf16) * size_t(least(r, p.out - j)));
    }
}

// What the products of one piece read, made of its q, x (rows of `in`) and t: du (tokens, r), and in pairs along the tokens
// `left`, which is du, and `right`, which is x, up to `depth` pairs with zeros.
PAIRS INLINE void pair_operands(int64_t tokens, int64_t depth, int64_t in, int64_t r, int64_t next, const bf16* q, const bf16* x,
                                const float* t, bf16* du, Pair* left, Pair* right) {
    const int64_t width = padded(r);
    for (int64_t k = 0; k < depth; k++, q += 2 * in, x += 2 * in, t += 2 * width, du += 2 * r, left += width, right += width) {
        const bool has[2] = {2 * k < tokens, 2 * k + 1 < tokens};
        UNROLL for (int i = 0; i < 2; i++)
            if (has[i]) prefetch(q + i * in + r, next), prefetch(x + i * in + r, next);
        for (int64_t c = 0; c < r; c += 16) {
            const __mmask16 some = lanes(r - c);
            __m512i dus[2] = {}, xs[2] = {};
            UNROLL for (int i = 0; i < 2; i++)
                if (has[i]) {
                    const __m256i made = rounded(_mm512_add_ps(widened(q + i * in + c, some), _mm512_loadu_ps(t + i * width + c)));
                    _mm256_mask_storeu_epi16(du + i * r + c, some, made);
                    dus[i] = _mm512_cvtepu16_epi32(made), xs[i] = loaded(x + i * in + c, some);
                }
            _mm512_storeu_si512(left + c, _mm512_or_si512(dus[0], _mm512_slli_epi32(dus[1], 16)));
            _mm512_storeu_si512(right + c, _mm512_or_si512(xs[0], _mm512_slli_epi32(xs[1], 16)));
        }
    }
}

PAIRS void backward_pairs(const Problem& p, const Workspace& work, int64_t share, int64_t group, int64_t first, int64_t tokens) {
    const bf16* x = static_cast<const bf16*>(p.x) + first * p.in;
    const bf16* g = static_cast<const bf16*>(p.g) + first * p.out;
    bf16* q = static_cast<bf16*>(p.q) + first * p.in;
    const int64_t r = p.r, width = padded(r), m = p.in / r, at_once = square_depth(p);
    const int64_t depth = at_once ? (tokens + 31) / 32 * 16 : (tokens + 1) / 2;
    float *t = work.array(0), *update = work.array(1);
    Pair *right = reinterpret_cast<Pair*>(work.array(2)), *left = reinterpret_cast<Pair*>(work.array(3));
    bf16* du = reinterpret_cast<bf16*>(work.array(4));
    Pair* turned = reinterpret_cast<Pair*>(update);  // which comes later
    const Squares squares(at_once);
    for (int64_t i = 0; i < tokens; i++, g += p.out)
        for (int64_t c = 0; c < r; c += 16) {
            __m512 sum = _mm512_setzero_ps();
            for (int64_t j = c; j < p.out; j += r) sum = _mm512_add_ps(sum, widened(g + j, lanes(least(r - c, p.out - j))));
            _mm512_storeu_ps(t + i * width + c, sum);
        }
    for (int64_t piece = m * group / p.groups, last = m * (group + 1) / p.groups; piece < last; piece++) {
        const int64_t j = piece * r;
        pair_operands(tokens, depth, p.in, r, piece + 1 < last ? r : 0, q + j, x + j, t, du, left, right);
        float* db = p.db + (share * m + piece) * r * width;
        if (at_once) {
            transpose(left, depth, width, turned);
            squares_product(r, depth, at_once, turned, depth, right, db, width, true);
        } else {
            product(r, depth, left, 1, width, right, db, width, true);
        }
        if (!p.wants_dx) continue;
        pair_product(p, tokens, reinterpret_cast<const Pair*>(du), r / 2, static_cast<const Pair*>(p.b) + piece * r / 2 * width, update,
                     width);
        for (int64_t i = 0; i < tokens; i++)
            for (int64_t c = 0; c < r; c += 16) {
                const __mmask16 some = lanes(r - c);
                bf16* dx = q + i * p.in + j + c;
                _mm256_mask_storeu_epi16(dx, some, rounded(_mm512_add_ps(widened(dx, some), _mm512_loadu_ps(update + i * width + c))));
            }
    }
}
